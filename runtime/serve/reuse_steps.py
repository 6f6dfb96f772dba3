"""What approximate reuse does around each step: KV is taken over, looked at, refreshed (`approx`).

before(seq)   K and V arrive in the sequence's pages
rows(...)     which attention a part reports, where it leaves and enters the chain
after(seq)    a first pass has ended: what is computed anew is chosen; the guard has looked; the queue is put
              in order
"""

from __future__ import annotations

import numpy as np

from blockzoo.engines.arrays import Array
from blockzoo.runtime.approx.first_pass import FirstPass, RowsLike, relative_deviation
from blockzoo.runtime.approx.state import margin
from blockzoo.runtime.exec.kv_tensors import KVTensors
from blockzoo.runtime.kv.sequence import Part, TokenSequence


class ReuseSteps:
    """The steps of all sequences.

    Args:
        rows_like: makes arrays for hidden states.
    """

    def __init__(self, rows_like: RowsLike) -> None:
        self._rows_like = rows_like
        self._old_values: dict[TokenSequence, np.ndarray] = {}  # of the tokens that this step refreshes

    def before(self, seq: TokenSequence, kv: KVTensors) -> list[Part]:
        """Copy what `seq` takes over; the parts, a token each, that refresh what it took before."""
        self._old_values.pop(seq, None)  # of a step that failed
        copies = seq.cache.take_copies(seq)
        if copies is not None:
            kv.copy(*copies)
        approx = seq.approx
        if approx is None:
            return []
        borrowed = seq.cache.take_borrowed(seq)
        if borrowed is not None:
            kv.borrow(seq.chain_index, borrowed, seq.page_table)
            if approx.first_pass is None:
                approx.fill_queue(seq.num_tokens)
            elif approx.config.uses_check:
                approx.first_pass.old_values = _checked_values(seq, approx.first_pass, kv)
        refreshed = approx.refreshing()
        if refreshed.size and approx.config.negligible:
            self._old_values[seq] = kv.values(seq.page_table, refreshed)
        return [Part(position, position + 1, 0) for position in sorted(refreshed.tolist())]

    def window(self, seq: TokenSequence, part: Part) -> int:
        """How many of a part's last rows report their attention."""
        if seq.approx is None:
            return 0
        if seq.approx.first_pass is not None:
            return seq.approx.first_pass.window(part.start, part.end)
        generated = part.end == seq.num_tokens and part.end - part.start == 1
        return int(generated and seq.approx.reads_attention())

    def add_scores(self, seq: TokenSequence, part: Part, scores: np.ndarray) -> None:
        """Note the attention of a part's rows, float32 [part.end]."""
        if seq.approx is None:
            return
        if seq.approx.first_pass is not None:
            seq.approx.first_pass.add_scores(scores, self.window(seq, part))
        else:
            seq.approx.add_attention(scores)

    def keep_hidden(self, seq: TokenSequence, part: Part, rows: Array) -> None:
        """Keep what left the check layers."""
        first_pass = None if seq.approx is None else seq.approx.first_pass
        assert first_pass is not None, f"{seq} has no check layers"
        first_pass.keep_rows(part.start, rows, self._rows_like)

    def after(self, seq: TokenSequence, kv: KVTensors, logits: np.ndarray | None = None) -> None:
        """Go on to the next pass where one has ended; put the queue in order.

        `logits`, float32 [vocab], of the last token where a guard is to look at it. A sequence that it holds
        back lacks tokens then.
        """
        approx, old = seq.approx, self._old_values.pop(seq, None)
        if approx is None:
            return
        first_pass = approx.first_pass
        if first_pass is not None and seq.num_computed >= seq.num_tokens:
            if first_pass.done:
                approx.first_pass = None
            else:
                seq.num_computed = approx.conclude(lambda: _checked_values(seq, first_pass, kv))
                seq.num_computed = seq.end_after(0)
        if logits is not None and seq.cache.guard(seq, margin(logits)):
            return
        if old is not None:
            deviation = relative_deviation(old, kv.values(seq.page_table, approx.refreshed))
            approx.give_up_when_calm(deviation)
        approx.sort_queue()


def _checked_values(seq: TokenSequence, first_pass: FirstPass, kv: KVTensors) -> np.ndarray:
    """V of the matched tokens at the last check layer."""
    layer = first_pass.config.check_layers - 1
    return kv.values(seq.page_table[layer], np.flatnonzero(first_pass.matched))
