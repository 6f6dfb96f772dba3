"""The arrays that a step works on: activations of one family, and the integers of one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blockzoo.engines.arrays import Array, Arrays
from blockzoo.runtime.exec.topology import Family


@dataclass(slots=True)
class Buffers:
    """Preallocated activations of one family, arrays of the engines' device.

    Attributes:
        hidden: two arrays [max_tokens, hidden]: a call reads one and writes the other.
        kept: the same for logit rows, [max_logits, hidden].
        scratch: two arrays [max_tokens, hidden] for calls whose rows are not neighbours.
        cos, sin: float32 [max_tokens, 1, 1, head_dim].
        logits: float32 flat [max_logits * largest vocabulary].
    """

    hidden: tuple[Array, Array]
    kept: tuple[Array, Array]
    scratch: tuple[Array, Array]
    cos: Array
    sin: Array
    logits: Array


@dataclass(slots=True)
class StepArrays:
    """Integer inputs of a step, views of one array; S sequences, T token rows, E table entries, L layers."""

    token_ids: Array  # [T] int32
    positions: Array  # [T] int32
    past_lens: Array  # [S] int32
    score_windows: Array  # [S] int32
    tables: Array  # [L, E] int32, the sequences' page tables side by side
    max_context_len: Array  # scalar int32

    @classmethod
    def over(cls, flat: Array, num_rows: int, num_seqs: int, table_shape: tuple[int, int]) -> StepArrays:
        """The views of an array of `size(...)` elements."""
        ends = np.cumsum([num_rows, num_rows, num_seqs, num_seqs, table_shape[0] * table_shape[1]]).tolist()
        return cls(
            token_ids=flat[: ends[0]],
            positions=flat[ends[0] : ends[1]],
            past_lens=flat[ends[1] : ends[2]],
            score_windows=flat[ends[2] : ends[3]],
            tables=flat[ends[3] : ends[4]].reshape(table_shape),
            max_context_len=flat[ends[4] :].reshape(()),
        )

    @staticmethod
    def size(num_rows: int, num_seqs: int, table_shape: tuple[int, int]) -> int:
        """Elements of the array that holds them all."""
        return 2 * num_rows + 2 * num_seqs + table_shape[0] * table_shape[1] + 1


def make_buffers(family: Family, arrays: Arrays, max_tokens: int, max_logits: int, vocab: int) -> Buffers:
    """Buffers for steps of so many rows, and rows of `vocab` logits."""

    def pair(rows: int) -> tuple[Array, Array]:
        shape = (rows, family.hidden_size)
        return arrays.zeros(shape, "activation"), arrays.zeros(shape, "activation")

    return Buffers(
        hidden=pair(max_tokens),
        kept=pair(max_logits),
        scratch=pair(max_tokens),
        cos=arrays.zeros((max_tokens, 1, 1, family.head_dim), "f32"),
        sin=arrays.zeros((max_tokens, 1, 1, family.head_dim), "f32"),
        logits=arrays.zeros((max_logits * vocab,), "f32"),
    )
