"""A step cut into micro-batches: nothing is lost, and what belongs together stays so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockzoo.runtime.exec.rows import Rows
from blockzoo.runtime.workers.micro_batches import micro_batches


def rows(count: int, num_logits: int = 1, past: int = 0) -> Rows:
    table = np.zeros((2, -(-(past + count) // 32)), np.int32)
    return Rows(0, np.arange(past, past + count, dtype=np.int32), past, table, num_logits)


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 5)), min_size=1, max_size=12), st.integers(1, 9))
def test_every_row_runs_once_in_order(shapes: list[tuple[int, int]], most: int) -> None:
    batch = [rows(count, min(count, logits), past=7 * i) for i, (count, logits) in enumerate(shapes)]
    parts = micro_batches(batch, 16, most)
    assert 1 <= len(parts) <= most
    done = [0] * len(batch)
    logits = [0] * len(batch)
    for part in parts:
        assert len(part.members) == len(set(part.members)) == len(part.rows)
        for piece, member in zip(part.rows, part.members, strict=True):
            assert logits[member] == 0, "rows with logits are in one piece, the last"
            begin = done[member]
            assert piece.past_len == batch[member].past_len + begin
            done[member] += len(piece.token_ids)
            np.testing.assert_array_equal(piece.token_ids, batch[member].token_ids[begin : done[member]])
            logits[member] += piece.num_logits
    assert done == [len(each.token_ids) for each in batch]
    assert logits == [each.num_logits for each in batch]


@pytest.mark.parametrize(
    ("counts", "sizes"), [([512], [128] * 4), ([1] * 32, [32]), ([1, 1, 254], [128] * 2)]
)
def test_micro_batches_are_equal(counts: list[int], sizes: list[int]) -> None:
    parts = micro_batches([rows(count) for count in counts], 128, 8)
    assert [sum(len(piece.token_ids) for piece in part.rows) for part in parts] == sizes
