"""What speculation has won so far, less what it has cost: tries of it are paid out of that."""

from __future__ import annotations

_FIRST = 8.0  # steps, before anything was won
_MOST = 8.0  # that are kept: what was won long ago pays for nothing now
_MOST_OWED = 6.0
_MOST_LOST = 6.0  # by one step; more was the machine's doing
_EARNED = 0.01  # by every step: so much of the time may be lost
_BY_REQUEST = 0.5  # the same by requests, shared by those that run together


class Balance:
    """Of the steps of one executor; its unit is a step without drafts."""

    def __init__(self) -> None:
        self._steps = _FIRST

    @property
    def at_stake(self) -> float:
        """What the next try may cost, should it win nothing."""
        return max(self._steps, 0.0)

    def welcome(self, share: float) -> None:
        """Requests came, so large a share of those that run: what they are like is not known."""
        self._steps = min(self._steps + _BY_REQUEST * share, _MOST)

    def observe(self, won: float) -> None:
        """A step ran that was worth so many more than it took, or fewer."""
        self._steps = min(max(self._steps + max(won, -_MOST_LOST) + _EARNED, -_MOST_OWED), _MOST)
