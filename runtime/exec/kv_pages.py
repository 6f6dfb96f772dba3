"""K and V in the pool's pages, as whole pages and as single tokens: copying, moving, looking."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blockzoo.engines.arrays import Array, Arrays
from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.approx.matching import Borrowed
from blockzoo.zoo.tensors import bf16_to_f32

_MOVED_TOKENS = 512  # at a time: what is rotated then stays in the processor's cache


class KVPages:
    """The tensors of one pool.

    Args:
        pool: "key_cache" and "value_cache", each [num_pages or more, kv_heads, 32, head_dim].
        num_pages: that sequences may have.
        rotation: per chain, cos and sin of the plain rotary embedding, float32 [positions, head_dim].
        device: made the pool.
    """

    def __init__(
        self,
        pool: Mapping[str, Array],
        num_pages: int,
        rotation: Mapping[int, tuple[np.ndarray, np.ndarray]],
        device: Arrays,
    ) -> None:
        self._pool, self._num_pages, self._rotation, self._device = pool, num_pages, rotation, device

    def copy(self, source: np.ndarray, destination: np.ndarray) -> None:
        """Copy pages of K and V, int32 [n] each; no page is in both.

        Raises:
            ValueError: a page id is out of range; nothing was copied.
        """
        self._check(source, destination)
        source, destination = source.astype(np.int64), destination.astype(np.int64)  # as torch wants them
        for pages in self._pool.values():
            pages[destination] = pages[source]

    def borrow(self, chain: int, borrowed: Borrowed, page_table: np.ndarray) -> None:
        """Copy K and V of tokens into the pages of another sequence, K rotated to its new position.

        Args:
            chain: of both, index into the topology's chains; its rotary embedding must be the plain one.
            borrowed: what lies where.
            page_table: int32 [num_layers, pages] of the sequence that takes it.

        Raises:
            ValueError: a page id is out of range; nothing was copied.
        """
        columns, to_slots = borrowed.positions // PAGE_TOKENS, borrowed.positions % PAGE_TOKENS
        pages = page_table[:, columns].astype(np.int64)
        self._check(pages, borrowed.pages)
        moved = bool(borrowed.shift.any())
        cos, sin = rotation_by(borrowed.shift, *self._rotation[chain])
        for source, destination in zip(borrowed.pages, pages, strict=True):
            for name, pool in self._pool.items():
                if name != "key_cache" or not moved:
                    pool[destination, :, to_slots] = pool[source, :, borrowed.slots]
                    continue
                for begin in range(0, columns.size, _MOVED_TOKENS):
                    part = slice(begin, begin + _MOVED_TOKENS)
                    rows = pool[source[part], :, borrowed.slots[part]]  # [n, heads, head_dim]
                    turned = self._device.rotated(rows, cos[part], sin[part])
                    pool[destination[part], :, to_slots[part]] = turned

    def values(self, pages: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """V of tokens: float32 [..., n, kv_heads, head_dim].

        Args:
            pages: int [..., columns], rows of a page table.
            positions: int64 [n], that these columns cover.
        """
        found = pages[..., positions // PAGE_TOKENS].astype(np.int64)
        self._check(found)
        return self._wide(self._pool["value_cache"][found, :, positions % PAGE_TOKENS])

    def _wide(self, rows: Array) -> np.ndarray:
        host = self._device.to_host(rows)
        return bf16_to_f32(host) if host.dtype == np.uint16 else host

    def _check(self, *pages: np.ndarray) -> None:
        for ids in pages:
            if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self._num_pages):
                raise ValueError(f"page ids {ids.min()} to {ids.max()} in a pool of {self._num_pages}")


def rotation_by(shift: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine, float32 [n, head_dim / 2], that rotate K by `shift` positions, int [n] of any sign.

    `cos` and `sin` float32 [positions, head_dim] are the tables of the plain rotary embedding, halves
    duplicated: the rotation by a difference of positions is that of the position itself.
    """
    half, distance = cos.shape[1] // 2, np.abs(shift)
    return cos[distance, :half], sin[distance, :half] * np.sign(shift).astype(np.float32)[:, None]
