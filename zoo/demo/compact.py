"""Tensors in a file as small as can be without loss: `NAME.planes`.

The bytes of all tensors of one dtype are taken apart into planes, so that exponents, which tell much of one
another, stand apart from mantissas, which tell nothing. A tensor with a reference (the same tensor before
tuning) is stored as its distance from it. Of a few codings each plane gets the one that makes it smallest.

The file: the header's length (8 bytes), the header (JSON, xz), the planes in its order.
"""

from __future__ import annotations

import json
import lzma
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "U8": np.dtype("u1"),
}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_AGAINST = " to reference"  # marks a kind whose planes are distances, not values
Tensors = Mapping[str, np.ndarray]


def write_compact(
    path: Path, tensors: Tensors, facts: Mapping[str, str] | None = None, reference: Tensors | None = None
) -> None:
    """Writes uint16 (BF16), float32, float16 and uint8 arrays, and what is to be known of them.

    BF16 tensors are stored by their distance from those in `reference` of the same name and shape. Raises
    ValueError for another dtype.
    """
    reference = reference or {}
    kinds: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAME_OF:
            raise ValueError(f"{name} is {tensor.dtype}; expected one of {[str(one) for one in _NAME_OF]}")
        kind = _NAME_OF[tensor.dtype]
        if kind == "BF16" and name in reference and reference[name].shape == tensor.shape:
            kind += _AGAINST
        kinds.setdefault(kind, []).append(name)
    planes, coded = [], []
    for kind, names in kinds.items():
        names.sort(key=_role)
        words = _joined(tensors, names)
        against = _joined(reference, names) if kind.endswith(_AGAINST) else None
        for plane in _planes(words, against):
            coding, data = min(
                ((coding, encode(plane)) for coding, encode in _ENCODERS.items()), key=lambda one: len(one[1])
            )
            planes.append([kind, coding, len(data)])
            coded.append(data)
    header = {
        "facts": dict(facts or {}),
        "tensors": [[name, list(tensor.shape)] for name, tensor in tensors.items()],
        "kinds": kinds,
        "planes": planes,
        "crc32": zlib.crc32(b"".join(coded)),
    }
    text = _xz(json.dumps(header, separators=(",", ":")).encode())
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *coded]))


def read_compact(
    path: Path, reference: Tensors | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors, in the order and bit by bit as they were written, and the facts beside them.

    `reference` is what the file was written with; of another with the same shapes it makes other tensors.
    Raises OSError, ValueError for a file that is damaged and a reference that lacks a tensor.
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(lzma.decompress(data[8:start]))
    except (lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{path} is no file of tensors in planes: its header cannot be read") from error
    if zlib.crc32(data[start:]) != header["crc32"]:
        raise ValueError(f"{path} is damaged: its {len(data) - start} bytes of planes are not those written")
    planes: dict[str, list[bytes]] = {}
    for kind, coding, size in header["planes"]:
        planes.setdefault(kind, []).append(_DECODERS[coding](data[start : start + size]))
        start += size
    shapes: dict[str, list[int]] = dict(header["tensors"])
    flat: dict[str, np.ndarray] = {}
    for kind, names in header["kinds"].items():
        against = _references(path, reference or {}, names, shapes) if kind.endswith(_AGAINST) else None
        values = _words(planes[kind], against).view(DTYPES[kind.removesuffix(_AGAINST)])
        ends = np.cumsum([np.prod(shapes[name], dtype=np.int64) for name in names])
        flat |= dict(zip(names, np.split(values, ends[:-1]), strict=True))
    return {name: flat[name].reshape(shape) for name, shape in shapes.items()}, header["facts"]


def _role(name: str) -> tuple[str, list[int]]:
    """Sorts the same matrix of all layers together: their values are alike."""
    return re.sub(r"\d+", "", name), [int(digits) for digits in re.findall(r"\d+", name)]


def _references(path: Path, reference: Tensors, names: list[str], shapes: dict[str, list[int]]) -> np.ndarray:
    for name in names:
        if name not in reference or list(reference[name].shape) != shapes[name]:
            raise ValueError(
                f"{path} holds {name} {shapes[name]} by its distance from a reference: give one that has it"
            )
    return _joined(reference, names)


def _joined(tensors: Tensors, names: list[str]) -> np.ndarray:
    """The bits of tensors of one dtype behind one another: [values], unsigned."""
    values = np.concatenate([tensors[name].ravel() for name in names])
    return values.view(f"<u{values.itemsize}")


def _planes(words: np.ndarray, against: np.ndarray | None) -> list[bytes]:
    """The bytes of the words, the highest first; a float's bits start with its exponent, its sign is last."""
    if against is not None:
        step = (_ranks(words) - _ranks(against)).view(np.int16)
        step = step << 1 ^ step >> 15  # 0, -1, 1, -2, ... as 0, 1, 2, 3, ...
        words = step.view(np.uint16)[_by_size(against)]
    elif words.itemsize > 1:
        words = words << 1 | words >> (8 * words.itemsize - 1)
    apart = words.astype(f">u{words.itemsize}").view(np.uint8).reshape(-1, words.itemsize)
    return [plane.tobytes() for plane in apart.T]


def _words(planes: list[bytes], against: np.ndarray | None) -> np.ndarray:
    """What `_planes` took apart."""
    apart = np.stack([np.frombuffer(plane, np.uint8) for plane in planes], -1)
    words = apart.view(f">u{len(planes)}")[:, 0].astype(f"<u{len(planes)}")
    if against is not None:
        steps = np.empty_like(words)
        steps[_by_size(against)] = words >> 1 ^ -(words & 1)
        return _values(_ranks(against) + steps)
    if words.itemsize > 1:
        words = words >> 1 | words << (8 * words.itemsize - 1)
    return words


def _ranks(bits: np.ndarray) -> np.ndarray:
    """Of bf16 bits the place of the value among all, from the least: neighbours differ by one."""
    return np.where(bits >> 15, ~bits, bits | np.uint16(0x8000))


def _values(ranks: np.ndarray) -> np.ndarray:
    """The bf16 bits of places."""
    return np.where(ranks >> 15, ranks & np.uint16(0x7FFF), ~ranks)


def _by_size(bits: np.ndarray) -> np.ndarray:
    """Indices of bf16 values by magnitude: the smaller a value, the more steps wide is the same change."""
    return np.argsort(bits & np.uint16(0x7FFF), kind="stable")


def _xz(data: bytes) -> bytes:
    return lzma.compress(data, check=lzma.CHECK_NONE, preset=9 | lzma.PRESET_EXTREME)


def _deflate(strategy: int) -> Callable[[bytes], bytes]:
    def encode(data: bytes) -> bytes:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        return coder.compress(data) + coder.flush()

    return encode


_ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "huffman": _deflate(zlib.Z_HUFFMAN_ONLY),  # of values without any order: near their entropy
    "deflate": _deflate(zlib.Z_DEFAULT_STRATEGY),
    "xz": _xz,
}
_DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "huffman": lambda data: zlib.decompress(data, -15),
    "deflate": lambda data: zlib.decompress(data, -15),
    "xz": lzma.decompress,
}
