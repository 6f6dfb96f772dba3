"""Adapters as engine inputs: the matrices in the type of activations, side by side, and who uses which.

The ranks of all adapters that a call may need lie side by side in a *bank*: A [Q, in] and B [Q, out] of every
projection, with rows of zeros where an adapter leaves a projection alone. A row of the mask [T, Q] has ones
where its own adapter lies (see `base.Engine`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from blockzoo.zoo.blocks import Adapter, AdapterSpec

Pair = tuple[np.ndarray, np.ndarray]


def lora_targets(specs: Mapping[int, Sequence[AdapterSpec]]) -> dict[int, tuple[str, ...]]:
    """By index of a block, the projections that any of its adapters changes, sorted."""
    return {
        index: tuple(sorted({lora.projection for spec in found for lora in spec.loras}))
        for index, found in specs.items()
        if found
    }


def lora_matrices(adapter: Adapter) -> dict[str, Pair]:
    """By projection, A [rank, in] and B [rank, out] in float32, the scale folded into B."""
    pairs = {}
    for lora in adapter.spec.loras:
        a, b = (adapter.tensors[f"{lora.projection}.{which}"].to_f32() for which in "ab")
        pairs[lora.projection] = a, np.ascontiguousarray(b.T * np.float32(lora.scale))
    return pairs


def padded(matrix: np.ndarray | None, rank: int, features: int) -> np.ndarray:
    """The matrix [at most rank, features] with rows of zeros below it; None is no row at all."""
    out = np.zeros((rank, features), np.float32)
    if matrix is not None:
        out[: len(matrix)] = matrix
    return out
