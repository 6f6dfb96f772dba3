"""Simulated time, and workers that do one thing after the other."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    """Runs what is due, in order of time; `now` is in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def time(self) -> float:
        """As `time.monotonic`, for the scheduler."""
        return self.now

    def after(self, seconds: float, run: Callable[[], None]) -> None:
        """Run something later."""
        heapq.heappush(self._due, (self.now + seconds, next(self._order), run))

    def run(self, until: float = float("inf")) -> None:
        """Until nothing is left to do, or until a time."""
        while self._due and self._due[0][0] <= until:
            self.now, _, run = heapq.heappop(self._due)
            run()


class Worker:
    """A GPU: its calls run in the order in which they come, one at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free_at = 0.0
        self.busy_s = 0.0
        self.flops = 0.0  # done

    def run(self, seconds: float, flops: float, then: Callable[[], None]) -> None:
        """Run a call, and something at its end."""
        end = max(self._clock.now, self._free_at) + seconds
        self._free_at = end
        self.busy_s += seconds
        self.flops += flops
        self._clock.after(end - self._clock.now, then)
