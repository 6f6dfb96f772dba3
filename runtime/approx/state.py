"""What of a sequence's KV was computed behind other words, and what is still to be done about it.

A sequence has one from when it takes KV over until it gives its pages back; an exact one has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.approx.first_pass import FirstPass

_CALM_TOKENS = 8  # refreshed in a row with negligible deviations: the queue is given up
_DECAY = 0.9  # of attention, from one generated token to the next


class Borrowed(NamedTuple):
    """K and V to take over, before anything of the sequence runs: n tokens, L layers.

    Attributes:
        positions: int64 [n], of the sequence.
        pages, slots: int64 [L, n] and [n], where they lie.
        shift: int64 [n], by how many positions K is to be rotated.
    """

    positions: np.ndarray
    pages: np.ndarray
    slots: np.ndarray
    shift: np.ndarray


class ApproximateKV:
    """Of one sequence.

    Args:
        config: as it was when the sequence began.
        reused: bool [num_tokens], whose KV comes from elsewhere (of fewer, after a first pass).
        borrowed: where that KV lies.
        first_pass: looks at it, and chooses what is computed anew; None where that is settled.

    Attributes:
        reused: tokens that do not run: they keep KV that was computed behind other words.
        borrowed: None once it is copied.
        first_pass: None once what it chose is computed.
        is_guarded: a guard still has to look at the next token.
        importance: float32 [num_tokens], attention received; None where nobody asks.
        stale: int64 [n], positions to refresh while decoding, the next first.
        num_refreshing: of `stale`, in this step.
        refreshed: int64 [n], in the last step.
    """

    __slots__ = (
        "_num_calm",
        "borrowed",
        "config",
        "first_pass",
        "importance",
        "is_guarded",
        "num_refreshing",
        "refreshed",
        "reused",
        "stale",
    )

    def __init__(
        self, config: ReuseConfig, reused: np.ndarray, borrowed: Borrowed, first_pass: FirstPass | None
    ) -> None:
        self.config, self.reused, self.first_pass = config, reused, first_pass
        self.borrowed: Borrowed | None = borrowed
        self.importance = np.zeros(reused.size, np.float32) if first_pass is None else first_pass.importance
        self.stale = self.refreshed = np.empty(0, np.int64)
        self.num_refreshing = 0
        self.is_guarded = config.guard > 0
        self._num_calm = 0  # refreshed in a row with negligible deviations

    # ---- which tokens run

    def num_reused(self, start: int) -> int:
        """Tokens from `start` on that do not run."""
        return int(self.reused[start:].sum())

    def fresh(self, start: int, end: int) -> np.ndarray:
        """Positions in [start, end) that run, of those that were there when it began: int64 [n]."""
        return start + np.flatnonzero(~self.reused[start:end])

    def end_after(self, start: int, num_rows: int) -> int:
        """Where `num_rows` tokens that run, from `start` on, have run: the next that does, or the end."""
        fresh = self.fresh(start, self.reused.size)
        if num_rows < fresh.size:
            return int(fresh[num_rows])
        return max(start, self.reused.size) + num_rows - fresh.size

    def conclude(self, new_values: Callable[[], np.ndarray]) -> int:
        """Decide what is computed anew, after a pass over what came from elsewhere.

        Args:
            new_values: V of the matched tokens at the last check layer, as it is now.

        Returns:
            The first token that may run in the next pass: what stands behind the first chosen one runs too.
        """
        first_pass = self.first_pass
        assert first_pass is not None, "nothing is looked at"
        chosen = first_pass.conclude(new_values)
        self.reused = first_pass.matched & ~chosen
        if first_pass.done:
            self.fill_queue(self.reused.size)
        return min([first_pass.restart, *np.flatnonzero(chosen)[:1].tolist()])

    # ---- the refresh queue

    def fill_queue(self, num_tokens: int) -> None:
        """Queue what is to be refreshed while decoding, if anything is.

        By importance, what was taken over. In order of position, also what was computed behind it, so over
        what was not exact: each token is then computed over exact KV, and once the queue is drained all is.
        """
        if not self.config.refresh:
            return
        self.stale = np.flatnonzero(self.reused)
        if self.config.refresh_order == "position" and self.stale.size:
            self.stale = np.arange(self.stale[0], num_tokens)

    def refreshing(self) -> np.ndarray:
        """Positions that this step refreshes, int64 [n]."""
        return self.stale[: self.num_refreshing]

    def advance(self) -> None:
        """This step's refreshes are done."""
        self.refreshed, self.stale = np.split(self.stale, [self.num_refreshing])
        self.num_refreshing = 0

    def reads_attention(self) -> bool:
        """Whether the order of the queue depends on what generated tokens look at."""
        return self.stale.size > 0 and self.config.refresh_order == "importance"

    def add_attention(self, scores: np.ndarray) -> None:
        """Note what tokens received from a generated one, float32 [n], and put the queue in order."""
        self.importance *= _DECAY
        self.importance += scores[: self.importance.size]

    def sort_queue(self) -> None:
        """Put what received the most attention first, where that is the order."""
        if self.reads_attention():
            self.stale = self.stale[np.argsort(-self.importance[self.stale], kind="stable")]

    def give_up_when_calm(self, deviation: np.ndarray) -> None:
        """End the queue where what was refreshed has hardly changed for a while.

        `deviation` float [layers, tokens] of V, relative to V, of what was refreshed in the last step.
        """
        negligible = deviation.mean(0) <= self.config.negligible
        self._num_calm = self._num_calm + negligible.size if negligible.all() else 0
        if self._num_calm >= _CALM_TOKENS:
            self.stale = self.stale[:0]


def margin(logits: np.ndarray) -> float:
    """By how much the likeliest token leads the second, in nats; of float32 [vocab]."""
    second, first = np.partition(logits, -2)[-2:].tolist()
    return float(first - second)
