"""Where an engine's state may be changed: one thread at a time, and for others than the engine's between two
of its steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_POLL_S = 0.01


class BetweenSteps:
    """A lock that is handed over: an engine that steps all the time would hardly ever leave it to another
    thread, so it does the other's work itself before its next step."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock; first what others wait for is done."""
        with self._lock:
            self._catch_up()
            yield

    def run(self, work: Callable[[], T]) -> T:
        """Do something while no step runs, here or in the thread that steps: its result, or error."""
        done: Future[T] = Future()
        self._work.append((done, work))
        while not done.done():
            if self._lock.acquire(timeout=_POLL_S):
                try:
                    self._catch_up()
                finally:
                    self._lock.release()
        return done.result()

    def _catch_up(self) -> None:
        while self._work:
            done, work = self._work.popleft()
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
