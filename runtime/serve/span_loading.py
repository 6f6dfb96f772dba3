"""Workers that get spans ready, while steps go on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import TypeVar

from blockzoo.runtime.exec.interface import KVLostError
from blockzoo.runtime.serve.between_steps import BetweenSteps
from blockzoo.runtime.serve.loaded import LoadedZoo
from blockzoo.runtime.serve.over_workers import Workers
from blockzoo.runtime.workers.processes import UnloadableError

T = TypeVar("T")
_LOOK_EVERY_S = 0.05
_MOST_LOADING_S = 600.0


class MoveError(RuntimeError):
    """Spans stay where they are; why."""


class SpanLoading:
    """Spans that workers get ready.

    Args:
        between: where the engine's state may be changed.
        zoo: what is loaded now.
        stop: nothing is to change any more.
        workers: of what was loaded when this began.
        homes: by index, the worker that gets it.
        originals: by index, the span that it is or will be a copy of.
    """

    def __init__(
        self,
        between: BetweenSteps,
        zoo: Callable[[], LoadedZoo],
        stop: Event,
        workers: Workers,
        homes: Mapping[int, int],
        originals: Sequence[int],
    ) -> None:
        self._between, self._zoo, self._stop, self._workers = between, zoo, stop, workers
        self._restarts = workers.group.num_restarts
        self._targets: dict[int, dict[int, int]] = defaultdict(dict)
        for span, worker in homes.items():
            self._targets[worker][span] = originals[span]

    def check(self) -> None:
        """Raise MoveError where it is not what it was when this began."""
        if self._zoo().workers is not self._workers:
            raise MoveError("the zoo has changed meanwhile, and other workers serve it")
        if self._workers.group.num_restarts != self._restarts:
            raise MoveError("a worker was lost meanwhile, and started again")
        if self._stop.is_set():
            raise MoveError("the engine is closed")

    def once_loaded(self, go_over: Callable[[float], T]) -> T:
        """Have workers load, and go over; `go_over` is told how long it took. Raises MoveError."""
        start = time.monotonic()
        try:
            self._between.run(self._begin)
            while not self._between.run(self._has_loaded):
                if time.monotonic() - start > _MOST_LOADING_S:
                    raise MoveError(f"a worker had not compiled its spans after {_MOST_LOADING_S:g} s")
                self._stop.wait(_LOOK_EVERY_S)
            return go_over(time.monotonic() - start)
        except UnloadableError as error:
            self._between.run(self._unload)
            raise MoveError(f"spans {error.problems} cannot be loaded") from error
        except KVLostError as error:  # who steps next starts it again
            raise MoveError(f"{error}") from error

    def _begin(self) -> None:
        self.check()
        for worker, spans in self._targets.items():
            self._workers.group.load(worker, spans)

    def _unload(self) -> None:
        self.check()
        for worker in self._targets:
            self._workers.group.load(worker, {})

    def _has_loaded(self) -> bool:
        self.check()
        return self._workers.group.has_loaded(self._targets)
