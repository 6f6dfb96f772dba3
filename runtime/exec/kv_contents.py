"""The contents of a pool's pages, to and from the host."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blockzoo.engines.arrays import Array, Arrays
from blockzoo.zoo.tensors import bf16_to_f32


class KVContents:
    """K and V pages of one pool, each [num_pages, kv_heads, 32, head_dim].

    Args:
        pool: by name, "key_cache" and "value_cache".
        arrays: whose they are.
        num_pages: that may be named.
    """

    def __init__(self, pool: Mapping[str, Array], arrays: Arrays, num_pages: int) -> None:
        self._pool, self._arrays, self._num_pages = pool, arrays, num_pages

    @property
    def page_shape(self) -> tuple[int, ...]:
        """[kv_heads, 32, head_dim]."""
        return tuple(self._pool["key_cache"].shape[1:])

    def read(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """K and V of pages int [...]: each [..., kv_heads, 32, head_dim], bf16 as uint16; a copy.

        Raises:
            ValueError: a page id is out of range.
        """
        index = self._checked(pages)
        keys, values = (
            self._arrays.to_host(self._pool[name][index]) for name in ("key_cache", "value_cache")
        )
        return keys, values

    def write(self, pages: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """Set the K and V of pages int [...] to what `read` gave.

        Raises:
            ValueError: a page id is out of range; nothing was written.
        """
        index = self._checked(pages)
        for name, contents in (("key_cache", keys), ("value_cache", values)):
            pool = self._pool[name]
            if isinstance(pool, np.ndarray):
                pool[index] = contents
            else:
                wide = bf16_to_f32(contents) if contents.dtype == np.uint16 else contents
                pool[index] = self._arrays.activations(wide)

    def _checked(self, pages: np.ndarray) -> np.ndarray:
        if pages.size and (int(pages.min()) < 0 or int(pages.max()) >= self._num_pages):
            raise ValueError(f"page ids {pages.min()} to {pages.max()} in a pool of {self._num_pages}")
        return pages.astype(np.int64)  # as torch wants them
