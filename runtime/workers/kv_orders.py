"""What the head asks of pages that lie in workers, as messages, and how a worker does it.

copy     pages int32 [2, n]: from, to
borrow   (chain, tokens, layers), then int32: positions, slots, shift, pages [layers, tokens] that hold them,
         pages [layers, tokens] that take them; of the layers that are here
values   int32 [2, n]: pages, slots in them; answered by V, float32 [n, kv_heads, head_dim]
read     pages int32 [n]; answered by their K, their V
write    pages int32 [n], their K, their V; answered by nothing, once it is done
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.approx.state import Borrowed
from blockzoo.runtime.exec.kv_tensors import KVTensors

KINDS = frozenset({b"copy", b"borrow", b"values", b"read", b"write"})
_HEADER = 3  # integers of `borrow` before its arrays


def pack_borrow(chain: int, borrowed: Borrowed, targets: np.ndarray) -> bytes:
    """Of some layers of a chain, what is taken over, and the pages int [layers, tokens] that it comes to."""
    layers, tokens = targets.shape
    tables = (borrowed.pages.ravel(), targets.ravel())
    parts = ([chain, tokens, layers], borrowed.positions, borrowed.slots, borrowed.shift, *tables)
    return np.concatenate(parts).astype(np.int32).tobytes()


def obey(kv: KVTensors, kind: bytes, frames: Sequence[bytes]) -> list[np.ndarray] | None:
    """Do what a message says; what is to be answered, None where nobody waits for that."""
    ints = np.frombuffer(frames[0], np.int32)
    if kind == b"copy":
        kv.copy(*ints.reshape(2, -1))
    elif kind == b"borrow":
        _borrow(kv, ints)
    elif kind == b"values":
        pages, slots = ints.reshape(2, -1)
        return [kv.values(pages, np.arange(pages.size) * PAGE_TOKENS + slots)]
    elif kind == b"read":
        return list(kv.read(ints))
    else:
        write(kv, frames)
        return []
    return None


def write(kv: KVTensors, frames: Sequence[bytes]) -> int:
    """Set pages to the K and V that have come with them; how many they are."""
    pages = np.frombuffer(frames[0], np.int32)
    shape = (pages.size, *kv.page_shape)
    kv.write(pages, *(np.frombuffer(each, kv.page_dtype).reshape(shape) for each in frames[1:]))
    return pages.size


def _borrow(kv: KVTensors, ints: np.ndarray) -> None:
    chain, tokens, layers = ints[:_HEADER].tolist()
    ends = np.cumsum([tokens] * 3 + [layers * tokens])
    positions, slots, shift, pages, targets = np.split(ints[_HEADER:].astype(np.int64), ends)
    shape = layers, tokens
    kv.take_over(chain, Borrowed(positions, pages.reshape(shape), slots, shift), targets.reshape(shape))
