"""Weight tensors in bf16, f16 or f32, zero-copy over mmapped safetensors files, and exact conversions."""

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

Dtype = Literal["bf16", "f16", "f32"]
_NUMPY: dict[str, type] = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}
_SAFETENSORS: dict[str, Dtype] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
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
    """One weight tensor; `data` is C-contiguous, bf16 as its uint16 bit pattern (numpy has no bf16)."""

    dtype: Dtype
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, outermost dimension first."""
        return self.data.shape

    def to_f32(self) -> np.ndarray:
        """The values in float32, exactly; a copy except where the tensor is f32 already."""
        if self.dtype == "bf16":
            return bf16_to_f32(self.data)
        return self.data.astype(np.float32, copy=False)

    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
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
        entry = self._header[name]
        dtype = _SAFETENSORS.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"tensor {name} has dtype {entry['dtype']} (supported: BF16, F16, F32)")
        begin, end = entry["data_offsets"]
        numpy_type: np.dtype[Any] = np.dtype(_NUMPY[dtype])
        count = (end - begin) // numpy_type.itemsize
        data = np.frombuffer(self.mapping, numpy_type, count, self._data_begin + begin)
        return BlockTensor(dtype, data.reshape(entry["shape"]))

    def drop_pages(self) -> None:
        """Let the kernel drop the file's pages of this process; a later read loads them again."""
        self.mapping.madvise(mmap.MADV_DONTNEED)


def write_tensor_file(path: Path, tensors: Mapping[str, BlockTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file and fsync it; data starts on a 64-byte border, wide elements first."""
    header, ordered = _file_header(tensors, metadata)
    with open(path, "wb") as file:
        file.write(header)
        for tensor in ordered:
            np.ascontiguousarray(tensor.data).tofile(file)
        file.flush()
        os.fsync(file.fileno())


def tensor_file_bytes(tensors: Mapping[str, BlockTensor], metadata: Mapping[str, str]) -> int:
    """The size in bytes of the file that `write_tensor_file` would write."""
    header, ordered = _file_header(tensors, metadata)
    return len(header) + sum(tensor.data.nbytes for tensor in ordered)


def _file_header(
    tensors: Mapping[str, BlockTensor], metadata: Mapping[str, str]
) -> tuple[bytes, list[BlockTensor]]:
    names = {dtype: name for name, dtype in _SAFETENSORS.items()}
    order = sorted(tensors, key=lambda name: -tensors[name].data.itemsize)  # stable
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.data.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text, [tensors[name] for name in order]
