"""Quantized matrices: integers of 8 or 4 bits, each worth its group's scale.

A row of [out, in] is cut into groups of equal length; the value of integer q of row r and group g is
q * scales[r, g], and where the matrix has offsets, q * scales[r, g] + offsets[r, g]. One group a row is "per
output channel". Of a rotated matrix that is each run of 32 columns times `rotation`: a product takes its
inputs times the same. Integers of 4 bits lie two in a byte, the one of the even column in the low half: as
OpenVINO's i4 and ONNX' int4 have it.
"""

from collections.abc import Collection
from functools import cache
from typing import Literal

import numpy as np

QuantizedDtype = Literal["i8", "i4"]

LIMITS: dict[QuantizedDtype, tuple[int, int]] = {"i8": (-127, 127), "i4": (-8, 7)}
"""The least and the largest integer in use."""

GROUP = 32
"""Columns that share a scale in what is made here, where it divides and no other number is chosen; a file may
have any."""

ROTATED = GROUP
"""Columns of a rotated matrix that are mixed with each other."""

GROUPS = (128, 64, GROUP)
"""What is made, beside 8 bits with one scale a row."""

WHOLE_ROW = 0
"""In the place of a number of columns: all of a row."""


def groups_dividing(widths: Collection[int]) -> list[int]:
    """Those of `GROUPS` that divide all numbers of columns, the largest first."""
    return [group for group in GROUPS if not any(width % group for width in widths)]


def pack_i4(integers: np.ndarray) -> np.ndarray:
    """int8 [out, in] from -8 to 7 -> uint8 [out, in / 2]."""
    nibbles = integers.view(np.uint8) & np.uint8(15)
    return np.ascontiguousarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4)))


def unpack_i4(packed: np.ndarray) -> np.ndarray:
    """uint8 [out, in / 2] -> int8 [out, in]."""
    out = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    # the sign of a nibble is that of the byte whose upper half it is
    out[:, 0::2] = (packed << np.uint8(4)).view(np.int8) >> 4
    out[:, 1::2] = packed.view(np.int8) >> 4
    return out


def rotates(columns: int) -> bool:
    """Whether a matrix of so many columns can be rotated."""
    return columns % ROTATED == 0


@cache
def rotation() -> np.ndarray:
    """float32 [32, 32], read-only: Hadamard's matrix (Sylvester's), scaled to be orthogonal; its own inverse.

    A value that is much larger than its neighbours is spread over all of them, which costs less in integers
    (QuaRot, arXiv 2404.00456; QuIP#, arXiv 2402.04396).
    """
    signs = np.ones((1, 1))
    while len(signs) < ROTATED:
        signs = np.block([[signs, signs], [signs, -signs]])
    scaled = (signs / np.sqrt(ROTATED)).astype(np.float32)
    scaled.flags.writeable = False
    return scaled


def rotated(values: np.ndarray) -> np.ndarray:
    """[rows, columns], each run of 32 columns times `rotation`; once more gives them back."""
    return (values.reshape(-1, ROTATED) @ rotation()).reshape(values.shape)


def dequantized(integers: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """int8 [out, in] and float32 [out, groups] -> float32 [out, in]."""
    rows, columns = integers.shape
    grouped = integers.reshape(rows, scales.shape[1], -1).astype(np.float32)
    grouped *= scales[:, :, None]
    if offsets is not None:
        grouped += offsets[:, :, None]
    return grouped.reshape(rows, columns)
