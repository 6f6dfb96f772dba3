"""The text steps beside a recording Triton: what they answer, refuse, and keep waiting."""

from __future__ import annotations

import importlib.util
import json
import queue
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from patience import PATIENCE_S, wait_for

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.server_config.abandoned import AbandonedListener, AbandonedTeller
from blockzoo.server_config.text_steps import Postprocessor, Preprocessor, Tokenizers

_path = Path(__file__).with_name("test_front.py")
_spec = importlib.util.spec_from_file_location("recording_triton", _path)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
RecordingTriton, Request = _module.RecordingTriton, _module.Request


@pytest.fixture
def triton():
    return RecordingTriton()


@pytest.fixture
def tokenizers(demo_zoo):
    return Tokenizers(str(demo_zoo))


@pytest.fixture
def step(tokenizers, triton):
    made = Preprocessor(tokenizers, triton)
    yield made
    made.close(0)
    assert triton.logged == []


def text_of(model: str, text: str, **options) -> Request:
    return Request(**options, **{f"text_input@{model}": text})


def refusal(step, request) -> str:
    step.handle(request)
    wait_for(lambda: request.sender.final)
    return request.sender.sent[0].error.message


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_what_long_texts_took_is_given_back(step):
    """Each thread that tokenizes them would keep up to 32 MB."""

    def tokenize(count: int) -> None:
        request = text_of("base", "word " * count)
        step.handle(request)
        wait_for(lambda: request.sender.final)

    tokenize(50_000)
    before = private_bytes()
    for i in range(8):
        tokenize(30_000 + 2_500 * i)
        wait_for(lambda: private_bytes() < before + (8 << 20))


def test_a_text_becomes_tokens(step, tokenizers):
    request = text_of("base", "def f(x):")
    step.handle(request)
    wait_for(lambda: request.sender.final)
    (response,) = request.sender.sent
    expected = tokenizers["base"].tokenizer.encode("def f(x):")
    assert response.tensors["input_ids"].tolist() == [expected]
    assert response.tensors["model"].tolist() == [[b"base"]]


def test_bad_requests_are_refused(step):
    assert "no model 'bose'; did you mean 'base'?" in refusal(step, text_of("bose", "x"))
    assert "text_input is empty" in refusal(step, text_of("base", ""))
    assert "0 were sent" in refusal(step, Request())
    two = Request(**{"text_input@base": "x", "text_input@notes": "x"})
    assert "2 were sent" in refusal(step, two)


def test_a_text_that_cannot_fit_is_not_tokenized(step, tokenizers, monkeypatch):
    served = tokenizers["base"]
    limit = 4 * served.tokenizer.longest_token * served.max_tokens
    monkeypatch.setattr("blockzoo.server_config.schema.MAX_TEXT_BYTES", limit + 1)
    monkeypatch.setattr(Tokenizer, "encode", lambda *args: pytest.fail("it was tokenized"))
    said = refusal(step, text_of("base", "x" * (limit + 1)))
    assert f"over {limit} bytes; the model takes at most {served.max_tokens} tokens" in said


def test_health_is_answered_and_time_runs_while_texts_wait(step, monkeypatch):
    gate, seen, real = threading.Event(), [], Tokenizer.encode

    def slow(self, text, *args):
        seen.append(text)
        assert gate.wait(PATIENCE_S)
        return real(self, text, *args)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    busy = [text_of("base", f"busy {i}") for i in range(2)]
    for request in busy:
        step.handle(request)
    wait_for(lambda: len(seen) == 1)
    late = text_of("base", "late", timeout=1)
    step.handle(late)
    probe = Request(health=True)
    step.handle(probe)
    assert (probe.sender.final, probe.sender.sent[0].error) == (1, None)
    gate.set()
    wait_for(lambda: late.sender.final)
    assert late.sender.sent[0].error.message == "the request took longer than its timeout"
    wait_for(lambda: all(request.sender.final for request in busy))
    assert "late" not in seen


def test_a_tokenizer_that_panics_ends_its_request_alone(step, triton, monkeypatch):
    class PanicException(BaseException):
        """As of pyo3."""

    def panic(*args):
        raise PanicException("index out of bounds")

    with monkeypatch.context() as broken:
        broken.setattr(Tokenizer, "encode", panic)
        assert refusal(step, text_of("base", "x")) == "internal error: index out of bounds"
    assert "PanicException" in triton.logged.pop()
    request = text_of("base", "x")
    step.handle(request)
    wait_for(lambda: request.sender.final)
    assert request.sender.sent[0].error is None


def test_tokens_become_text_within_bounds(tokenizers, triton, monkeypatch):
    step = Postprocessor(tokenizers, triton, lambda request_id: None)
    ids = tokenizers["base"].tokenizer.encode("x = 1")

    def respond(**values):
        return step.respond(Request(**values))

    assert respond(text="as it is").tensors["text_output"].tolist() == [[b"as it is"]]
    assert respond(health=True).error is None
    request = Request(model="base")
    request._inputs.append(RecordingTriton.Tensor("token_ids", np.array([ids], np.int32)))
    assert step.respond(request).tensors["text_output"].tolist() == [[b"x = 1"]]
    count = tokenizers["base"].max_tokens + 1
    request._inputs[-1] = RecordingTriton.Tensor("token_ids", np.zeros((1, count), np.int32))
    assert f"token_ids has {count} tokens; expected at most" in step.respond(request).error.message
    assert "send token_ids and model, or text" in respond().error.message


def test_streams_whose_client_has_gone_are_told(tokenizers, triton, tmp_path):
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    folder = tmp_path / ("x" * 100)  # longer than names of sockets may be
    folder.mkdir()
    AbandonedListener(folder, told.put)
    step = Postprocessor(tokenizers, triton, AbandonedTeller(str(folder)).tell)

    def token(request_id: str, cancelled: bool = False) -> None:
        request = Request(text="a", engine_request_id=request_id)
        request.is_cancelled = lambda: cancelled
        assert step.respond(request).tensors["text_output"].tolist() == [[b"a"]]

    token("one")
    token("two", cancelled=True)
    assert told.get(timeout=PATIENCE_S) == "two"
    assert told.empty()
    nobody = Postprocessor(tokenizers, triton, AbandonedTeller(None).tell)
    nobody._look_at_client(SimpleNamespace(is_cancelled=lambda: True), b"three")

    def told_later() -> bool:  # a stream is looked at again, not at every token
        token("one", cancelled=True)
        return not told.empty()

    wait_for(told_later)
    assert told.get() == "one"


def test_lengths_are_no_less_than_the_engine_takes(demo_zoo):
    from blockzoo.runtime import EngineConfig, LLMEngine

    engine = LLMEngine(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=64 << 20, max_model_len=100))
    served = Tokenizers(str(demo_zoo), 100)
    for model in engine.models:
        assert served[model].max_tokens >= engine.max_model_len(model)
    assert Tokenizers(str(demo_zoo), 10**6)["base"].max_tokens == Tokenizers(str(demo_zoo))["base"].max_tokens


def test_a_damaged_tokenizer_concerns_its_models_alone(demo_zoo, tmp_path):
    zoo = shutil.copytree(demo_zoo, tmp_path / "zoo")
    manifest = json.loads((zoo / "manifest.json").read_text())
    manifest["models"]["notes"]["tokenizer"] = "0" * 64
    (zoo / "manifest.json").write_text(json.dumps(manifest))
    tokenizers = Tokenizers(str(zoo))
    assert tokenizers["base"].tokenizer.encode("x")
    with pytest.raises(InvalidRequestError, match=r"model 'notes' is left out: tokenizers/0000.* is missing"):
        tokenizers["notes"]
