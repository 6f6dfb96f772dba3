"""The placement's search in a process of its own."""

from __future__ import annotations

import threading
import time
from threading import Event

import pytest
from patience import PATIENCE_S

from blockzoo.runtime.serve import search_apart
from blockzoo.runtime.serve.search_apart import adapt_apart
from blockzoo.zoo.placement import Chain, PlacementError, Span, Task, Worker, adapt


@pytest.fixture(autouse=True)
def _as_busy_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it waits for ever where a machine has other work."""
    monkeypatch.setattr(search_apart, "NICENESS", 0)


def task(spans: int, num_bytes: int = 1) -> Task:
    workers = range(2)
    return Task(
        {str(index): Span(num_bytes, 1e-3) for index in range(spans)},
        {str(index): Chain((str(index),), 50.0 * (index + 1)) for index in range(spans)},
        [Worker(100)] * 2,
        hop_s=[[1e-4 * (a != b) for b in workers] for a in workers],
        byte_s=[[0.0] * 2 for _ in workers],
        copies=False,
    )


def test_the_same_plan_as_in_this_process() -> None:
    routes = {str(index): (0,) for index in range(4)}
    found = adapt_apart(task(4), routes, 0.1, Event())
    assert found == adapt(task(4), routes, 0.1)
    assert {route[0] for route in found.routes.values()} == {0, 1}


def test_where_there_is_no_plan_it_says_so() -> None:
    with pytest.raises(PlacementError, match="workers room for 200"):
        adapt_apart(task(3, 90), {}, 0.1, Event())


def test_a_search_ends_when_it_is_to_stop() -> None:
    stop, start = Event(), time.monotonic()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(PlacementError, match="none was found"):
        adapt_apart(task(300), {}, 0.1, stop)
    assert time.monotonic() - start < PATIENCE_S


def test_a_search_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_apart, "_MODULE", "blockzoo.no_such_module")
    with pytest.raises(PlacementError, match="ended with 1"):
        adapt_apart(task(2), {}, 0.1, Event())
