"""Calls of engines, and which of a step run at the same time.

A call of a few rows is bound by reading its weights from memory: more threads of its engine hardly help, but
another call beside it does. So the calls that tenants' own spans make for their few rows are run by *lanes*,
threads that take whatever can run next, while the caller's own thread runs those of many rows, whose engines
use all processors, but not all the time.
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
"""Up to so many rows cost as much as one: what a lane may run."""


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

    @property
    def is_small(self) -> bool:
        """Whether a lane may run it; calls whose rows are not neighbours share the step's scratch."""
        return self.num_rows <= FEW_ROWS and not self.copies_in and not self.copies_out


class CallGraph:
    """The calls of a step and what each must wait for: the last ones before it of its engine and its rows.

    Args:
        calls: in an order in which they could run one after the other.
        weights: by span, how long it takes, in any unit.
    """

    def __init__(self, calls: Sequence[Call], weights: Sequence[int]) -> None:
        self.calls = list(calls)
        self.waits_for: list[set[int]] = []
        last: dict[tuple[str, int], int] = {}  # call of an engine, and of a group's rows
        for index, call in enumerate(calls):
            used = [("span", call.span), *(("group", group) for group in call.groups)]
            self.waits_for.append({last[key] for key in used if key in last})
            last.update(dict.fromkeys(used, index))
        longest_first = sorted(range(len(calls)), key=lambda i: -weights[calls[i].span])
        self.small = [i for i in longest_first if calls[i].is_small]
        self.large = [i for i, call in enumerate(calls) if not call.is_small]
        self.is_chain = all(i - 1 in self.waits_for[i] for i in range(1, len(calls)))


class Lanes:
    """Threads that run small calls beside the caller.

    Args:
        count: calls that may run at once, the caller's among them; 1 runs them in their order.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._threads: list[int] = []
        self._pool = ThreadPoolExecutor(max(1, count - 1), "lane", self._note_thread)
        self._processors = os.sched_getaffinity(0)
        self._placed = (-1, 0)

    def run(self, graph: CallGraph, run: Callable[[Call], None]) -> None:
        """Run every call, each once and behind those that it waits for.

        Returns, or raises what one of them raised, when all that were started have ended.
        """
        num_helpers = 0 if graph.is_chain else min(self._count - 1, len(graph.small))
        if num_helpers < 1:
            for call in graph.calls:
                run(call)
            return
        self._make_way()
        work = _Work(graph, run)
        helpers = [self._pool.submit(work.take_part, graph.small) for _ in range(num_helpers)]
        try:
            work.take_part([*graph.large, *graph.small])
        finally:
            failures = [helper.exception() for helper in helpers]  # waits
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


class _Work:
    """A graph that runs: several threads take part."""

    def __init__(self, graph: CallGraph, run: Callable[[Call], None]) -> None:
        self._graph, self._run = graph, run
        self._open = set(range(len(graph.calls)))  # not started
        self._done: set[int] = set()
        self._failed = False
        self._changed = threading.Condition()

    def take_part(self, wanted: Sequence[int]) -> None:
        """Run calls of those wanted, the first that can run first, until all of them are started."""
        while (index := self._next(wanted)) is not None:
            try:
                self._run(self._graph.calls[index])
            except BaseException:
                with self._changed:
                    self._failed = True
                    self._changed.notify_all()
                raise
            with self._changed:
                self._done.add(index)
                self._changed.notify_all()

    def _next(self, wanted: Sequence[int]) -> int | None:
        """One that nobody has started, as soon as there is one that can run."""
        with self._changed:
            while not self._failed and not self._open.isdisjoint(wanted):
                for index in wanted:
                    if index in self._open and self._graph.waits_for[index] <= self._done:
                        self._open.remove(index)
                        return index
                self._changed.wait()
            return None
