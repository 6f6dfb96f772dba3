"""A first pass over KV taken over from elsewhere, after which it is decided what is computed anew.

Two kinds (`ReuseConfig.selector`):

    query      the unmatched tokens run through all layers over what was taken. What matched tokens draw the
               attention of the last of them (the question) tells which lines (or pages, or tokens) matter for
               the answer. In further rounds those, computed anew, look too: what they lean on comes in.
    deviation  everything runs through the check layers. How far V at the last of them is from what was taken
               tells which tokens were changed by the words before them. The others leave; what is chosen goes
               on from the hidden states that leave the check layers.

Ints and numpy only, but for the hidden states, which it passes on unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import numpy as np

from blockzoo.engines.arrays import Array
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.approx.selection import highest, lines_of_highest

QUESTION_TOKENS = 64
"""Unmatched tokens at the end of a prompt, at most, that count as the question."""

NEAR_TOKENS = 8
"""Before the question: attended to because they are near."""

RowsLike = Callable[[Array, int], Array]
"""(rows, n) -> n new rows like them."""


class FirstPass:
    """Of one sequence.

    Args:
        config: as it was when the sequence began.
        matched: bool [num_tokens], whose KV was taken over.
        anew: bool [num_tokens], which of it is computed anew whatever is seen: not in the first pass, whose
            rows it would only add to.
        start: the first token behind the exact prefix, in all layers or in lower ones alone.
        line_ends: bool [num_tokens], which tokens end a line of text.
        budget: matched tokens to compute anew, those in any case among them.

    Attributes:
        done: it is decided; what is left of the prompt runs.
        importance: float32 [num_tokens], attention received, as shares of one row and layer sum.
        old_values: V of matched tokens at the last check layer as it was taken, float32 [n, heads, head_dim].
        hidden: rows [num_tokens - start, hidden] that leave the check layers.
    """

    def __init__(
        self,
        config: ReuseConfig,
        matched: np.ndarray,
        anew: np.ndarray,
        start: int,
        line_ends: np.ndarray,
        budget: int,
    ) -> None:
        self.config, self.matched, self.anew, self.start = config, matched, anew, start
        self._line_ends, self._budget = line_ends, budget
        if config.selector == "query" and config.recompute < 1:
            self._budget = min(budget, int(anew.sum()) + ceil(config.pointed * matched.sum()))
        self.done = False
        self.importance = np.zeros(matched.size, np.float32)
        self.old_values: np.ndarray | None = None
        self.hidden: Array | None = None
        self._round = 1
        tail = int(np.flatnonzero(matched)[-1]) + 1
        self._question = max(tail, matched.size - QUESTION_TOKENS)

    @property
    def exits(self) -> bool:
        """Whether rows leave behind the check layers now."""
        return self.config.uses_check and not self.done

    @property
    def restart(self) -> int:
        """The first token that the next pass may have to compute."""
        return self.start if self.config.uses_check else self.matched.size - 1

    @property
    def enters(self) -> bool:
        """Whether rows enter behind the check layers now."""
        return self.config.uses_check and self.done

    def first_reused(self) -> np.ndarray:
        """bool [num_tokens]: what does not run in the first pass."""
        return np.zeros_like(self.matched) if self.config.uses_check else self.matched

    def window(self, start: int, end: int) -> int:
        """How many of the last of rows [start, end) look."""
        if self.done or self.config.selector == "deviation":
            return 0
        if self._round > 1 and self.matched[start:end].any():  # chosen in an earlier round
            return end - start
        return max(0, end - max(start, self._question))

    def add_scores(self, scores: np.ndarray, num_rows: int) -> None:
        """Attention from `num_rows` rows to the first tokens, float32 [n]."""
        self.importance[: scores.size] += scores / num_rows

    def keep_rows(self, start: int, rows: Array, rows_like: RowsLike) -> None:
        """Hidden states [n, hidden] of the tokens from `start` on leave the check layers."""
        if self.hidden is None:
            self.hidden = rows_like(rows, self.matched.size - self.start)
        self.hidden[start - self.start : start - self.start + len(rows)] = rows

    def rows_entering(self, start: int, end: int) -> Array:
        """Those of tokens [start, end)."""
        assert self.hidden is not None, "kept in the first pass"
        return self.hidden[start - self.start : end - self.start]

    def _pointed(self) -> np.ndarray:
        """Attention received, squared: a head that looks something up puts all of it on a token or two, and
        what is spread thinly over many says little. What stands right before the question is looked at for
        being near: it comes last."""
        scores: np.ndarray = np.where(self.anew, 0.0, self.importance) ** 2
        scores[max(0, self._question - NEAR_TOKENS) : self._question] *= 1e-9
        return scores

    def conclude(self, new_values: Callable[[], np.ndarray]) -> np.ndarray:
        """Decide on what the pass showed.

        Args:
            new_values: gives what `old_values` was, as it is now.

        Returns:
            bool [num_tokens]: matched tokens to compute anew in the next pass, the last one where `done`.
        """
        config = self.config
        if not config.uses_check:
            budget = ceil(self._budget * self._round / config.rounds)
            self.done = self._round == config.rounds
            self._round += 1
            return self._highest(self._pointed(), budget)
        self.done = True
        assert self.old_values is not None, "taken before the first pass"
        deviation = np.zeros(self.matched.size, np.float32)
        new = new_values()
        deviation[self.matched] = relative_deviation(self.old_values, new)
        self.old_values = None
        if deviation[self.matched].mean() > config.max_deviation:
            return self.matched
        scores = np.where(deviation > config.negligible, deviation, 0.0)
        if config.selector == "importance*deviation":
            scores = scores * self.importance
        scores = np.where(self.anew, 0.0, scores)
        return self._highest(scores, self._budget)

    def _highest(self, scores: np.ndarray, budget: int) -> np.ndarray:
        """What is computed anew in any case, and the highest until all are so many."""
        left = self.matched & ~self.anew
        share = max(0, budget - int(self.anew.sum())) / max(1, int(left.sum()))
        if self.config.unit == "line":
            return lines_of_highest(scores, left, share, self._line_ends) | self.anew
        return highest(scores, left, share, self.config.unit == "page") | self.anew


def relative_deviation(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """L1 distance of each token's V, [..., n, heads, dim], from what it was, relative to it: [..., n]."""
    size = np.abs(new).sum((-2, -1))
    distance: np.ndarray = np.abs(new - old).sum((-2, -1)) / np.maximum(size, 1e-20)
    return distance
