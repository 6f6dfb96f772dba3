"""Runs the calls of a step, small ones beside the large ones.

A call of a few rows is bound by reading its weights from memory: more threads of its engine hardly help, but
another call beside it does. So the calls that tenants' own spans make for their few rows are run by helper
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

from blockzoo.runtime.exec.calls import Call, CallGraph

_LIBC = ctypes.CDLL(None)


class CallRunner:
    """Runs call graphs, with helper threads for the small calls.

    Args:
        count: calls that may run at once, the caller's among them; 1 runs them in their order.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._threads: list[int] = []
        self._pool = ThreadPoolExecutor(max(1, count - 1), "call", self._note_thread)
        self._processors = os.sched_getaffinity(0)
        self._placed = (-1, 0)

    def run(self, graph: CallGraph, run: Callable[[Call], None]) -> None:
        """Run every call, each once and behind those that it waits for.

        Returns, or raises what one of them raised, when all that were started have ended.
        """
        num_helpers = min(self._count - 1, len(graph.small))
        if num_helpers < 1 or graph.is_chain:
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
