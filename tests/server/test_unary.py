"""Plain calls beside a scripted engine model: what waits, for how long, and what comes back."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from blockzoo.server_config import unary
from blockzoo.server_config.answer import pack
from blockzoo.server_config.control import internal_mark
from blockzoo.server_config.unary import UnaryFront

_path = Path(__file__).with_name("test_front.py")
_spec = importlib.util.spec_from_file_location("recording_triton", _path)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
RecordingTriton, wait_for = _module.RecordingTriton, _module.wait_for


class Request(_module.Request):
    def request_id(self) -> str:
        return ""


class Triton(RecordingTriton):
    """Inner requests, answered as a test scripts it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.error: str | None = None
        self.asked: list[SimpleNamespace] = []

    def InferenceRequest(self, **options):  # noqa: N802 -- Triton's name
        inner = SimpleNamespace(**options)
        inner.exec = lambda decoupled: self._run(inner)
        return inner

    def _run(self, inner):
        self.asked.append(inner)
        assert self.gate.wait(10)
        error = self.error
        tensors = [self.Tensor("text_output", np.array([[b"answer"]], object))]
        yield SimpleNamespace(
            has_error=lambda: error is not None,
            error=lambda: SimpleNamespace(message=lambda: error),
            output_tensors=lambda: tensors,
        )


@pytest.fixture
def triton():
    return Triton()


@pytest.fixture
def front(triton, demo_zoo, monkeypatch):
    monkeypatch.setattr(unary, "_MAX_CALLS", 2)
    monkeypatch.setattr(unary, "_POLL_S", 0.01)
    made = UnaryFront(triton, demo_zoo, "secret", 600.0)
    yield made
    triton.gate.set()
    made.close(10)
    assert triton.logged == []


def fill(front, triton) -> list[Request]:
    """Calls of one model that keep its thread busy until the gate is opened, and one that waits."""
    triton.gate.clear()
    calls = [Request(model="base", text_input=f"{i}") for i in range(2)]
    for call in calls:
        front.handle(call)
    wait_for(lambda: len(triton.asked) == 1)
    return calls


def outcome(request: Request) -> tuple[str, str]:
    wait_for(lambda: request.sender.final)
    (response,) = request.sender.sent
    if response.error is not None:
        return response.error.code, response.error.message
    return "ok", response.tensors["text_output"][0, 0].decode()


def test_a_call_gets_the_engines_answer(front, triton):
    request = Request(model="base", text_input="x")
    front.handle(request)
    assert outcome(request) == ("ok", "answer")
    (inner,) = triton.asked
    assert inner.parameters["internal"] == internal_mark("secret")
    assert "secret" not in inner.parameters
    assert 599e6 < inner.parameters["timeout"] <= 600e6


@pytest.mark.parametrize(
    ("said", "code", "message"),
    [
        ("UNAVAILABLE:full", "UNAVAILABLE", "full"),
        ("NOT_FOUND:no model", "NOT_FOUND", "no model"),
        ("INVALID_ARG:top_p: wrong", "INVALID_ARG", "top_p: wrong"),
        ("Stub process: gone", "INVALID_ARG", "Stub process: gone"),
    ],
)
def test_the_status_of_an_error_comes_through(front, triton, said, code, message):
    triton.error = said
    request = Request(model="base", text_input="x")
    front.handle(request)
    assert outcome(request) == (code, message)


def test_an_answer_comes_through_as_text(front, triton):
    """Tensors of an inner response would be made without Python's lock."""
    tensors = {
        "text_output": np.array([["ż: {"]], object),
        "token_ids": np.array([[5, -1]], np.int32),
        "output_log_probs": np.array([[[-0.1, -1e-30, -np.inf]]], np.float32),
        "finish_reason": np.array([["length"]], object),
    }
    for name in ("text_output", "finish_reason"):
        tensors[name][0, 0] = tensors[name][0, 0].encode()
    triton.error = f"OK:{pack(tensors)}"
    request = Request(model="base", text_input="x")
    front.handle(request)
    assert outcome(request) == ("ok", "ż: {")
    (response,) = request.sender.sent
    assert response.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert response.tensors[name].dtype == expected.dtype
        assert np.array_equal(response.tensors[name], expected)


def test_time_runs_while_a_call_waits(front, triton):
    calls = fill(front, triton)
    late = Request(timeout=30_000, model="base", text_input="late")
    front.handle(late)
    assert outcome(late) == ("UNAVAILABLE", "the request took longer than its time limit of 0.03 s")
    triton.gate.set()
    assert [outcome(call) for call in calls] == [("ok", "answer")] * 2
    assert len(triton.asked) == 2


def test_what_has_waited_counts(front, triton):
    fill(front, triton)
    waits = Request({"timeout": 10_000_000}, model="base", text_input="waits")
    front.handle(waits)
    threading.Event().wait(0.05)
    triton.gate.set()
    assert outcome(waits) == ("ok", "answer")
    assert triton.asked[-1].parameters["timeout"] <= 9_950_000


def test_a_call_cancelled_while_it_waits_ends(front, triton):
    fill(front, triton)
    cancelled = Request(model="base", text_input="x")
    front.handle(cancelled)
    cancelled.sender.cancelled = True
    assert outcome(cancelled) == ("UNAVAILABLE", "the request was cancelled")


def test_a_flood_is_refused_and_holds_no_other_model(front, triton, monkeypatch):
    fill(front, triton)
    monkeypatch.setattr(front._queue, "_capacity", 8 << 16)
    flood = [Request(model="base", text_input="x") for _ in range(20)]
    for call in flood:
        front.handle(call)
    refused = [call for call in flood if call.sender.final]
    assert len(refused) == 17
    assert {outcome(call)[0] for call in refused} == {"UNAVAILABLE"}
    other = Request(model="notes", text_input="other")
    front.handle(other)
    wait_for(lambda: len(triton.asked) == 2)  # on the thread that a flood leaves free
    assert triton.asked[-1].inputs[0].as_numpy()[0, 0] == b"notes"


def test_names_that_clients_make_up_share_one_turn(front, triton):
    triton.gate.clear()
    made_up = [Request(model=f"made up {i}", text_input="x") for i in range(4)]
    for call in made_up:
        front.handle(call)
    wait_for(lambda: len(triton.asked) == 1)
    front.handle(Request(model="base", text_input="x"))
    wait_for(lambda: len(triton.asked) == 2)
    assert triton.asked[-1].inputs[0].as_numpy()[0, 0] == b"base"


def test_health_is_answered_while_calls_wait(front, triton):
    fill(front, triton)
    probe = Request(health=True)
    front.handle(probe)
    assert probe.sender.sent[0].tensors["text_output"].tolist() == [[b"ok"]]


def test_calls_that_wait_at_the_end_are_told(triton, demo_zoo, monkeypatch):
    monkeypatch.setattr(unary, "_MAX_CALLS", 2)
    front = UnaryFront(triton, demo_zoo)
    calls = fill(front, triton)
    front.close(0)
    assert outcome(calls[1]) == ("UNAVAILABLE", "the server is shutting down; send the request elsewhere")
    triton.gate.set()
    assert outcome(calls[0]) == ("ok", "answer")
    assert json.dumps(triton.asked[0].parameters) == "{}"
