"""Ways to store a full fine-tune next to its base: each gives the blocks of a chain, adapters, and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from blockzoo.build.low_rank import Factors, cut_down, difference_of, in_eight_bits
from blockzoo.build.partition import CutAdapter
from blockzoo.build.recover import leading
from blockzoo.build.rounding import rounded
from blockzoo.zoo.adapter import LoraPair
from blockzoo.zoo.blocks import PROJECTIONS, Adapter, Block, BlockTensor, matrix_names
from blockzoo.zoo.tensors import from_f32

Blocks = list[Block]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A model as some way stores it."""

    blocks: Blocks
    adapters: Mapping[int, Adapter]
    num_bytes: int
    """Of what is its own."""


def own(tuned: Blocks) -> Stored:
    """As it was given."""
    return Stored(tuned, {}, sum(map(_bytes, tuned)))


def own_nearest(tuned: Blocks) -> Stored:
    """Own blocks in 4 bits, embedding in 8, rounded to nearest."""
    blocks = [_rounded(block, "i4") if block.spec.kind in PROJECTIONS else block for block in tuned]
    blocks[0] = _eight_bits(blocks[0])
    blocks[-1] = replace(blocks[-1], tensors=tuned[-1].tensors | {"weight": blocks[0].tensors["weight"]})
    return Stored(blocks, {}, sum(map(_bytes, blocks)))


def with_ends(stored: Stored, ends: Blocks, share: str) -> Stored:
    """With the base's embedding and head, or its own in 8 bits."""
    blocks, num_bytes = list(stored.blocks), stored.num_bytes - _bytes(stored.blocks[0])
    if share == "base's":
        blocks[0], blocks[-1] = ends[0], ends[-1]
    else:
        blocks[0] = _eight_bits(blocks[0])
        blocks[-1] = replace(blocks[-1], tensors=blocks[-1].tensors | {"weight": blocks[0].tensors["weight"]})
        num_bytes += _bytes(blocks[0])
    return Stored(blocks, {**stored.adapters}, num_bytes)


def low_rank(
    tuned: Blocks, base: Blocks, factors: Mapping[int, Factors], rank: int, bits: int = 16
) -> Stored:
    """Inner blocks as differences of a rank, in bf16 or 8 bits."""
    cut = {at: cut_down(found, rank) for at, found in factors.items()}
    adapters = {at: _in_bits(each, bits) for at, each in cut.items() if each is not None}
    num_bytes = sum(tensor.num_bytes for adapter in adapters.values() for tensor in adapter.tensors.values())
    blocks = [tuned[0], *base[1:-1], tuned[-1]]
    return Stored(blocks, adapters, num_bytes + _bytes(tuned[0]) + _bytes(tuned[-1]))


def dense(tuned: Blocks, base: Blocks, bits: int) -> Stored:
    """Inner blocks as differences in few bits, in groups of 32 (1 bit: a scale a row, as BitDelta)."""
    blocks, num_bytes = [tuned[0]], 0
    for own_block, other in zip(tuned[1:-1], base[1:-1], strict=True):
        changes = difference_of(own_block.spec, own_block.tensors, other.tensors)
        tensors = dict(other.tensors)
        for name, change in changes.items():
            kept, size = _few_bits(change, bits)
            tensors[name] = from_f32(tensors[name].to_f32() + kept, "f32")
            num_bytes += size
        blocks.append(replace(other, tensors=tensors))
    blocks.append(tuned[-1])
    return Stored(blocks, {}, num_bytes + _bytes(tuned[0]) + _bytes(tuned[-1]))


def weighted(tuned: Block, base: Block, rank: int, gram: Callable[[str], np.ndarray]) -> dict[str, LoraPair]:
    """As `low_rank.factors`, but nearest on the rows x that the matrices meet; `gram`: projection -> X^T X.

    Of all B A the one with the least ((D - B A) x)^2 is U U^T D, with U the leading left singular vectors of
    D C and C C^T = X^T X (as in SVD-LLM, arXiv 2403.07378).
    """
    found = {}
    for name, difference in difference_of(tuned.spec, tuned.tensors, base.tensors).items():
        damped = gram(name).astype(np.float64)
        damped[np.diag_indices_from(damped)] += 0.01 * float(np.diag(damped).mean())
        u, _, _ = leading(difference @ np.linalg.cholesky(damped).astype(np.float32), rank)
        b = u[:, :rank]
        found[name] = LoraPair(from_f32(b.T @ difference, "bf16"), from_f32(b, "bf16"), 1.0)
    return found


def _few_bits(values: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """The values as kept, and bytes (scales in f32, as quantized blocks have them)."""
    if bits == 4:
        kept = rounded(values, "i4", 32)
        return kept.to_f32(), kept.num_bytes
    if bits == 1:
        scale = np.abs(values).mean(axis=1, keepdims=True)
        return np.sign(values) * scale, values.size // 8 + 4 * len(values)
    groups = values.reshape(len(values), -1, 32)
    top = 2 ** (bits - 1) - 0.5  # levels at odd multiples of half a step: none is lost to a zero
    best, least = np.zeros_like(groups), np.full(groups.shape[:2], np.inf, np.float32)
    largest = np.abs(groups).max(axis=2)
    for shrink in np.linspace(0.3, 1.0, 15, dtype=np.float32):
        step = np.maximum(largest * shrink / top, 1e-30)[..., None]
        levels = np.clip(np.floor(groups / step) + np.float32(0.5), -top, top)
        fitted = (levels * groups).sum(axis=2) / np.square(levels).sum(axis=2)
        kept = levels * fitted[..., None]
        error = np.square(groups - kept).sum(axis=2)
        better = error < least
        best, least = np.where(better[..., None], kept, best), np.minimum(error, least)
    return best.reshape(values.shape), values.size * bits // 8 + 4 * least.size


def _in_bits(cut: CutAdapter, bits: int) -> Adapter:
    cut = in_eight_bits(cut) if bits == 8 else cut
    return Adapter(cut.id, cut.spec, cut.tensors)


def _rounded(block: Block, dtype: str) -> Block:
    tensors = dict(block.tensors)
    for name in matrix_names(block.spec):
        tensors[name] = rounded(tensors[name].to_f32(), dtype, 32)  # type: ignore[arg-type]
    return replace(block, tensors=tensors)


@lru_cache(maxsize=2)
def _eight_bits(block: Block) -> Block:
    return _rounded(block, "i8")


def _bytes(block: Block) -> int:
    """A tied head's matrix is counted with the embedding."""
    tensors: dict[str, BlockTensor] = block.tensors
    return sum(t.num_bytes for name, t in tensors.items() if (block.spec.kind, name) != ("head", "weight"))


Side = Callable[[], Stored]
