"""GGUF files (llama.cpp's): the metadata and the tensors of one mapped file, quantized ones in float32.

The header is read without trust: every count, length and offset is checked against the file before anything
is allocated for it. Blocks of quantized values are taken apart by the `gguf` package, a few rows at a time.
"""

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError
from blockzoo.zoo.tensors import BlockTensor, Dtype

Value: TypeAlias = "bool | int | float | str | list[str] | tuple[float, ...]"
"""Of a metadata key: an array of texts is a list, one of numbers a tuple."""

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32, _F16, _BF16 = 0, 1, 30
# type id -> (name, elements of a block, bytes of a block)
_TYPES = {
    _F32: ("F32", 1, 4),
    _F16: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    _BF16: ("BF16", 1, 2),
}
_PLAIN: dict[int, tuple[Dtype, str]] = {_F32: ("f32", "<f4"), _F16: ("f16", "<f2"), _BF16: ("bf16", "<u2")}
_QUANTIZATION_VERSION = 2  # of the blocks' layout; an absent one is taken for it
_MOST_KEYS = _MOST_TENSORS = 1 << 16
_MOST_ELEMENTS = 1 << 22  # of a metadata array: vocabularies have up to 10^6 tokens
_LONGEST_KEY, _LONGEST_STRING = (1 << 16) - 1, 1 << 24  # bytes
_CHUNK = 1 << 22  # values dequantized in one go: the library holds them twice


@dataclass(frozen=True, slots=True)
class _Place:
    type_id: int
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class GgufFile:
    """A GGUF file, mapped read-only.

    Raises CheckpointError for a damaged file, UnsupportedModelError for one that is sound but not read here;
    both name it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dequantize, self._type_name = _library(path)
        try:
            with open(path, "rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"{path}: not readable ({error})") from error
        header = _Header(path, self._mapping)
        num_tensors = header.begin()
        self.metadata: dict[str, Value] = header.metadata()
        """By key, as in the file."""
        self._places = self._read_places(header, num_tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, as in the file."""
        return tuple(self._places)

    @property
    def common_dtype(self) -> Dtype:
        """The dtype in which most values are read."""
        sizes: Counter[Dtype] = Counter()
        for place in self._places.values():
            sizes[_PLAIN.get(place.type_id, ("f32", ""))[0]] += math.prod(place.shape)
        return sizes.most_common(1)[0][0] if sizes else "f32"

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, outermost dimension first."""
        return self._places[name].shape

    def tensor(self, name: str, rows: np.ndarray | None = None) -> BlockTensor:
        """The tensor, its rows in the order `rows` where that is given.

        F32, F16 and BF16 are views of the file (copies with `rows`); quantized values are f32, which holds
        all of them exactly.
        """
        place = self._places[name]
        type_name, block, block_bytes = _TYPES[place.type_id]
        raw = np.frombuffer(self._mapping, np.uint8, place.num_bytes, place.begin)
        row_bytes = place.shape[-1] // block * block_bytes
        if place.type_id in _PLAIN:
            dtype, kind = _PLAIN[place.type_id]
            values = raw.view(kind).reshape(place.shape)
            return BlockTensor(dtype, values if rows is None else values[rows])
        raw = raw.reshape(-1, row_bytes)
        out = np.empty((len(raw), place.shape[-1]), np.float32)
        step = max(1, _CHUNK // place.shape[-1])
        with np.errstate(all="ignore"):  # infinite scales: told when the tensor is checked
            for i in range(0, len(raw), step):
                part = raw[i : i + step] if rows is None else raw[rows[i : i + step]]
                out[i : i + step] = self._dequantize(part, type_name)
        return BlockTensor("f32", out.reshape(place.shape))

    def _read_places(self, header: "_Header", count: int) -> dict[str, _Place]:
        places: dict[str, _Place] = {}
        for _ in range(count):
            name, type_id, shape, offset = header.tensor()
            if name in places:
                raise CheckpointError(f"{self.path}: there are two tensors {name!r:.80}")
            if type_id not in _TYPES:
                known = ", ".join(type_name for type_name, *_ in _TYPES.values())
                raise UnsupportedModelError(
                    f"{self.path}: tensor {name!r:.80} is of type {self._type_name(type_id)}, which is not "
                    f"supported (supported: {known})"
                )
            _, block, block_bytes = _TYPES[type_id]
            elements = math.prod(shape)
            if shape[-1] % block:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r:.80} has rows of {shape[-1]} values, and its type has "
                    f"blocks of {block}"
                )
            places[name] = _Place(type_id, shape, offset, elements // block * block_bytes)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in [1 << i for i in range(17)]:
            raise CheckpointError(
                f"{self.path}: general.alignment is {alignment!r:.40}, expected a power of two up to 65536"
            )
        if any(_TYPES[p.type_id][1] > 1 for p in places.values()):
            version = self.metadata.get("general.quantization_version", _QUANTIZATION_VERSION)
            if version != _QUANTIZATION_VERSION:
                raise UnsupportedModelError(
                    f"{self.path}: general.quantization_version {version!r:.40} is not supported (expected "
                    f"{_QUANTIZATION_VERSION}): quantize the model again"
                )
        return self._located(places, -(-header.position // alignment) * alignment, alignment)

    def _located(self, places: dict[str, _Place], data_begin: int, alignment: int) -> dict[str, _Place]:
        """The places from the beginning of the file, all of them inside it and apart from each other."""
        size, free = len(self._mapping), data_begin
        located = {
            name: _Place(place.type_id, place.shape, data_begin + place.begin, place.num_bytes)
            for name, place in places.items()
        }
        for name, place in sorted(located.items(), key=lambda item: item[1].begin):
            if place.begin + place.num_bytes > size:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r:.80} ends at byte {place.begin + place.num_bytes}, and the "
                    f"file has {size}: it is truncated; copy or download it again"
                )
            if (place.begin - data_begin) % alignment or place.begin < free:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r:.80} begins at byte {place.begin}, which is inside another "
                    f"one or not on a border of {alignment} bytes"
                )
            free = place.begin + place.num_bytes
        return located


class _Header:
    """What stands before the data of a file, read from front to back."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path, self._mapping, self.position = path, mapping, 0

    def begin(self) -> int:
        """Check magic and version; the number of tensors."""
        magic = self._take(4, "magic")
        if magic != _MAGIC:
            raise CheckpointError(
                f"{self.path} is no GGUF file (it begins with {magic!r}): expected one, or the folder of an "
                "HF checkpoint"
            )
        (version,) = self._unpack("I", "version")
        if version & 0xFFFF == 0:
            raise UnsupportedModelError(f"{self.path}: big-endian GGUF files are not supported")
        if version not in _VERSIONS:
            raise UnsupportedModelError(f"{self.path}: GGUF version {version} is not supported (expected 3)")
        num_tensors, self._num_keys = self._unpack("QQ", "counts")
        for what, count, most in (
            ("tensors", num_tensors, _MOST_TENSORS),
            ("keys", self._num_keys, _MOST_KEYS),
        ):
            if count > most:
                raise CheckpointError(f"{self.path}: {count} {what}, and at most {most} are read")
        return int(num_tensors)

    def metadata(self) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for _ in range(self._num_keys):
            key = self._string("a metadata key", _LONGEST_KEY)
            (type_id,) = self._unpack("I", key)
            if key in found:
                raise CheckpointError(f"{self.path}: there are two metadata keys {key!r:.80}")
            found[key] = self._value(type_id, f"metadata {key:.80}")
        return found

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, type, shape (outermost first) and offset in the data of the next tensor."""
        name = self._string("a tensor's name", _LONGEST_KEY)
        what = f"tensor {name:.80}"
        (num_dims,) = self._unpack("I", what)
        if not 1 <= num_dims <= 4:
            raise CheckpointError(f"{self.path}: {what} has {num_dims} dimensions, expected 1 to 4")
        dims = self._unpack(f"{num_dims}Q", what)
        if 0 in dims:
            raise CheckpointError(f"{self.path}: {what} has shape {list(reversed(dims))}: it is empty")
        type_id, offset = self._unpack("IQ", what)
        return name, type_id, tuple(reversed(dims)), offset

    def _value(self, type_id: int, what: str) -> Value:
        if type_id in _SCALARS:
            (value,) = self._unpack(_SCALARS[type_id], what)
            # f32 as the shortest decimal of it: 1e-05, as it was written, not 9.99999974e-06
            return float(str(np.float32(value))) if _SCALARS[type_id] == "f" else value
        if type_id == _STRING:
            return self._string(what, _LONGEST_STRING)
        if type_id != _ARRAY:
            raise CheckpointError(f"{self.path}: {what} is of type {type_id}, which there is not")
        element, count = self._unpack("IQ", what)
        if count > _MOST_ELEMENTS:
            raise CheckpointError(
                f"{self.path}: {what} has {count} elements, at most {_MOST_ELEMENTS} are read"
            )
        if element == _STRING:
            return [self._string(what, _LONGEST_STRING) for _ in range(count)]
        if element not in _SCALARS:
            raise CheckpointError(f"{self.path}: {what} is an array of type {element}, which is not read")
        kind = np.dtype("<" + _SCALARS[element])
        return tuple(np.frombuffer(self._take(count * kind.itemsize, what), kind).tolist())

    def _string(self, what: str, longest: int) -> str:
        (length,) = self._unpack("Q", what)
        if length > longest:
            raise CheckpointError(f"{self.path}: {what} has {length} bytes, at most {longest} are read")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is no UTF-8 ({error})") from error

    def _unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self._take(struct.calcsize("<" + layout), what))

    def _take(self, count: int, what: str) -> bytes:
        end = self.position + count
        if end > len(self._mapping):
            raise CheckpointError(
                f"{self.path}: the file ends inside its header ({what}): it is truncated; copy or download "
                "it again"
            )
        taken = self._mapping[self.position : end]
        self.position = end
        return taken


def _library(path: Path) -> tuple[Any, Any]:
    """(blocks, name of the type) -> f32 values; type id -> name."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise CheckpointError(
            f"{path}: GGUF files are read with the package gguf: pip install 'blockzoo[gguf]'"
        ) from error

    def type_name(type_id: int) -> str:
        return next((kind.name for kind in GGMLQuantizationType if kind.value == type_id), str(type_id))

    return lambda blocks, name: dequantize(blocks, GGMLQuantizationType[name]), type_name
