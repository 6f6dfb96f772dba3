"""An engine that dies, wherever: every submitted request gets exactly one last output, nobody waits on."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockzoo.runtime import EngineConfig, EngineThread, RequestOutput, SamplingParams
from blockzoo.runtime.api.errors import RequestError

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

CONFIG = EngineConfig(precision="f32", kv_cache_bytes=16 << 20, max_num_seqs=4)
SHORT = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
WAIT_S = 30


class BoomError(RuntimeError):
    pass


class Receiver:
    """Counts last outputs; can hold the engine's thread in its first callback."""

    def __init__(self) -> None:
        self.finals: Counter[str] = Counter()
        self.errors: dict[str, str | None] = {}
        self.held, self.gate = threading.Event(), threading.Event()
        self._changed = threading.Condition()

    def __call__(self, output: RequestOutput) -> None:
        with self._changed:
            self.finals[output.request_id] += output.finished
            if output.finished:
                self.errors[output.request_id] = output.error
            self._changed.notify_all()

    def hold(self, output: RequestOutput) -> None:
        self(output)
        self.held.set()
        assert self.gate.wait(WAIT_S)

    def wait(self, *request_ids: str) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: all(self.finals[i] for i in request_ids), WAIT_S)


@pytest.fixture
def thread(demo_zoo: Path):
    made = EngineThread(demo_zoo, CONFIG)
    yield made
    made.close()


def raising(real: Callable[..., Any], *, after: bool = False, from_call: int = 1) -> Callable[..., Any]:
    """The method, until a call that raises; `after`: once it has done its work."""
    calls = 0

    def method(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < from_call:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise BoomError("broken here")

    return method


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("step", {}),
        ("step", {"after": True}),  # with it the outputs of requests that the engine has forgotten
        ("enqueue", {}),
        ("enqueue", {"from_call": 3}),
        ("enqueue", {"after": True}),
        ("has_unfinished", {}),
        ("check_integrity", {}),
        ("abort", {}),
        ("abort", {"after": True}),
    ],
)
def test_wherever_the_engine_dies_every_request_ends_once(thread, monkeypatch, method, how):
    receiver = Receiver()
    thread.submit("held", "base", "def f", LONG, receiver.hold)
    assert receiver.held.wait(WAIT_S)
    for i in range(4):  # they come in together, once the engine's thread is let go
        thread.submit(f"new-{i}", "base", f"def f{i}", SHORT, receiver)
    for request_id in ("held", "new-3"):
        thread.abort(request_id)
    monkeypatch.setattr(thread.engine, method, raising(getattr(thread.engine, method), **how))
    receiver.gate.set()
    everybody = ("held", "new-0", "new-1", "new-2", "new-3")
    assert receiver.wait(*everybody)
    thread._thread.join(WAIT_S)
    assert not thread.alive
    assert receiver.finals == dict.fromkeys(everybody, 1)
    assert thread.drain(0)
    assert isinstance(thread.error, BoomError)
    with pytest.raises(RequestError, match="the engine has stopped: broken here"):
        thread.submit("late", "base", "x", SHORT, receiver)
    with pytest.raises(RequestError, match="the engine has stopped: broken here"):
        thread.publish("late", "a document")


def test_answers_come_before_what_a_check_finds(thread, monkeypatch):
    receiver = Receiver()
    monkeypatch.setattr(thread.engine, "check_integrity", raising(None))
    thread.submit("r", "base", "def f", SHORT, receiver)
    assert receiver.wait("r")
    thread._thread.join(WAIT_S)
    assert isinstance(thread.error, BoomError)
    assert receiver.errors == {"r": None}


@pytest.mark.parametrize("abort_breaks", [False, True])
@pytest.mark.parametrize("error", [OSError("client is gone"), SystemExit(1)])
def test_a_callback_that_raises_gets_one_last_output(thread, monkeypatch, error, abort_breaks):
    receiver = Receiver()

    def broken(output: RequestOutput) -> None:
        receiver(output)
        raise error

    if abort_breaks:
        monkeypatch.setattr(thread.engine, "abort", raising(thread.engine.abort))
    thread.submit("other", "base", "def g", LONG, receiver.hold)
    assert receiver.held.wait(WAIT_S)
    thread.submit("broken", "base", "def f", SHORT, broken)
    receiver.gate.set()
    assert receiver.wait("broken", "other")
    assert receiver.finals == {"broken": 1, "other": 1}
    survives = isinstance(error, OSError) and not abort_breaks
    assert (receiver.errors["other"] is None) == survives
    if not survives:
        thread._thread.join(WAIT_S)
        assert not thread.alive


def test_a_callback_that_raises_on_its_last_output_had_it(thread):
    receiver = Receiver()

    def broken(output: RequestOutput) -> None:
        receiver(output)
        if output.finished:
            raise SystemExit(1)

    thread.submit("r", "base", "def f", SHORT, broken)
    thread._thread.join(WAIT_S)
    assert not thread.alive
    assert receiver.finals == {"r": 1}


def test_who_waits_for_a_document_is_told_that_the_engine_died(thread, monkeypatch):
    receiver, said = Receiver(), []

    def publish() -> None:
        try:
            thread.publish("doc", "a document")
        except RequestError as error:
            said.append(str(error))

    thread.submit("held", "base", "def f", LONG, receiver.hold)
    assert receiver.held.wait(WAIT_S)
    waiting = threading.Thread(target=publish)
    waiting.start()
    while not thread._publications:
        pass
    monkeypatch.setattr(thread.engine, "rest", raising(None))  # dies before it looks into the inbox
    receiver.gate.set()
    waiting.join(WAIT_S)
    assert said == ["the engine has stopped: broken here"]


def test_requests_that_come_while_the_engine_dies_are_refused_or_ended(thread, monkeypatch):
    receiver, accepted, lock = Receiver(), [], threading.Lock()

    def submit(caller: int) -> None:
        for i in range(1000):
            request_id = f"{caller}-{i}"
            try:
                thread.submit(request_id, "base", "x", SHORT, receiver)
            except RequestError as error:
                if "stopped" in str(error):
                    return
                continue  # the queue is full
            with lock:
                accepted.append(request_id)

    monkeypatch.setattr(thread.engine, "step", raising(thread.engine.step, from_call=20, after=True))
    callers = [threading.Thread(target=submit, args=(caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT_S)
    assert accepted
    assert receiver.wait(*accepted)
    assert receiver.finals == dict.fromkeys(accepted, 1)
