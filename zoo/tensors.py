"""Weight tensors in bf16, f16, f32 or quantized, zero-copy over mmapped safetensors files; conversions."""

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from blockzoo.zoo.packing import ROTATED, QuantizedDtype, dequantized, rotated, rotates, unpack_i4

Dtype = Literal["bf16", "f16", "f32"]
StoredDtype = Literal["bf16", "f16", "f32", "i8", "i4"]
"""Of a tensor in a zoo; models are given in a `Dtype`."""
_NUMPY: dict[str, type] = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}
_NUMPY |= {"i8": np.int8, "i4": np.uint8}
_SAFETENSORS: dict[str, Dtype] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
_QUANTIZED: dict[str, QuantizedDtype] = {"I8": "i8", "U8": "i4"}
_SCALES, _OFFSETS = ".scales", ".offsets"  # behind the name of a quantized tensor: of what belongs to it
_ROTATED = ".rotated.scales"  # instead of the first, of one that is rotated
_CHUNK = 1 << 22  # elements looked at in one go: temporaries stay in the cache, not in gigabytes


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """The exact float32 values of bf16 bits (uint16), same shape."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """The nearest bf16 bits (uint16) of float32 values, ties to even, same shape. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    result = rounded.view(np.uint16)[..., 1::2].copy()  # the upper halves: mapped files are little-endian too
    if np.isnan(np.max(values, initial=-np.inf)):  # which is NaN where any of them is
        result[np.isnan(values)] = 0x7FC0
    return result


@dataclass(frozen=True, slots=True, eq=False)
class BlockTensor:
    """One weight tensor; `data` is C-contiguous, bf16 as its uint16 bit pattern (numpy has no bf16).

    A quantized matrix (see `packing`) has int8 [out, in], or of i4 uint8 [out, in / 2], and `scales`, float32
    [out, groups]; it may have `offsets`, as the scales, and be `rotated`.
    """

    dtype: StoredDtype
    data: np.ndarray
    scales: np.ndarray | None = None
    offsets: np.ndarray | None = None
    rotated: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, outermost dimension first."""
        if self.dtype == "i4":
            return self.data.shape[0], 2 * self.data.shape[1]
        return self.data.shape

    @property
    def given_dtype(self) -> Dtype:
        """The dtype of a tensor that is not quantized."""
        assert self.dtype != "i8" and self.dtype != "i4", "quantized"  # noqa: PT018
        return self.dtype

    @property
    def size(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the values, with scales and offsets where there are any."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The data, and the scales and offsets where there are any."""
        return tuple(each for each in (self.data, self.scales, self.offsets) if each is not None)

    @property
    def kind(self) -> tuple[str, int | None, bool, bool]:
        """What matrices have in common that may be stacked as they are."""
        groups = None if self.scales is None else self.scales.shape[1]
        return self.dtype, groups, self.offsets is not None, self.rotated

    @property
    def integers(self) -> np.ndarray:
        """Of a quantized matrix, int8 [out, in]."""
        return unpack_i4(self.data) if self.dtype == "i4" else self.data

    def to_f32(self) -> np.ndarray:
        """The values in float32, exactly; a copy except where the tensor is f32 already."""
        if self.scales is not None:
            values = dequantized(self.integers, self.scales, self.offsets)
            return rotated(values) if self.rotated else values
        if self.dtype == "bf16":
            return bf16_to_f32(self.data)
        return self.data.astype(np.float32, copy=False)

    def rows(self, index: np.ndarray | slice) -> "BlockTensor":
        """Some rows: a copy, or of a slice a view."""
        return self.of([array[index] for array in self.arrays])

    def of(self, arrays: Sequence[np.ndarray]) -> "BlockTensor":
        """Another tensor of the same `kind`, of its `arrays`."""
        data, *others = arrays
        scales, offsets = (*others, None, None)[:2]
        return BlockTensor(self.dtype, data, scales, offsets, self.rotated)

    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        if self.scales is not None:
            return all(bool(np.isfinite(array).all()) for array in self.arrays[1:])
        for part in _chunks(self.data):
            if self.dtype == "bf16":
                if bool(np.any((part & np.uint16(0x7F80)) == np.uint16(0x7F80))):
                    return False
            elif not bool(np.isfinite(part).all()):
                return False
        return True


def _chunks(data: np.ndarray) -> list[np.ndarray]:
    flat = data.reshape(-1)
    return [flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK)]


def stacked(parts: Sequence[BlockTensor]) -> BlockTensor:
    """Tensors of equal width on top of each other: in f32 where they are of different types."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({part.kind for part in parts}) > 1:
        return BlockTensor("f32", np.concatenate([part.to_f32() for part in parts]))
    arrays = zip(*(part.arrays for part in parts), strict=True)
    return first.of([np.concatenate(each) for each in arrays])


def runs_of_a_type(parts: Sequence[BlockTensor]) -> list[list[BlockTensor]]:
    """Neighbours of one kind together: dtype, columns to a scale, with offsets or without, rotated or not."""
    return [list(run) for _, run in groupby(parts, lambda tensor: tensor.kind)]


def from_f32(values: np.ndarray, dtype: Dtype) -> BlockTensor:
    """Round float32 values to `dtype` (to nearest, ties to even); f16 overflow becomes infinite."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "f32":
        return BlockTensor("f32", values)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return BlockTensor("f16", values.astype(np.float16))
    return BlockTensor("bf16", f32_to_bf16(values))


def narrowed(tensor: BlockTensor) -> BlockTensor:
    """An f32 tensor whose values are all exactly bf16, as bf16; any other tensor as it is.

    Lossless: a copy of a bf16 checkpoint that was saved in f32 gets the same blocks.
    """
    if tensor.dtype != "f32":
        return tensor
    bits = tensor.data.view(np.uint32)
    if any(bool(np.any(part & np.uint32(0xFFFF))) for part in _chunks(bits)):
        return tensor
    return BlockTensor("bf16", (bits >> np.uint32(16)).astype(np.uint16))


class TensorFile:
    """A safetensors file, mapped read-only; its tensors are views of the mapping and keep it alive.

    Raises ValueError with a reason when the file is truncated or corrupt (the caller knows whose file it is).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(str(path), framework="numpy"):  # the library checks the header against the file
                pass
        except SafetensorError as error:
            raise ValueError(f"not a whole safetensors file ({error})") from error
        with open(path, "rb") as file:
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header_bytes = int.from_bytes(self.mapping[:8], "little")
        self._data_begin = 8 + header_bytes
        header: dict[str, Any] = json.loads(self.mapping[8 : self._data_begin])
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._header = header

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the file."""
        return tuple(self._header)

    def tensor(self, name: str) -> BlockTensor:
        """The tensor, zero-copy. Raises ValueError for a dtype other than BF16, F16, F32."""
        dtype = _SAFETENSORS.get(self._header[name]["dtype"])
        if dtype is None:
            seen = self._header[name]["dtype"]
            raise ValueError(f"tensor {name} has dtype {seen} (supported: BF16, F16, F32)")
        return BlockTensor(dtype, self._array(name, dtype))

    def stored(self, name: str) -> BlockTensor:
        """As `tensor`, of a file of a zoo, where matrices may be quantized. Raises KeyError, ValueError."""
        dtype = _QUANTIZED.get(self._header[name]["dtype"])
        if dtype is None:
            return self.tensor(name)
        is_rotated = name + _ROTATED in self._header
        data, scales = self._array(name, dtype), self.tensor(name + (_ROTATED if is_rotated else _SCALES))
        tensor = BlockTensor(dtype, data, scales.data, rotated=is_rotated)
        if is_rotated and data.ndim == 2 and not rotates(tensor.shape[1]):
            raise ValueError(f"{name} is rotated, but {tensor.shape[1]} columns are no multiple of {ROTATED}")
        fits = data.ndim == 2 and scales.dtype == "f32" and scales.data.ndim == 2
        if not fits or len(scales.data) != len(data) or not _divides(scales.shape[1], tensor.shape[1]):
            raise ValueError(f"the scales of {name} are {scales.dtype} {list(scales.shape)}")
        if name + _OFFSETS not in self._header:
            return tensor
        offsets = self.tensor(name + _OFFSETS)
        if offsets.dtype != "f32" or offsets.shape != scales.shape:
            raise ValueError(f"the offsets of {name} are {offsets.dtype} {list(offsets.shape)}")
        return BlockTensor(dtype, data, scales.data, offsets.data, is_rotated)

    def octets(self, name: str) -> np.ndarray:
        """A tensor of bytes that its reader knows the meaning of, uint8, zero-copy. Raises ValueError for a
        dtype other than I8."""
        if (seen := self._header[name]["dtype"]) != "I8":
            raise ValueError(f"tensor {name} has dtype {seen} (expected I8)")
        return self._array(name, "i8").view(np.uint8)

    def _array(self, name: str, dtype: StoredDtype) -> np.ndarray:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        numpy_type: np.dtype[Any] = np.dtype(_NUMPY[dtype])
        count = (end - begin) // numpy_type.itemsize
        data = np.frombuffer(self.mapping, numpy_type, count, self._data_begin + begin)
        return data.reshape(entry["shape"])

    def drop_pages(self) -> None:
        """Let the kernel drop the file's pages of this process; a later read loads them again."""
        self.mapping.madvise(mmap.MADV_DONTNEED)


def write_tensor_file(path: Path, tensors: Mapping[str, BlockTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file and fsync it; data starts on a 64-byte border, wide elements first."""
    header, ordered = _file_header(tensors, metadata)
    with open(path, "wb") as file:
        file.write(header)
        for data in ordered:
            np.ascontiguousarray(data).tofile(file)
        file.flush()
        os.fsync(file.fileno())


def tensor_file_bytes(tensors: Mapping[str, BlockTensor], metadata: Mapping[str, str]) -> int:
    """The size in bytes of the file that `write_tensor_file` would write."""
    header, ordered = _file_header(tensors, metadata)
    return len(header) + sum(data.nbytes for data in ordered)


def _file_header(
    tensors: Mapping[str, BlockTensor], metadata: Mapping[str, str]
) -> tuple[bytes, list[np.ndarray]]:
    names: dict[str, str] = {dtype: name for name, dtype in (_SAFETENSORS | _QUANTIZED).items()}
    arrays = {name: (names[tensor.dtype], tensor.data) for name, tensor in tensors.items()}
    arrays |= {
        name + (_ROTATED if t.rotated else _SCALES): ("F32", t.scales)
        for name, t in tensors.items()
        if t.scales is not None
    }
    arrays |= {name + _OFFSETS: ("F32", t.offsets) for name, t in tensors.items() if t.offsets is not None}
    order = sorted(arrays, key=lambda name: -arrays[name][1].itemsize)  # stable
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        dtype, data = arrays[name]
        end = offset + data.nbytes
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text, [arrays[name][1] for name in order]


def _divides(count: int, whole: int) -> bool:
    return 0 < count <= whole and whole % count == 0
