"""The page allocator: which page ids are free.

It knows nothing of keys and values, layers or sequences: a page id is an index into the K and V pages of
one KV geometry, and any layer of any sequence may own any page.
"""

from __future__ import annotations

import numpy as np


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free. Callers check first, so users never see it."""


class IntegrityError(RuntimeError):
    """The bookkeeping of pages contradicts itself: a bug of ours, never a user's mistake."""


class PagePool:
    """A stack of free page ids: the page freed last is handed out first, so that memory stays warm.

    Args:
        num_pages: that may be in use.
        capacity: ids that there are, which the pool may grow to; None: num_pages.
    """

    def __init__(self, num_pages: int, capacity: int | None = None) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, expected at least 1: give the KV cache more bytes")
        self.capacity = num_pages if capacity is None else capacity
        if self.capacity < num_pages:
            raise ValueError(f"{num_pages} pages of {capacity}")
        self.num_pages = num_pages
        self.num_free = num_pages
        self._stack = np.zeros(self.capacity, np.int32)  # free ids: [:num_free], top is last
        self._stack[:num_pages] = np.arange(num_pages - 1, -1, -1)
        self._is_free = np.arange(self.capacity) < num_pages
        self._unused = np.arange(num_pages, self.capacity, dtype=np.int32)  # neither free nor in use

    def allocate(self, count: int) -> np.ndarray:
        """Take `count` pages: int32 [count]. Raises OutOfPagesError and takes none when fewer are free."""
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages asked for, {self.num_free} of {self.num_pages} free")
        top = self.num_free
        ids = self._stack[top - count : top][::-1].copy()
        self.num_free = top - count
        self._is_free[ids] = False
        return ids

    def free(self, ids: np.ndarray) -> None:
        """Give pages back. `ids` int [n]. Raises IntegrityError, freeing none, on a foreign or free id."""
        count = ids.size
        if count == 0:
            return
        if int(ids.min()) < 0 or int(ids.max()) >= self.capacity:
            raise IntegrityError(f"freed page ids {ids.tolist()} are not all in [0, {self.capacity})")
        if self._is_free[ids].any():
            raise IntegrityError(f"pages {ids[self._is_free[ids]].tolist()} are freed but are free already")
        if count > 1 and np.unique(ids).size != count:
            raise IntegrityError(f"freed page ids {ids.tolist()} name a page twice")
        self._is_free[ids] = True
        self._stack[self.num_free : self.num_free + count] = ids
        self.num_free += count

    def resize(self, num_pages: int) -> np.ndarray:
        """Let more or fewer pages be used, at most the capacity. Returns the ids that went, int32 [n].

        Raises OutOfPagesError, changing nothing, when fewer are free than are to go.
        """
        fewer = self.num_pages - num_pages
        if not 1 <= num_pages <= self.capacity:
            raise ValueError(f"num_pages is {num_pages}, expected 1 to {self.capacity}")
        if fewer >= 0:
            gone = self.allocate(fewer)
            self._unused = np.concatenate([self._unused, gone])
        else:
            more, self._unused = self._unused[:-fewer], self._unused[-fewer:]
            gone = more[:0]
        self.num_pages = num_pages
        if fewer < 0:
            self.free(more)
        return gone

    def unused_ids(self) -> np.ndarray:
        """The ids that are neither free nor in use, int32 [capacity - num_pages]."""
        return self._unused

    def free_ids(self) -> np.ndarray:
        """Copy of the free ids, int32 [num_free], the next to be handed out last."""
        return self._stack[: self.num_free].copy()
