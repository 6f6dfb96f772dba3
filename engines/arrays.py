"""Where the arrays of a step live: in this process's memory, or on the device of an engine maker.

The executor and the probes take every buffer they bind to engines from the maker's `Arrays`, and speak
only of shapes. The integers of a step are written on the host, into one array, of which `mirror` gives
the device's view: one upload a step, and none where the two are the same memory.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS, Precision, activation_dtype
from blockzoo.engines.kv_pages import KVPrecision, kv_dtype, pack_u8, page_width, unpack_u8
from blockzoo.zoo.heap import trim_heap
from blockzoo.zoo.tensors import bf16_to_f32, f32_to_bf16

Array = Any
"""A numpy array or a torch tensor: both are sliced, reshaped and assigned to (`a[...] = b`) alike."""


def byte_range(array: Array) -> tuple[int, int]:
    """The addresses [begin, end) of the elements of a C-contiguous array; begin is end where it has none."""
    if isinstance(array, np.ndarray):
        begin = array.ctypes.data
        assert array.flags.c_contiguous, f"an array of strides {array.strides} has gaps"
    else:  # a torch tensor
        begin = array.data_ptr()
        assert array.is_contiguous(), f"a tensor of strides {array.stride()} has gaps"
    return begin, begin + array.nbytes


Kind = Literal["activation", "f32", "i32"]
"""Element types: that of activations at the maker's precision, float32, int32."""


class Arrays(Protocol):
    """The arrays of one engine maker.

    Attributes:
        records: whether `recorded` gains by steps of equal shapes, so that padding them to few is worth it.
        call_threads: from how many threads engines may run at the same time.
        is_lazy: whether the memory of zeros is taken only as they are written, and `discard` gives it back.
    """

    records: bool
    call_threads: int
    is_lazy: bool

    def zeros(self, shape: Sequence[int], kind: Kind) -> Array:
        """A new array of zeros, C-contiguous."""

    def pages(self, num_pages: int, kv_heads: int, head_dim: int) -> Array:
        """Pages of K, or of V, for engines of the maker: zeros [num_pages, kv_heads, 32, width], typed and as
        wide as its `kv_precision` has them (`kv_pages`)."""

    def discard(self, array: Array, indices: np.ndarray) -> None:
        """Give back the memory of rows of a lazy array, int [n], which nobody reads again before they are
        written."""

    def rows_like(self, part: Array, num_rows: int) -> Array:
        """A new array of `num_rows` rows, for the rest shaped and typed as `part`; not initialized."""

    def mirror(self, host: np.ndarray) -> Array:
        """The device's copy of a host array (which is the array itself, where the device is the host)."""

    def upload(self, host: np.ndarray, device: Array) -> None:
        """Bring a `mirror` up to date after `host` changed."""

    def trim(self) -> None:
        """Return memory that was freed to the system, where the allocator keeps it."""

    def take(self, table: Array, indices: Array, out: Array) -> None:
        """Write `table[indices]` to `out`; every index must be in range."""

    def to_host(self, array: Array) -> np.ndarray:
        """The contents, once everything that was started has written them; bf16 as uint16."""

    def activations(self, values: np.ndarray) -> Array:
        """float32 values as activations."""

    def rotated(self, rows: Array, cos: np.ndarray, sin: np.ndarray) -> Array:
        """K of pages [n, heads, width] under the rotary embedding (half-split layout), a new array.

        `cos` and `sin` are float32 [n, head_dim / 2], on the host; what is computed in float32 is rounded
        once.
        """

    def wait(self) -> None:
        """Return when everything that was started has finished."""

    def recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run`, or something faster with the same effect on the same arrays when called repeatedly."""


class HostArrays:
    """numpy arrays; bf16 activations are held as uint16.

    Args:
        precision: of activations.
        call_threads: see `Arrays`.
        kv_precision: of pages; None: as activations.
    """

    records = False
    is_lazy = True

    def __init__(
        self, precision: Precision, call_threads: int = 1, kv_precision: KVPrecision | None = None
    ) -> None:
        self.call_threads = call_threads
        self._kv_precision: KVPrecision = kv_precision or precision
        self._dtypes: dict[str, Any] = {
            "activation": activation_dtype(precision),
            "f32": np.float32,
            "i32": np.int32,
        }

    def zeros(self, shape: Sequence[int], kind: Kind) -> np.ndarray:
        """A new array of zeros."""
        return np.zeros(tuple(shape), self._dtypes[kind])

    def pages(self, num_pages: int, kv_heads: int, head_dim: int) -> np.ndarray:
        """New pages of zeros."""
        shape = (num_pages, kv_heads, PAGE_TOKENS, page_width(head_dim, self._kv_precision))
        return np.zeros(shape, kv_dtype(self._kv_precision))

    def discard(self, array: np.ndarray, indices: np.ndarray) -> None:
        """Tell the kernel of every run of rows, as far as it is whole pages of memory: they read as zeros."""
        page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
        begin, _ = byte_range(array)
        rows = np.sort(indices).astype(np.int64)
        size = array.nbytes // max(1, len(array))
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
            if run.size:
                first = -(-(begin + int(run[0]) * size) // page) * page
                end = (begin + (int(run[-1]) + 1) * size) // page * page
                if end > first:
                    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)

    def rows_like(self, part: np.ndarray, num_rows: int) -> np.ndarray:
        """A new array of `num_rows` rows like those of `part`."""
        return np.empty((num_rows, *part.shape[1:]), part.dtype)

    def mirror(self, host: np.ndarray) -> np.ndarray:
        """The array itself."""
        return host

    def upload(self, host: np.ndarray, device: np.ndarray) -> None:
        """Nothing to do."""

    def take(self, table: np.ndarray, indices: np.ndarray, out: np.ndarray) -> None:
        """Write `table[indices]` to `out`."""
        np.take(table, indices, axis=0, out=out)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def activations(self, values: np.ndarray) -> np.ndarray:
        """The values, rounded to bf16 where that is the precision."""
        return f32_to_bf16(values) if self._dtypes["activation"] == np.uint16 else values

    def rotated(self, rows: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """The rows rotated; those in 8 bits get a new grid."""
        if rows.dtype == np.uint8:
            return pack_u8(self._rotated(unpack_u8(rows), cos, sin))
        return self._rotated(rows, cos, sin)

    def _rotated(self, rows: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Each half as a plane of its own, in place where it can be."""
        half = rows.shape[-1] // 2
        narrowed = f32_to_bf16 if rows.dtype == np.uint16 else np.asarray
        low, high = (self._widened(rows[..., part]) for part in (slice(half), slice(half, None)))
        cos, sin = cos[:, None], sin[:, None]
        turned = np.empty(rows.shape, rows.dtype)
        plane = low * cos
        plane -= high * sin
        turned[..., :half] = narrowed(plane)
        low *= sin
        high *= cos
        high += low
        turned[..., half:] = narrowed(high)
        return turned

    def _widened(self, rows: np.ndarray) -> np.ndarray:
        """A copy in float32."""
        return bf16_to_f32(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)

    def trim(self) -> None:
        """See `zoo.heap.trim_heap`."""
        trim_heap()

    def wait(self) -> None:
        """Nothing to wait for."""

    def recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` itself."""
        return run
