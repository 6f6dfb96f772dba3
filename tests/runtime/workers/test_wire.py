"""What is sent arrives as it was."""

from __future__ import annotations

import numpy as np
import pytest

from blockzoo.runtime.exec.rows import Rows
from blockzoo.runtime.workers.wire import pack_rows, unpack_rows


def batch() -> list[Rows]:
    table = np.arange(24, dtype=np.int32).reshape(3, 8)
    return [
        Rows(2, np.array([5, 6, 7], np.int32), 40, table, 1),
        Rows(0, np.array([9], np.int32), 0, table[:, ::2], 0),
    ]


def test_rows_arrive_with_the_pages_in_use() -> None:
    for sent, come in zip(batch(), unpack_rows(pack_rows(batch())), strict=True):
        assert (sent.chain, sent.past_len, sent.num_logits) == (come.chain, come.past_len, come.num_logits)
        np.testing.assert_array_equal(sent.token_ids, come.token_ids)
        np.testing.assert_array_equal(sent.used_pages(), come.page_table)


@pytest.mark.parametrize("keep", [4, 20, -4])
def test_what_is_cut_short_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match=r"expected|reshape"):
        unpack_rows(pack_rows(batch())[:keep])
