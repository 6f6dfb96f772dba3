"""Plain calls beside a scripted engine model on a gRPC endpoint: what waits, and what comes back."""

from __future__ import annotations

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from patience import PATIENCE_S, wait_for
from tritonclient.grpc import service_pb2, service_pb2_grpc

from blockzoo.server_config import unary
from blockzoo.server_config.unary import UnaryFront

_path = Path(__file__).with_name("test_front.py")
_spec = importlib.util.spec_from_file_location("recording_triton", _path)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
RecordingTriton = _module.RecordingTriton


class Request(_module.Request):
    def request_id(self) -> str:
        return ""


class Engine(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The engine model, answering as a test scripts it, on a port that stays the same."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: tuple[grpc.StatusCode, str] | None = None  # of the way to it
        self.refusal: dict[str, str] = {}  # outputs of its own
        self.asked: list[SimpleNamespace] = []
        self.cancelled: list[SimpleNamespace] = []
        self.port = 0
        self.start()

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def ModelStreamInfer(self, requests, context):  # noqa: N802 -- Triton's name
        for request in requests:
            parameters = {name: value.string_param for name, value in request.parameters.items()}
            asked = SimpleNamespace(
                model=request.model_name,
                parameters=parameters,
                timeout=request.parameters["timeout"].int64_param,
                inputs=dict(
                    zip([tensor.name for tensor in request.inputs], request.raw_input_contents, strict=True)
                ),
            )
            context.add_callback(lambda asked=asked: self.gate.is_set() or self.cancelled.append(asked))
            self.asked.append(asked)
            while not self.gate.wait(0.02):
                if not context.is_active():
                    return
            if self.error is not None:
                context.abort(*self.error)
            response = service_pb2.ModelStreamInferResponse()
            said = {"text_output": "answer", **self.refusal}
            texts = [(n, "BYTES", len(t).to_bytes(4, "little") + t.encode()) for n, t in said.items()]
            for name, kind, raw in (*texts, ("token_ids", "INT32", np.array([5, -1], np.int32).tobytes())):
                shape = [1, 1 if kind == "BYTES" else 2]
                response.infer_response.outputs.add(name=name, datatype=kind, shape=shape)
                response.infer_response.raw_output_contents.append(raw)
            yield response


@pytest.fixture
def engine():
    made = Engine()
    yield made
    made.gate.set()
    made.stop()


@pytest.fixture
def triton():
    return RecordingTriton()


@pytest.fixture
def front(engine, triton, demo_zoo, monkeypatch):
    monkeypatch.setattr(unary, "_MAX_CALLS", 2)
    monkeypatch.setattr(unary, "_POLL_S", 0.01)
    made = UnaryFront(triton, demo_zoo, f"127.0.0.1:{engine.port}", 600.0)
    yield made
    engine.gate.set()
    made.close(PATIENCE_S)
    assert triton.logged == []


def fill(front, engine) -> list[Request]:
    """Calls of one model that keep its place taken until the gate is opened, and one that waits."""
    engine.gate.clear()
    calls = [Request(model="base", text_input=f"{i}") for i in range(2)]
    for call in calls:
        front.handle(call)
    wait_for(lambda: len(engine.asked) == 1)
    return calls


def outcome(request: Request) -> tuple[str, str]:
    wait_for(lambda: request.sender.final)
    (response,) = request.sender.sent
    if response.error is not None:
        return response.error.code, response.error.message
    return "ok", response.tensors["text_output"][0, 0].decode()


def test_a_call_gets_the_engines_answer(front, engine):
    request = Request({"secret": "s", "priority": 1}, model="base", text_input="x", max_tokens=4)
    front.handle(request)
    assert outcome(request) == ("ok", "answer")
    assert request.sender.sent[0].tensors["token_ids"].tolist() == [[5, -1]]
    (asked,) = engine.asked
    assert asked.model == "blockzoo"
    expected = {"model": b"\4\0\0\0base", "text_input": b"\1\0\0\0x", "max_tokens": b"\4\0\0\0"}
    assert asked.inputs == expected | {"tell_errors": b"\1"}
    assert asked.parameters.items() >= {"secret": "s"}.items()
    assert "priority" not in asked.parameters
    assert 599e6 < asked.timeout <= 600e6


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
        (grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARG"),
        (grpc.StatusCode.INTERNAL, "INTERNAL"),
    ],
)
def test_the_status_of_an_error_comes_through(front, engine, said, code):
    engine.error = said, "top_p: wrong"
    request = Request(model="base", text_input="x")
    front.handle(request)
    assert outcome(request) == (code, "top_p: wrong")


@pytest.mark.parametrize("code", ["UNAVAILABLE", "NOT_FOUND", "INVALID_ARG", "INTERNAL"])
def test_the_status_of_a_refusal_comes_through(front, engine, code):
    engine.refusal = {"error": "top_p: wrong", "error_status": code}
    request = Request(model="base", text_input="x")
    front.handle(request)
    assert outcome(request) == (code, "top_p: wrong")


def test_a_parameter_of_any_type_reaches_who_refuses_it(front, engine):
    request = Request({"top_q": 2**64 - 1, "up": [1]}, model="base", text_input="x")
    front.handle(request)
    assert outcome(request) == ("ok", "answer")
    assert engine.asked[0].parameters.items() >= {"top_q": str(2**64 - 1), "up": "[1]"}.items()


def test_a_request_larger_than_a_message_is_refused(front, engine):
    request = Request(model="base", text_input="x" * (65 << 20))
    front.handle(request)
    code, message = outcome(request)
    assert (code, "larger than max" in message) == ("INVALID_ARG", True), message


def test_a_connection_that_breaks_is_made_again(front, engine):
    under_way, _ = fill(front, engine)
    engine.stop()
    code, message = outcome(under_way)
    assert code == "UNAVAILABLE", message
    refused = Request(model="base", text_input="x")
    front.handle(refused)
    assert outcome(refused)[0] == "UNAVAILABLE"
    engine.gate.set()
    engine.start()

    def answered() -> bool:
        again = Request(model="base", text_input="x")
        front.handle(again)
        return outcome(again) == ("ok", "answer")

    wait_for(answered)


def test_time_runs_while_a_call_waits(front, engine):
    calls = fill(front, engine)
    late = Request(timeout=30_000, model="base", text_input="late")
    front.handle(late)
    assert outcome(late) == ("UNAVAILABLE", "the request took longer than its time limit of 0.03 s")
    engine.gate.set()
    assert [outcome(call) for call in calls] == [("ok", "answer")] * 2
    assert len(engine.asked) == 2


def test_what_has_waited_counts(front, engine):
    fill(front, engine)
    waits = Request({"timeout": 10_000_000}, model="base", text_input="waits")
    front.handle(waits)
    threading.Event().wait(0.05)
    engine.gate.set()
    assert outcome(waits) == ("ok", "answer")
    assert engine.asked[-1].timeout <= 9_950_000


def test_a_call_cancelled_while_it_waits_ends(front, engine):
    fill(front, engine)
    cancelled = Request(model="base", text_input="x")
    front.handle(cancelled)
    cancelled.sender.cancelled = True
    assert outcome(cancelled) == ("UNAVAILABLE", "the request was cancelled")


def test_a_call_cancelled_under_way_is_cancelled_in_the_engine(front, engine):
    under_way, waits = fill(front, engine)
    under_way.sender.cancelled = True
    assert outcome(under_way) == ("UNAVAILABLE", "the request was cancelled")
    wait_for(lambda: engine.cancelled == engine.asked[:1])
    wait_for(lambda: len(engine.asked) == 2)  # its place is free
    engine.gate.set()
    assert outcome(waits) == ("ok", "answer")


def test_a_flood_is_refused_and_holds_no_other_model(front, engine, monkeypatch):
    fill(front, engine)
    monkeypatch.setattr(front._turns, "_capacity", 8 << 16)
    flood = [Request(model="base", text_input="x") for _ in range(20)]
    for call in flood:
        front.handle(call)
    refused = [call for call in flood if call.sender.final]
    assert len(refused) == 17
    assert {outcome(call)[0] for call in refused} == {"UNAVAILABLE"}
    other = Request(model="notes", text_input="other")
    front.handle(other)
    wait_for(lambda: len(engine.asked) == 2)  # in the place that a flood leaves free
    assert engine.asked[-1].inputs["model"].endswith(b"notes")


def test_names_that_clients_make_up_share_one_turn(front, engine):
    engine.gate.clear()
    made_up = [Request(model=f"made up {i}", text_input="x") for i in range(4)]
    for call in made_up:
        front.handle(call)
    wait_for(lambda: len(engine.asked) == 1)
    front.handle(Request(model="base", text_input="x"))
    wait_for(lambda: len(engine.asked) == 2)
    assert engine.asked[-1].inputs["model"].endswith(b"base")


def test_health_is_answered_while_calls_wait(front, engine):
    fill(front, engine)
    probe = Request(health=True)
    front.handle(probe)
    assert probe.sender.sent[0].tensors["text_output"].tolist() == [[b"ok"]]


def test_health_tells_of_a_loop_that_hangs(front, monkeypatch):
    monkeypatch.setattr(unary, "_STALL_S", -1.0)
    probe = Request(health=True)
    front.handle(probe)
    assert outcome(probe) == ("UNAVAILABLE", "the thread that forwards calls has stopped")


def test_calls_that_are_left_at_the_end_are_told(engine, triton, demo_zoo, monkeypatch):
    monkeypatch.setattr(unary, "_MAX_CALLS", 2)
    front = UnaryFront(triton, demo_zoo, f"127.0.0.1:{engine.port}")
    calls = fill(front, engine)
    assert engine.asked[0].timeout == 0
    front.close(0)
    late = Request(model="base", text_input="x")
    front.handle(late)
    why = "the server is shutting down; send the request elsewhere"
    assert [outcome(call) for call in (*calls, late)] == [("UNAVAILABLE", why)] * 3
    assert triton.logged == []
