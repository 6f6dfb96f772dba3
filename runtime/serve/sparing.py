"""Work that may be left out, done within a share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Sparing:
    """Runs something when it is offered to, as long as that takes at most a share of the time.

    Args:
        action: what to run.
        share: 0 to 1, of the time since it last began that it may have taken.
        clock: seconds.
    """

    def __init__(
        self, action: Callable[[], None], share: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._action, self._share, self._clock = action, share, clock
        self._next = float("-inf")

    def offer(self) -> None:
        """Run it, or not; what it raises is raised."""
        begun = self._clock()
        if begun < self._next:
            return
        try:
            self._action()
        finally:
            self._next = begun + (self._clock() - begun) / self._share
