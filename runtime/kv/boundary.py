"""Hidden states at the boundaries where chains part, kept per page of prompt tokens.

KV of shared lower layers saves a tenant memory, not time: its own upper layers still need the hidden states
that enter them. Kept here under the same keys as the pages of KV (so within their scope), they let a prefill
start at the boundary. Without that KV they are of no use, so they go with it. The rows are opaque: whatever
the executor hands out it takes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS, pages_for
from blockzoo.runtime.kv.sequence import Part, TokenSequence

Rows = Any
"""[n, hidden]: an array of the engines' device, numpy or torch."""


def _numpy_rows(part: Rows, num_rows: int) -> Rows:
    return np.empty((num_rows, *part.shape[1:]), part.dtype)


class BoundaryCache:
    """Pages of hidden states within a budget; the least recently used go first.

    Pages that a running sequence has taken stay alive until they are computed, also when evicted here.

    Args:
        max_bytes: of all rows kept; 0 keeps none.
        rows_like: makes new rows, `engines.arrays.Arrays.rows_like`.
    """

    def __init__(self, max_bytes: int, rows_like: Callable[[Rows, int], Rows] = _numpy_rows) -> None:
        self.max_bytes = max_bytes
        self._rows_like = rows_like
        self.num_bytes = 0
        self.evictions = 0
        self._pages: OrderedDict[tuple[str, bytes], Rows] = OrderedDict()  # oldest use first
        self._boundaries: dict[bytes, set[str]] = {}  # at which a page is kept

    def __len__(self) -> int:
        return len(self._pages)

    def has(self, boundary: str, key: bytes) -> bool:
        """Whether the page `key` is kept at `boundary`."""
        return (boundary, key) in self._pages

    def get(self, boundary: str, key: bytes) -> Rows | None:
        """The rows [32, hidden] of a page, read only; None where they are not kept."""
        rows = self._pages.get((boundary, key))
        if rows is not None:
            self._pages.move_to_end((boundary, key))
        return rows

    def touch(self, seq: TokenSequence) -> None:
        """Count the pages of a sequence as used now, the leading ones last: they are of use to the most."""
        known = seq.page_keys(0)[: seq.num_prompt_pages]
        for segment in seq.segments[1:]:
            for key in reversed(known):
                if (segment.boundary, key) in self._pages:
                    self._pages.move_to_end((segment.boundary, key))

    def begin_page(self, seq: TokenSequence, boundary: str, key: bytes, num_tokens: int) -> None:
        """Let `record` go on in the page of num_tokens - 1, which was copied in part from the page `key`."""
        rows = self.get(boundary, key)
        if rows is not None:
            whole = self._rows_like(rows, PAGE_TOKENS)
            whole[...] = rows
            seq.unfinished[boundary] = (num_tokens, whole)

    def put(self, boundary: str, key: bytes, rows: Rows) -> None:
        """Keep the rows [32, hidden] of a page; the caller changes them no more."""
        if rows.nbytes > self.max_bytes:
            return
        if self.has(boundary, key):
            self._drop(boundary, key)
        self._pages[boundary, key] = rows
        self._boundaries.setdefault(key, set()).add(boundary)
        self.num_bytes += rows.nbytes
        while self.num_bytes > self.max_bytes:
            self._drop(*next(iter(self._pages)))
            self.evictions += 1

    def keep(self, boundaries: Collection[str]) -> None:
        """Forget what is kept at any other boundary."""
        for name in [name for name in self._pages if name[0] not in boundaries]:
            self._drop(*name)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Forget pages whose KV is no more."""
        for key in keys:
            for boundary in tuple(self._boundaries.get(key, ())):
                self._drop(boundary, key)

    def _drop(self, boundary: str, key: bytes) -> None:
        self.num_bytes -= self._pages.pop((boundary, key)).nbytes
        left = self._boundaries[key]
        left.remove(boundary)
        if not left:
            del self._boundaries[key]

    def entering(self, seq: TokenSequence, part: Part) -> Rows:
        """The hidden states [n, hidden] of a part that enters late, which the sequence took when it began."""
        first, last = part.start // PAGE_TOKENS, pages_for(part.end)
        rows = self._rows_like(seq.entering[first], (last - first) * PAGE_TOKENS)
        for page in range(first, last):
            begin = (page - first) * PAGE_TOKENS
            rows[begin : begin + PAGE_TOKENS] = seq.entering[page]
        return rows[part.start - first * PAGE_TOKENS : part.end - first * PAGE_TOKENS]

    def record(self, seq: TokenSequence, boundary: str, start: int, rows: Rows) -> None:
        """Keep the full prompt pages among `rows` [n, hidden], those of the tokens of `seq` from `start` on,
        whose KV is in the tree.

        A page may come in several pieces, in order.
        """
        end = min(start + len(rows), seq.num_prompt_pages * PAGE_TOKENS)
        first = start
        while start < end:
            page, offset = divmod(start, PAGE_TOKENS)
            count = min(PAGE_TOKENS - offset, end - start)
            begun = seq.unfinished.pop(boundary, None)
            if offset == 0:
                begun = (start, self._rows_like(rows, PAGE_TOKENS))
            if begun is not None and begun[0] == start:
                whole = begun[1]
                whole[offset : offset + count] = rows[start - first : start - first + count]
                if offset + count < PAGE_TOKENS:
                    seq.unfinished[boundary] = (start + count, whole)
                elif page < seq.num_tree_pages:
                    self.put(boundary, seq.page_keys(page + 1)[page], whole)
            start += count
