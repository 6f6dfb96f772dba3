"""Whose turn it is, and who is refused."""

from __future__ import annotations

import threading

import pytest
from patience import PATIENCE_S, wait_for

from blockzoo.runtime.api.errors import OverloadedError
from blockzoo.server_config.fair_queue import FairQueue

PLACE = 1 << 16  # the least that a piece of work costs


class Held:
    """A queue whose only thread is busy until `release`, and the order of what it did then."""

    def __init__(self, places: int = 100) -> None:
        self.queue = FairQueue("test", 1, places * PLACE)
        self.done: list[str] = []
        self.gate = threading.Event()
        started = threading.Event()
        self.queue.put("held", None, 0, lambda: (started.set(), self.gate.wait(PATIENCE_S)))
        assert started.wait(PATIENCE_S)

    def put(self, model: str, scope: str | None, label: str, cost: int = 1) -> None:
        self.queue.put(model, scope, cost, lambda: self.done.append(label))

    def release(self) -> list[str]:
        self.gate.set()
        assert self.queue.drain(PATIENCE_S)
        return self.done


@pytest.fixture
def held():
    made = Held()
    yield made
    made.gate.set()
    made.queue.close()


def test_a_flood_of_one_model_takes_turns_with_the_others(held):
    for i in range(10):
        held.put("flood", None, f"f{i}")
    for label in ("a0", "a1"):
        held.put("a", None, label)
    held.put("b", None, "b0")
    assert held.release() == ["f0", "a0", "b0", "f1", "a1", *(f"f{i}" for i in range(2, 10))]


def test_many_scopes_give_a_model_no_more_turns(held):
    for i in range(4):
        held.put("many", f"scope {i}", f"m{i}")
    for label in ("m4", "m5"):
        held.put("many", "scope 0", label)
    held.put("a", None, "a0")
    held.put("a", None, "a1")
    assert held.release() == ["m0", "a0", "m1", "a1", "m2", "m3", "m4", "m5"]


def test_a_flood_leaves_room_for_a_newcomer():
    held = Held(places=16)
    for label in range(8):
        held.put("flood", str(label), str(label))
    with pytest.raises(OverloadedError, match="too many requests to flood wait"):
        held.put("flood", "yet another", "x")
    for label in range(4):
        held.put("second", None, str(label))
    with pytest.raises(OverloadedError):
        held.put("second", None, "x")
    held.put("third", None, "0")
    assert len(held.release()) == 13
    held.put("flood", None, "again")  # what is done gives its room back


def test_a_flood_leaves_threads_to_a_newcomer():
    queue, gate, running, lock = FairQueue("test", 8, 100 * PLACE), threading.Event(), [], threading.Lock()

    def work(label: str) -> None:
        with lock:
            running.append(label)
        assert gate.wait(PATIENCE_S)

    for _ in range(20):
        queue.put("flood", None, 1, lambda: work("flood"))
    wait_for(lambda: len(running) == 4)
    for _ in range(5):
        queue.put("second", None, 1, lambda: work("second"))
    wait_for(lambda: len(running) == 6)
    queue.put("third", None, 1, lambda: work("third"))
    wait_for(lambda: len(running) == 7)
    assert sorted(running) == ["flood"] * 4 + ["second"] * 2 + ["third"]
    gate.set()
    assert queue.drain(PATIENCE_S)
    assert len(running) == 26
    queue.close()


def test_work_larger_than_the_queue_is_taken_alone(held):
    held.put("a", None, "huge", cost=1000 * PLACE)
    with pytest.raises(OverloadedError):
        held.put("b", None, "small")
    assert held.release() == ["huge"]


def test_a_closed_queue_forgets_what_waits_and_takes_nothing(held):
    held.put("a", None, "never")
    held.queue.close()
    with pytest.raises(OverloadedError, match="shutting down"):
        held.put("a", None, "late")
    assert held.release() == []
    wait_for(lambda: not any(thread.is_alive() for thread in held.queue._threads))


def test_drain_tells_that_time_ran_out(held):
    assert not held.queue.drain(0.01)
