"""The front between Triton and the engine, with a scripted engine and a recording Triton."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE_S, wait_for

from blockzoo.runtime.api.errors import OverloadedError
from blockzoo.runtime.api.request import RequestOutput
from blockzoo.runtime.serve.metrics import Metrics
from blockzoo.runtime.serve.reload import Reloaded
from blockzoo.server_config.front import DRAIN_FILE, EngineFront
from blockzoo.zoo.errors import ManifestError

FINAL = 1
SECRET = "of the launcher"


class RecordingTriton:
    """The parts of triton_python_backend_utils that the front uses."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL

    class TritonError:
        INVALID_ARG, UNAVAILABLE, NOT_FOUND, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "NOT_FOUND", "INTERNAL"

        def __init__(self, message: str, code: str) -> None:
            self.message, self.code = message, code

    class Tensor:
        def __init__(self, name: str, array: np.ndarray) -> None:
            self._name, self._array = name, array

        def name(self) -> str:
            return self._name

        def as_numpy(self) -> np.ndarray:
            return self._array

    class InferenceResponse:
        def __init__(self, tensors: list[Any], error: Any = None) -> None:
            self.error = error
            self.tensors = {tensor.name(): tensor.as_numpy() for tensor in tensors}

    class MetricFamily:
        GAUGE, COUNTER, HISTOGRAM = range(3)

        def __init__(self, **kwargs: Any) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            assert name == "Metric"
            return lambda **kwargs: SimpleNamespace(set=float, increment=float, observe=float)

    def __init__(self) -> None:
        self.logged: list[str] = []
        self.Logger = SimpleNamespace(log_error=self.logged.append)


class Sender:
    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.final = 0
        self.cancelled = False

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.final, "a response after the final flag"
        self.final += flags == FINAL
        if response is not None:
            self.sent.append(response)

    def is_cancelled(self) -> bool:
        assert not self.final, "asked about a request that has ended: Triton may crash"
        return self.cancelled


class Request:
    def __init__(self, parameters: dict[str, Any] | None = None, timeout: int = 0, **values: Any) -> None:
        self.sender = Sender()
        self._timeout = timeout
        self._parameters = json.dumps(parameters or {})
        self._inputs = [RecordingTriton.Tensor(name, _array(value)) for name, value in values.items()]

    def inputs(self) -> list[Any]:
        return self._inputs

    def parameters(self) -> str:
        return self._parameters

    def timeout(self) -> int:
        return self._timeout

    def get_response_sender(self) -> Sender:
        return self.sender


def _array(value: Any) -> np.ndarray:
    if isinstance(value, str):
        return np.array([[value.encode()]], dtype=object)
    return np.array([[value]], np.bool_ if isinstance(value, bool) else np.int32)


class ScriptedEngine:
    """Does what a test tells it, from the test's thread."""

    def __init__(self) -> None:
        self.alive, self.error, self.last_progress = True, None, time.monotonic()
        self.requests: dict[str, Any] = {}
        self.aborted: list[str] = []
        self.refusal: Exception | None = None
        self.end_ids = {"chat": (2,)}
        self.left_out = {"hurt": "blocks/a.safetensors: corrupt"}
        self.max_prompt_bytes = {"chat": 1000}
        self.gate: threading.Event | None = None  # holds whoever submits, as tokenizing does
        self.order: list[str] = []
        self.found: Reloaded | Exception = Reloaded(added=("code",))

    def reload(self) -> Reloaded:
        if isinstance(self.found, Exception):
            raise self.found
        self.end_ids = {"chat": (2,), "code": (2,)}
        return self.found

    def submit(
        self,
        request_id,
        model,
        prompt,
        params,
        on_output,
        scope=None,
        kv_reuse=None,
        documents=(),
        tenant=None,
        weight=None,
    ) -> None:
        self.order.append(prompt)
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_S)
        if self.refusal is not None:
            raise self.refusal
        self.requests[request_id] = SimpleNamespace(
            model=model,
            prompt=prompt,
            params=params,
            on_output=on_output,
            scope=scope,
            kv_reuse=kv_reuse,
            documents=documents,
            tenant=tenant,
            weight=weight,
        )

    def emit(self, text: str, reason=None, error=None) -> None:
        """One more output for every request."""
        for request_id, request in list(self.requests.items()):
            ids = () if reason in ("abort", "error") else (len(text),)
            request.on_output(
                RequestOutput(
                    request_id, request.model, text, ids, None, reason is not None, reason, error, 3, 0, 1
                )
            )
            if reason is not None:
                del self.requests[request_id]

    def abort(self, request_id: str) -> None:
        if request_id in self.requests:
            self.aborted.append(request_id)
            self.emit("", "abort")

    def metrics(self) -> Any:
        values = {each.name: {} if each.type.startswith("Mapping") else 0 for each in fields(Metrics)}
        return SimpleNamespace(**values)

    def drain(self, timeout_s: float) -> bool:
        return not self.requests

    def close(self) -> None:
        self.alive = False
        self.emit("", "abort")


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def triton() -> RecordingTriton:
    return RecordingTriton()


@pytest.fixture
def front(engine: ScriptedEngine, triton: RecordingTriton, tmp_path: Path):
    front = EngineFront(engine, triton, tmp_path, SECRET)
    yield front
    front.close(0)
    assert triton.logged == []


def take(front, engine, *requests) -> None:
    """Hand requests to the front, and wait until the engine has them."""
    before = len(engine.requests)
    for request in requests:
        front.handle(request)
    wait_for(lambda: len(engine.requests) == before + len(requests))


def texts(sender: Sender) -> list[str]:
    return [response.tensors["text_output"][0, 0].decode() for response in sender.sent]


def test_a_stream_gets_every_token_and_one_final_flag(front, engine):
    request = Request(text_input="x", stream=True)
    take(front, engine, request)
    engine.emit("a")
    engine.emit("b")
    engine.emit("c", "length")
    wait_for(lambda: request.sender.final)
    assert texts(request.sender) == ["a", "b", "c"]
    assert request.sender.final == 1


def test_a_refused_request_gets_its_error(front, engine):
    for refusal, code in ((OverloadedError("full"), "UNAVAILABLE"), (RuntimeError("bug"), "INTERNAL")):
        engine.refusal = refusal
        request = Request(text_input="x")
        front.handle(request)
        wait_for(lambda: request.sender.final)  # noqa: B023
        assert request.sender.sent[0].error.code == code
    front._pb.logged.clear()
    bad = Request(text_input="x", model="chta")
    front.handle(bad)
    assert bad.sender.sent[0].error.code == "NOT_FOUND"


def test_a_client_may_be_told_errors_by_outputs(front, engine):
    engine.refusal = OverloadedError("full")
    request = Request(text_input="x", tell_errors=True)
    front.handle(request)
    wait_for(lambda: request.sender.final)
    (response,) = request.sender.sent
    assert response.error is None
    told = {name: array.reshape(-1) for name, array in response.tensors.items()}
    assert (told["error"][0], told["error_status"][0]) == (b"full", b"UNAVAILABLE")


def test_a_cancelled_request_is_aborted_and_ends_without_a_response(front, engine):
    request = Request(text_input="x")
    take(front, engine, request)
    request.sender.cancelled = True
    wait_for(lambda: request.sender.final)
    assert len(engine.aborted) == 1
    assert request.sender.sent == []


def test_a_step_of_an_ensemble_whose_client_has_gone_is_aborted(front, engine):
    step = Request(text_input="x", input_ids=1, stream=True)
    others = [Request(text_input="x", stream=True), Request(input_ids=1, stream=True)]
    take(front, engine, step, *others)
    engine.emit("a")
    wait_for(lambda: all(request.sender.sent for request in (step, *others)))
    (response,) = step.sender.sent
    assert not any("engine_request_id" in other.sender.sent[0].tensors for other in others)
    request_id = response.tensors["engine_request_id"][0, 0].decode()
    front.abandon("0" * 32)
    front.abandon(request_id)
    wait_for(lambda: step.sender.final)
    assert engine.aborted == [request_id]
    assert step.sender.sent == [response]


def test_a_timeout_ends_a_request_with_its_reason(front, engine):
    request = Request(timeout=10_000, text_input="x")
    front.handle(request)
    wait_for(lambda: request.sender.final)
    assert request.sender.sent[0].error.message == "the request took longer than its timeout of 0.01 s"


def test_health_is_answered_while_the_queue_is_long(front, engine):
    take(front, engine, *(Request(text_input="x") for _ in range(5)))
    probe = Request({"secret": SECRET}, health=True, text_input="żółw", max_tokens=7)
    front.handle(probe)
    status = json.loads(texts(probe.sender)[0])
    assert status["unfinished"] == 5
    assert status["echo"]["text_input"] == ["żółw"]
    assert status["echo"]["max_tokens"] == [7]


def test_health_tells_that_the_engine_has_stopped(front, engine):
    engine.error = MemoryError("no memory")
    probe = Request(health=True)
    front.handle(probe)
    assert probe.sender.sent[0].error.message == "the engine has stopped: no memory"


def test_health_tells_that_the_engine_hangs(front, engine, monkeypatch):
    take(front, engine, Request(text_input="x"))
    monkeypatch.setattr("blockzoo.server_config.front._STALL_S", -1.0)
    front._heartbeat = float("inf")
    assert "the engine has made no step" in front._problem()


def test_requests_that_the_engine_drops_at_its_end_are_told_why(front, engine):
    request = Request(text_input="x")
    take(front, engine, request)
    engine.error = ValueError("broken")
    engine.emit("", "abort")
    wait_for(lambda: request.sender.final)
    assert request.sender.sent[0].error.message == "the engine failed: broken"


def test_draining_refuses_new_requests_and_ends_the_last_ones(front, engine, tmp_path):
    running = Request(text_input="x", stream=True)
    take(front, engine, running)
    engine.emit("a")
    (tmp_path / "new").write_text("0.2")
    (tmp_path / "new").rename(tmp_path / DRAIN_FILE)  # the whole file at once, as the launcher does it
    wait_for(lambda: front._drain_deadline is not None)
    late = Request(text_input="x")
    front.handle(late)
    assert late.sender.sent[0].error.code == "UNAVAILABLE"
    wait_for(lambda: running.sender.final)
    assert running.sender.sent[-1].tensors["error"][0, 0] == b"the server is shutting down"


def test_scope_and_reuse_reach_the_engine(front, engine):
    take(front, engine, Request(text_input="x", kv_reuse="off"))
    take(front, engine, Request(text_input="x", kv_scope="team", documents="a text"))
    seen = [(each.scope, each.kv_reuse, each.documents) for each in engine.requests.values()]
    assert seen == [(None, "off", ()), ("team", None, ("a text",))]


def test_a_bug_in_an_answer_ends_that_request_alone(front, engine, triton, monkeypatch):
    broken, sound = Request(text_input="x", stream=True), Request(text_input="x", stream=True)
    take(front, engine, broken)
    stream = next(iter(front._streams.values()))
    take(front, engine, sound)
    monkeypatch.setattr(stream, "answer", None)
    engine.emit("a")
    engine.emit("b", "stop")
    wait_for(lambda: sound.sender.final and broken.sender.final)
    assert texts(sound.sender) == ["a", "b"]
    assert broken.sender.sent[0].error.code == "INTERNAL"
    assert "Traceback" in triton.logged.pop()


def test_a_reload_brings_in_models(front, engine, triton):
    early = Request(text_input="hi", model="code")
    front.handle(early)
    assert "no model 'code'" in early.sender.sent[0].error.message
    reload = Request({"secret": SECRET}, reload=True)
    front.handle(reload)
    wait_for(lambda: reload.sender.final)
    said = json.loads(reload.sender.sent[0].tensors["text_output"].flat[0])
    assert (said["added"], said["serving"]) == (["code"], ["chat", "code"])
    take(front, engine, Request(text_input="hi", model="code"))
    assert [request.model for request in engine.requests.values()] == ["code"]
    engine.emit("x", "stop")


def test_a_reload_that_fails_is_told(front, engine, triton):
    engine.found = ManifestError("manifest.json: not JSON")
    reload = Request({"secret": SECRET}, reload=True)
    front.handle(reload)
    wait_for(lambda: reload.sender.final)
    assert reload.sender.sent[0].error.message == "the zoo was not reloaded: manifest.json: not JSON"
    assert len(triton.logged) == 1
    triton.logged.clear()


# ---- what waits to be tokenized


def hold(front, engine, *requests) -> None:
    """Keep the model's thread of the queue busy until `engine.gate` is set, with requests in wait."""
    engine.gate = threading.Event()
    before = len(engine.order)
    front.handle(Request(text_input="busy"))
    wait_for(lambda: len(engine.order) == before + 1)
    for request in requests:
        front.handle(request)


def test_health_is_answered_while_texts_are_tokenized(front, engine):
    hold(front, engine, *(Request(text_input="x") for _ in range(20)))
    probe = Request({"secret": SECRET}, health=True)
    front.handle(probe)
    assert json.loads(texts(probe.sender)[0])["unfinished"] == 21
    engine.gate.set()


def test_short_texts_do_not_wait_for_long_ones(front, engine):
    engine.max_prompt_bytes = {"chat": 1 << 20}
    front._learn_models()
    engine.gate = threading.Event()
    for _ in range(3):
        front.handle(Request(text_input="long " * 20_000))
    short = Request(text_input="short")
    front.handle(short)
    wait_for(lambda: len(engine.order) == 2)
    assert "short" in engine.order  # and the first long one
    engine.gate.set()


def test_requests_given_up_while_they_wait_never_reach_the_engine(front, engine):
    late, cancelled = Request(timeout=10_000, text_input="late"), Request(text_input="cancelled")
    hold(front, engine, late, cancelled)
    cancelled.sender.cancelled = True
    wait_for(lambda: late.sender.final and cancelled.sender.final)
    assert late.sender.sent[0].error.message == "the request took longer than its timeout of 0.01 s"
    assert cancelled.sender.sent == []
    engine.gate.set()
    wait_for(lambda: len(engine.requests) == 1)
    assert front._short.drain(PATIENCE_S)
    assert engine.order == ["busy"]


def test_a_request_given_up_while_it_is_tokenized_is_aborted_there(front, engine):
    engine.gate = threading.Event()
    request = Request(timeout=10_000, text_input="x")
    front.handle(request)
    wait_for(lambda: request.sender.final)
    assert engine.order == ["x"]
    engine.gate.set()
    wait_for(lambda: engine.aborted)
    assert (request.sender.final, len(request.sender.sent), engine.requests) == (1, 1, {})


def test_a_request_that_no_model_can_take_is_refused_unread(front, engine, monkeypatch):
    monkeypatch.setattr("blockzoo.server_config.front.parse_request", None)
    request = Request(text_input="x" * ((2 << 20) + 1001))
    front.handle(request)
    error = request.sender.sent[0].error
    assert error.code == "INVALID_ARG"
    assert "the request has 2098153 bytes; no model here takes more than 2098152" in error.message


# ---- whatever dies, each request ends once


class PanicException(BaseException):
    """What the tokenizers library raises is no Exception either."""


def test_a_tokenizer_that_panics_ends_its_request_alone(front, engine, triton):
    engine.refusal = PanicException("index out of bounds")
    broken = Request(text_input="x")
    front.handle(broken)
    wait_for(lambda: broken.sender.final)
    assert broken.sender.sent[0].error.code == "INTERNAL"
    assert "index out of bounds" in triton.logged.pop()
    engine.refusal = None
    take(front, engine, Request(text_input="y"))


def test_a_front_thread_that_dies_ends_every_request(engine, triton, tmp_path, monkeypatch):
    front = EngineFront(engine, triton, tmp_path)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    running, waiting = Request(text_input="x", stream=True), Request(text_input="y")
    take(front, engine, running)
    hold(front, engine, waiting)
    monkeypatch.setattr(front, "_deliver", lambda *args: (_ for _ in ()).throw(SystemExit(1)))
    for request in engine.requests.values():
        request.on_output(None)
    wait_for(lambda: running.sender.final and waiting.sender.final)
    assert running.sender.sent[-1].error.message == "the server failed: it starts again"
    front._thread.join(PATIENCE_S)
    late, probe = Request(text_input="z"), Request(health=True)
    front.handle(late)
    assert (late.sender.final, late.sender.sent[0].error.code) == (1, "UNAVAILABLE")
    front.handle(probe)
    assert probe.sender.sent[0].error.message == "the thread that sends responses has stopped"
    engine.gate.set()
    front.close(0)


# ---- what is the launcher's


@pytest.mark.parametrize(
    "parameters",
    [{}, {"secret": "guess"}, {"secret": ""}, {"secret": 5}, {"secret": "\ud800"}],
)
def test_a_reload_is_not_for_clients(front, engine, parameters):
    request = Request(parameters, reload=True)
    front.handle(request)
    assert request.sender.sent[0].error.code == "INVALID_ARG"
    assert "reload is not for clients" in request.sender.sent[0].error.message
    assert "code" not in engine.end_ids
    probe = Request(parameters, health=True, text_input="x")
    front.handle(probe)
    assert texts(probe.sender) == ["ok"]


@pytest.mark.parametrize("said", [{"tenant": "key:alice"}, {"weight": "9"}, {"tenant": "a", "weight": "9"}])
@pytest.mark.parametrize("secret", [{}, {"secret": "guess"}, {"secret": ""}, {"secret": 5}])
def test_clients_do_not_say_whose_share_they_take(front, engine, said, secret):
    request = Request({**said, **secret}, model="chat", text_input="x")
    front.handle(request)
    assert request.sender.sent[0].error.code == "INVALID_ARG"
    assert "tenant and weight are not for clients" in request.sender.sent[0].error.message
    assert not engine.requests


def test_who_knows_the_secret_says_whose_share_a_request_takes(front, engine):
    told = {"secret": SECRET, "tenant": "key:alice", "weight": "2.5"}
    front.handle(Request(told, model="chat", text_input="x"))
    front.handle(Request({}, model="chat", text_input="x"))
    wait_for(lambda: len(engine.requests) == 2)
    assert {(r.tenant, r.weight) for r in engine.requests.values()} == {("key:alice", 2.5), (None, None)}


def test_without_a_secret_nobody_is_the_launcher(engine, triton):
    front = EngineFront(engine, triton)
    for given in ("", "None", SECRET):
        request = Request({"secret": given}, reload=True)
        front.handle(request)
        assert "reload is not for clients" in request.sender.sent[0].error.message
    front.close(0)
