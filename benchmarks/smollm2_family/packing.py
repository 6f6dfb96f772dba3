"""Matrices in four bits: groups of values in a row share a scale, as Q4_0 has it.

A file of `blockzoo.zoo.demo.compact` holds NAME.q4 (uint8, [rows, columns / 2], the even columns in the low
halves) and NAME.scale (f16, [rows, groups]) of every matrix, and vectors as they are, in f16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from blockzoo.zoo.demo.compact import read_compact, write_compact

GROUP = 32  # columns, or all of a narrower matrix
_SHRUNK = np.linspace(0.7, 1.1, 9)  # of the scale that just holds the largest value: errors may be less below


def pack(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """f32 matrices (an even number of columns, whole groups) and vectors as they are stored."""
    packed: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            packed[name] = tensor.astype(np.float16)
            continue
        rows, columns = tensor.shape
        group = min(GROUP, columns)
        if columns % group or columns % 2:
            raise ValueError(f"{name} has {columns} columns; expected a multiple of {GROUP}, or an even few")
        values, scale = _quantized(tensor.reshape(rows, columns // group, group))
        halves = (values + 8).astype(np.uint8).reshape(rows, columns)
        packed[f"{name}.q4"] = halves[:, ::2] | halves[:, 1::2] << 4
        packed[f"{name}.scale"] = scale
    return packed


def _quantized(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers in [-8, 7] and the f16 scale of each group, by the least squared error of a few scales."""
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    best, best_scale, least = np.zeros_like(groups), extreme, np.full(extreme.shape, np.inf)
    for factor in _SHRUNK:
        scale = (factor * extreme / -8).astype(np.float16).astype(np.float32)
        values = np.clip(np.rint(groups / np.where(scale == 0, 1, scale)), -8, 7)
        error = np.square(values * scale - groups).sum(-1, keepdims=True)
        better = error < least
        best, best_scale = np.where(better, values, best), np.where(better, scale, best_scale)
        least = np.where(better, error, least)
    return best, best_scale[..., 0].astype(np.float16)


def unpack(packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What was packed, in f32, by name in sorted order."""
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(packed):
        if name.endswith(".q4"):
            halves = packed[name]
            scale = packed[f"{name[:-3]}.scale"].astype(np.float32)
            values = np.stack([halves & 15, halves >> 4], -1).astype(np.float32) - 8
            rows, groups = scale.shape
            tensors[name[:-3]] = (values.reshape(rows, groups, -1) * scale[..., None]).reshape(rows, -1)
        elif not name.endswith(".scale"):
            tensors[name] = packed[name].astype(np.float32)
    return tensors


def save_packed(path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> None:
    """Writes f32 tensors packed, and what is to be known of them."""
    write_compact(path, pack(tensors), facts)


def load_packed(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """f32 tensors and the facts beside them. Raises OSError, ValueError."""
    packed, facts = read_compact(path)
    return unpack(packed), facts
