"""Calls of engines, and which of a step run at the same time.

A call of a few rows is bound by reading its weights from memory, where more threads of one engine hardly
help. So calls of several tenants' own spans run side by side, in *lanes*: threads that each run calls one
after the other. A *stage* is what runs between two waits. Calls of many rows, which use all threads, have
stages of their own.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from blockzoo.engines.arrays import Array

_LIBC = ctypes.CDLL(None)

FEW_ROWS = 4
"""Up to so many rows cost as much as one; an engine with more of them is left all threads."""


class Passed(NamedTuple):
    """Hidden states after a call that somebody keeps: rows of sequence `seq` that enter span use `entry`."""

    seq: int
    entry: int
    rows: Array


@dataclass(slots=True, eq=False)
class Call:
    """One engine run. Before it, `copies_in` fill its private arrays; after it, `copies_out`."""

    span: int
    first_layer: int
    num_rows: int
    binds: dict[str, Array]
    position: int = 0  # of the span's first block in the chains
    parts: tuple[tuple[int, int], ...] = ()  # (chain, number of rows) of each group, in the rows' order
    groups: tuple[int, ...] = ()  # the first sequence of each
    scored: tuple[int, ...] = ()  # the sequences that its engine gives scores of, in their order
    copies_in: list[tuple[Array, Array]] = field(default_factory=list)  # (destination, source)
    copies_out: list[tuple[Array, Array]] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)


Stage = list[list[Call]]
"""Calls that do not depend on each other, by lane."""


def make_stages(calls: Sequence[Call], weights: Sequence[int], num_lanes: int) -> list[Stage]:
    """Calls (each after those that it depends on) in stages, each calls behind all that they depend on.

    Args:
        calls: of a step. One depends on the earlier ones that share a group of sequences with it.
        weights: by span, how long it takes, in any unit.
        num_lanes: calls that may run at once; 1 keeps the order.
    """
    if num_lanes == 1:
        return [[[call]] for call in calls]
    stages: list[Stage] = []
    waiting = list(calls)
    while waiting:
        ready = _ready(waiting)
        together = [call for call in ready if _is_small(call)]
        # small ones wait until nothing else can run: then most of them can
        if len(together) == len(ready):
            chosen = list({call.span: call for call in reversed(together)}.values())  # an engine runs once
        else:
            chosen = [next(call for call in ready if not _is_small(call))]
        stages.append(_in_lanes(chosen, weights, num_lanes))
        waiting = [call for call in waiting if call not in chosen]
    return stages


def _ready(waiting: Sequence[Call]) -> list[Call]:
    found, blocked = [], set[int]()
    for call in waiting:
        if blocked.isdisjoint(call.groups):
            found.append(call)
        blocked.update(call.groups)
    return found


def _is_small(call: Call) -> bool:
    # calls whose rows are not neighbours share the step's scratch
    return call.num_rows <= FEW_ROWS and not call.copies_in and not call.copies_out


def _in_lanes(calls: Sequence[Call], weights: Sequence[int], num_lanes: int) -> Stage:
    """The longest first, each to the lane that is free first."""
    lanes: Stage = [[] for _ in range(min(num_lanes, len(calls)))]
    for call in sorted(calls, key=lambda call: -weights[call.span]):
        min(lanes, key=lambda lane: sum(weights[other.span] for other in lane)).append(call)
    return lanes


class Lanes:
    """Threads that run the lanes of a stage; the caller's runs the first.

    Args:
        count: of lanes.
    """

    def __init__(self, count: int) -> None:
        self._threads: list[int] = []
        self._pool = ThreadPoolExecutor(max(1, count - 1), "lane", self._note_thread)
        self._processors = os.sched_getaffinity(0)
        self._placed = (-1, 0)

    def run(self, stage: Stage, run: Callable[[Call], None]) -> None:
        """Run every call of a stage; returns, or raises what one of them raised, when all have ended."""
        first, *others = stage
        if others:
            self._make_way()
        started = [self._pool.submit(_run_all, lane, run) for lane in others]
        try:
            _run_all(first, run)
        finally:
            failures = [lane.exception() for lane in started]  # waits
        for failure in failures:
            if failure is not None:
                raise failure

    def _note_thread(self) -> None:
        self._threads.append(threading.get_native_id())

    def _make_way(self) -> None:
        """Keep the threads off the caller's processor: while engines' threads that look for work occupy the
        others, one that wakes up there would wait until the caller is done."""
        here = _LIBC.sched_getcpu()
        if self._placed != (here, len(self._threads)):
            self._placed = (here, len(self._threads))
            for thread in self._threads:
                with suppress(OSError):  # where it is not allowed, it is slower
                    os.sched_setaffinity(thread, self._processors - {here} or self._processors)


def _run_all(lane: Sequence[Call], run: Callable[[Call], None]) -> None:
    for call in lane:
        run(call)
