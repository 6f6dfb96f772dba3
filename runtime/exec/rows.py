"""New tokens of sequences, as an executor takes them, and whether it can: engines do not check, and crash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from blockzoo.engines.arrays import Array
from blockzoo.engines.base import pages_for
from blockzoo.runtime.exec.topology import ChainPlan


class Rows(NamedTuple):
    """New tokens of one sequence.

    Attributes:
        chain: index into the topology's chains.
        token_ids: int32 [n], the new tokens.
        past_len: tokens before them, whose K and V are in the pool.
        page_table: int32 [num_layers, >= pages]; only the columns that cover past_len + n are read.
        num_logits: of so many of the last new tokens the logits are needed.
        entry: the first of the chain's span uses to run, one of its `entries`; the KV of the layers below is
            in the pages already.
        hidden: with an entry above 0, the hidden states [n, hidden] that enter there.
        keeps_hidden: whether to report the hidden states that enter the chain's later entries.
        exit: the first of the chain's span uses not to run, its `check`, whose entering hidden states are
            reported; None runs all.
        score_window: so many of the last rows report what attention they paid, 0 none (where the spans have
            scores).
    """

    chain: int
    token_ids: np.ndarray
    past_len: int
    page_table: np.ndarray
    num_logits: int
    entry: int = 0
    hidden: Array | None = None
    keeps_hidden: bool = False
    exit: int | None = None
    score_window: int = 0

    @property
    def num_pages(self) -> int:
        """Columns of the page table that the rows read or write."""
        return pages_for(self.past_len + len(self.token_ids))

    def used_pages(self) -> np.ndarray:
        """These columns, int32 [num_layers, num_pages]."""
        return self.page_table[:, : self.num_pages]


class RowError(ValueError):
    """Rows that cannot run, and why: those of number `member` of the batch."""

    def __init__(self, member: int, message: str) -> None:
        super().__init__(message)
        self.member = member


class RowChecks:
    """What the rows of a batch must keep to.

    Args:
        chains: of the topology.
        vocab_sizes: by embed block id.
        rope_tables: per chain index, (cos, sin) [positions, head_dim].
        num_pages: of the pool.
        hidden_size: of hidden states that enter late.
        max_tokens, max_logits: rows of a batch, and rows of logits.
    """

    def __init__(
        self,
        chains: Sequence[ChainPlan],
        vocab_sizes: Mapping[str, int],
        rope_tables: Mapping[int, tuple[np.ndarray, np.ndarray]],
        num_pages: int,
        hidden_size: int,
        max_tokens: int,
        max_logits: int,
    ) -> None:
        self.chains, self._vocab_sizes, self._rope_tables = chains, vocab_sizes, rope_tables
        self._num_pages, self._hidden_size = num_pages, hidden_size
        self._max_tokens, self._max_logits = max_tokens, max_logits

    def __call__(self, batch: Sequence[Rows]) -> None:
        """Check a batch.

        Raises:
            RowError: the first member that does not fit.
            ValueError: there are too many.
        """
        for member, rows in enumerate(batch):
            problem = self._shape_problem(rows)
            if problem is not None:
                raise RowError(member, problem)
        if not batch:
            return
        tokens, logits = sum(len(r.token_ids) for r in batch), sum(r.num_logits for r in batch)
        if tokens > self._max_tokens or logits > self._max_logits:
            most = f"{self._max_tokens} and {self._max_logits}"
            raise ValueError(f"a step of {tokens} rows and {logits} rows of logits; its buffers hold {most}")
        ids = np.concatenate([rows.token_ids for rows in batch])
        pages = np.concatenate([rows.used_pages().ravel() for rows in batch])
        vocab = min(self._vocab_size(rows) for rows in batch)
        # one look at all values together; a second one at each member's only to say which is wrong
        if ids.min() < 0 or ids.max() >= vocab or pages.min() < 0 or pages.max() >= self._num_pages:
            for member, rows in enumerate(batch):
                problem = self._value_problem(rows)
                if problem is not None:
                    raise RowError(member, problem)

    def _shape_problem(self, rows: Rows) -> str | None:
        if not 0 <= rows.chain < len(self.chains):
            return f"chain {rows.chain} of {len(self.chains)}"
        chain, count = self.chains[rows.chain], len(rows.token_ids)
        if count < 1 or rows.past_len < 0:
            return f"{count} new tokens after {rows.past_len}: expected at least 1 after 0 or more"
        if not 0 <= rows.num_logits <= count:
            return f"{rows.num_logits} rows of logits for {count} new tokens"
        if rows.entry not in (0, *chain.entries, chain.check):
            return f"rows enter at span {rows.entry}; expected one of {chain.entries}"
        if rows.exit not in (None, chain.check) or (rows.exit is not None and rows.entry >= rows.exit):
            return f"rows leave at span {rows.exit}; expected {chain.check}, above {rows.entry}"
        if rows.entry and (rows.hidden is None or tuple(rows.hidden.shape) != (count, self._hidden_size)):
            shape = None if rows.hidden is None else tuple(rows.hidden.shape)
            return f"hidden states {shape} for {count} rows of {self._hidden_size}"
        if rows.page_table.shape[0] != chain.num_layers or rows.page_table.shape[1] < rows.num_pages:
            return f"page table {rows.page_table.shape} for {chain.num_layers} layers, {rows.num_pages} pages"
        positions = len(self._rope_tables[rows.chain][0])
        if rows.past_len + count > positions:
            return f"{rows.past_len + count} tokens; positions are prepared up to {positions}"
        return None

    def _value_problem(self, rows: Rows) -> str | None:
        used, ids, vocab = rows.used_pages(), rows.token_ids, self._vocab_size(rows)
        if used.min() < 0 or used.max() >= self._num_pages:
            return f"page ids {used.min()} to {used.max()} in a pool of {self._num_pages}"
        if ids.min() < 0 or ids.max() >= vocab:
            return f"token ids {ids.min()} to {ids.max()}, vocabulary {vocab}"
        return None

    def _vocab_size(self, rows: Rows) -> int:
        return self._vocab_sizes[self.chains[rows.chain].embed_id]
