"""Embedding look-up: a gather from the block's memory-mapped table, no compiled engine.

Only the rows that are asked for are ever read, so the table costs no resident memory of its own.
"""

from __future__ import annotations

import numpy as np

from blockzoo.engines.base import Precision, activation_dtype
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.tensors import f32_to_bf16


class EmbeddingTable:
    """Rows of an embed block in the activation type of a precision."""

    def __init__(self, block: Block, precision: Precision) -> None:
        self._table = block.tensors["weight"]
        self._precision = precision
        self.vocab_size: int = self._table.shape[0]

    def lookup(self, token_ids: np.ndarray, out: np.ndarray) -> None:
        """Write the rows of `token_ids` (int32 [n], each below vocab_size) to `out` [n, hidden].

        `out` has the precision's activation type (bf16 as uint16).
        """
        if self._table.data.dtype == out.dtype == activation_dtype(self._precision):
            np.take(self._table.data, token_ids, axis=0, out=out, mode="clip")
            return
        wide = self._table.rows(token_ids).to_f32()
        out[:] = f32_to_bf16(wide) if self._precision == "bf16" else wide
