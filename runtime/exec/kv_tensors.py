"""K and V in the pages of a pool: read and written whole, copied, moved, looked at."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blockzoo.engines.arrays import Array, Arrays
from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.engines.kv_pages import unpack_u8
from blockzoo.runtime.approx.state import Borrowed
from blockzoo.zoo.tensors import bf16_to_f32

_MOVED_TOKENS = 512  # at a time: what is rotated then stays in the processor's cache


class KVTensors:
    """The tensors of one pool. A page id out of range is a ValueError, and then nothing was written.

    Args:
        pool: "key_cache" and "value_cache", each `Arrays.pages`, num_pages or more.
        num_pages: that sequences may have.
        rotation: per chain, cos and sin of the plain rotary embedding, float32 [positions, head_dim].
        arrays: made the pool.
    """

    def __init__(
        self,
        pool: Mapping[str, Array],
        num_pages: int,
        rotation: Mapping[int, tuple[np.ndarray, np.ndarray]],
        arrays: Arrays,
    ) -> None:
        self._pool, self._num_pages, self._rotation, self._arrays = pool, num_pages, rotation, arrays

    @property
    def page_shape(self) -> tuple[int, ...]:
        """[kv_heads, 32, width]."""
        return tuple(self._pool["key_cache"].shape[1:])

    @property
    def page_dtype(self) -> np.dtype:
        """Of what `read` gives."""
        return self._arrays.to_host(self._pool["key_cache"][:0]).dtype

    def read(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """K and V of pages int [...]: each [..., kv_heads, 32, width], bf16 as uint16; a copy."""
        index = self._checked(pages)
        keys, values = (
            self._arrays.to_host(self._pool[name][index]) for name in ("key_cache", "value_cache")
        )
        return keys, values

    def write(self, pages: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """Set the K and V of pages int [...] to what `read` gave."""
        index = self._checked(pages)
        for name, contents in (("key_cache", keys), ("value_cache", values)):
            pool = self._pool[name]
            if isinstance(pool, np.ndarray):
                pool[index] = contents
            else:
                pool[index] = self._to_device(contents)

    def fill(
        self, chain: int, first_layer: int, pages: np.ndarray, keys: np.ndarray, values: np.ndarray
    ) -> None:
        """`write` pages [layers, n] of a sequence, those of layers of its chain from `first_layer` on."""
        self.write(pages, keys, values)

    def copy(self, source: np.ndarray, destination: np.ndarray) -> None:
        """Copy pages of K and V, int32 [n] each; no page is in both."""
        source, destination = self._checked(source), self._checked(destination)
        for pages in self._pool.values():
            pages[destination] = pages[source]

    def borrow(self, chain: int, borrowed: Borrowed, page_table: np.ndarray) -> None:
        """Copy K and V of tokens into the pages of another sequence, K rotated to its new position.

        Args:
            chain: of both, index into the topology's chains; its rotary embedding must be the plain one.
            borrowed: what lies where.
            page_table: int32 [num_layers, pages] of the sequence that takes it.
        """
        self.take_over(chain, borrowed, page_table[:, borrowed.positions // PAGE_TOKENS])

    def take_over(self, chain: int, borrowed: Borrowed, targets: np.ndarray) -> None:
        """The same of any of its layers, into pages `targets`, int [layers, n], of each token."""
        targets = self._checked(targets)
        borrowed = borrowed._replace(pages=self._checked(borrowed.pages))
        first, rest = whole_pages(borrowed)
        self.copy(borrowed.pages[:, first].ravel(), targets[:, first].ravel())
        self._move(chain, Borrowed(*(array[..., rest] for array in borrowed)), targets[:, rest])

    def _move(self, chain: int, borrowed: Borrowed, targets: np.ndarray) -> None:
        """Token by token, into pages `targets` [num_layers, n]."""
        to_slots, moved = borrowed.positions % PAGE_TOKENS, bool(borrowed.shift.any())
        cos, sin = rotation_by(borrowed.shift, *self._rotation[chain])
        for source, destination in zip(borrowed.pages, targets, strict=True):
            for name, pool in self._pool.items():
                if name != "key_cache" or not moved:
                    pool[destination, :, to_slots] = pool[source, :, borrowed.slots]
                    continue
                for begin in range(0, to_slots.size, _MOVED_TOKENS):
                    part = slice(begin, begin + _MOVED_TOKENS)
                    rows = pool[source[part], :, borrowed.slots[part]]  # [n, heads, width]
                    turned = self._arrays.rotated(rows, cos[part], sin[part])
                    pool[destination[part], :, to_slots[part]] = turned

    def values(self, pages: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """V of tokens: float32 [..., n, kv_heads, head_dim].

        Args:
            pages: int [..., columns], rows of a page table.
            positions: int64 [n], that these columns cover.
        """
        found = self._checked(pages[..., positions // PAGE_TOKENS])
        return _widened(self._arrays.to_host(self._pool["value_cache"][found, :, positions % PAGE_TOKENS]))

    def _to_device(self, contents: np.ndarray) -> Array:
        if contents.dtype == np.uint16:
            return self._arrays.activations(bf16_to_f32(contents))
        return self._arrays.mirror(np.require(contents, requirements="W"))

    def _checked(self, pages: np.ndarray) -> np.ndarray:
        if pages.size and (int(pages.min()) < 0 or int(pages.max()) >= self._num_pages):
            raise ValueError(f"page ids {pages.min()} to {pages.max()} in a pool of {self._num_pages}")
        return pages.astype(np.int64)  # as torch wants them


def _widened(contents: np.ndarray) -> np.ndarray:
    """The float32 values of what pages hold."""
    if contents.dtype == np.uint8:
        return unpack_u8(contents)
    return bf16_to_f32(contents) if contents.dtype == np.uint16 else contents.astype(np.float32, copy=False)


def whole_pages(borrowed: Borrowed) -> tuple[np.ndarray, np.ndarray]:
    """Where a page begins that is taken over as it is, from one page and to the same slots: int64 [pages].
    And which tokens are in none: bool [n]."""
    first = np.flatnonzero(borrowed.positions % PAGE_TOKENS == 0)
    first = first[first + PAGE_TOKENS <= borrowed.positions.size]
    offsets = np.arange(PAGE_TOKENS)
    places = first[:, None] + offsets
    whole = (borrowed.slots[places] == offsets) & (borrowed.shift[places] == 0)
    whole &= borrowed.positions[places] == borrowed.positions[first, None] + offsets
    whole &= (borrowed.pages[:, places] == borrowed.pages[:, first, None]).all(0)
    rest = np.ones(borrowed.positions.size, bool)
    rest[places[whole.all(1)]] = False
    return first[whole.all(1)], rest


def rotation_by(shift: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine, float32 [n, head_dim / 2], that rotate K by `shift` positions, int [n] of any sign.

    `cos` and `sin` float32 [positions, head_dim] are the tables of the plain rotary embedding, halves
    duplicated: the rotation by a difference of positions is that of the position itself.
    """
    half, distance = cos.shape[1] // 2, np.abs(shift)
    return cos[distance, :half], sin[distance, :half] * np.sign(shift).astype(np.float32)[:, None]
