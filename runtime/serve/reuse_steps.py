"""What approximate reuse does around each step: KV is taken over, looked at, refreshed (`reuse`).

before(seq)   K and V arrive in the sequence's pages
rows(...)     which attention a part reports, where it leaves and enters the chain
after(seq)    a first pass has ended: what is computed anew is chosen; the queue is put in order
"""

from __future__ import annotations

import numpy as np

from blockzoo.engines.arrays import Array
from blockzoo.runtime.approx.first_pass import RowsLike, relative_deviation
from blockzoo.runtime.approx.matching import ReuseConfig
from blockzoo.runtime.exec.kv_pages import KVPages
from blockzoo.runtime.kv.sequence import Part, TokenSequence

_CALM_TOKENS = 8  # refreshed in a row with negligible deviations: the queue is given up
_DECAY = 0.9  # of attention, from one generated token to the next


class ReuseSteps:
    """The steps of all sequences.

    Args:
        rows_like: makes arrays for hidden states.
    """

    def __init__(self, rows_like: RowsLike) -> None:
        self._rows_like = rows_like
        self._old_values: dict[TokenSequence, np.ndarray] = {}  # of the tokens that this step refreshes

    def before(self, seq: TokenSequence, chain: int, kv: KVPages) -> list[Part]:
        """Copy what `seq` takes over; the parts, a token each, that refresh what it took before."""
        copies = seq.cache.take_copies(seq)
        if copies is not None:
            kv.copy(*copies)
        borrowed = seq.cache.take_borrowed(seq)
        if borrowed is not None:
            kv.borrow(chain, borrowed, seq.page_table)
            if seq.survey is not None and seq.survey.config.uses_check:
                seq.survey.old_values = _checked_values(seq, kv)
            if seq.survey is None:
                _fill_queue(seq)
        refreshed = seq.stale[: seq.num_refreshing]
        if refreshed.size and _config(seq).negligible:
            self._old_values[seq] = kv.values(seq.page_table, refreshed)
        return [Part(position, position + 1, 0) for position in refreshed.tolist()]

    def window(self, seq: TokenSequence, part: Part) -> int:
        """How many of a part's last rows report their attention."""
        if seq.survey is not None:
            return seq.survey.window(part.start, part.end)
        new = part.end == seq.num_tokens and part.end - part.start == 1
        return int(new and seq.stale.size > 0 and _config(seq).refresh_order == "importance")

    def add_scores(self, seq: TokenSequence, part: Part, scores: np.ndarray) -> None:
        """Note the attention of a part's rows, float32 [part.end]."""
        window = self.window(seq, part)
        if seq.survey is not None:
            seq.survey.add_scores(scores, window)
        elif seq.importance is not None:
            seq.importance *= _DECAY
            seq.importance += scores[: seq.importance.size]

    def keep_hidden(self, seq: TokenSequence, part: Part, rows: Array) -> None:
        """Keep what left the check layers."""
        assert seq.survey is not None, f"{seq} has no check layers"
        seq.survey.keep_rows(part.start, rows, self._rows_like)

    def after(self, seq: TokenSequence, kv: KVPages) -> None:
        """Go on to the next pass where one has ended; put the queue in order."""
        survey = seq.survey
        if survey is not None and seq.num_computed >= seq.num_tokens:
            if survey.done:
                seq.survey = None
            else:
                seq.take_over(survey.conclude(lambda: _checked_values(seq, kv)))
                if survey.done:
                    _fill_queue(seq)
        old = self._old_values.pop(seq, None)
        if old is not None:
            self._give_up_when_calm(seq, relative_deviation(old, kv.values(seq.page_table, seq.refreshed)))
        if seq.stale.size and seq.importance is not None and _config(seq).refresh_order == "importance":
            seq.stale = seq.stale[np.argsort(-seq.importance[seq.stale], kind="stable")]

    @staticmethod
    def _give_up_when_calm(seq: TokenSequence, deviation: np.ndarray) -> None:
        """`deviation` float [layers, tokens], of what was refreshed."""
        negligible = deviation.mean(0) <= _config(seq).negligible
        seq.num_calm = seq.num_calm + negligible.size if negligible.all() else 0
        if seq.num_calm >= _CALM_TOKENS:
            seq.stale = seq.stale[:0]


def _checked_values(seq: TokenSequence, kv: KVPages) -> np.ndarray:
    """V of the matched tokens at the last check layer."""
    assert seq.survey is not None, f"{seq} has no check layers"
    layer = seq.survey.config.check_layers - 1
    return kv.values(seq.page_table[layer], np.flatnonzero(seq.survey.matched))


def _fill_queue(seq: TokenSequence) -> None:
    """What is to be refreshed while decoding.

    By importance, what was taken over. In order of position, also what was computed behind it, so over what
    was not exact: each token is then computed over exact KV, and once the queue is drained all is exact.
    """
    assert seq.reused is not None, f"{seq} takes nothing over"
    seq.stale = np.flatnonzero(seq.reused)
    if _config(seq).refresh_order == "position" and seq.stale.size:
        seq.stale = np.arange(seq.stale[0], seq.num_tokens)


def _config(seq: TokenSequence) -> ReuseConfig:
    assert seq.cache.planner is not None, "only sequences of a cache with a planner take KV over"
    return seq.cache.planner.config
