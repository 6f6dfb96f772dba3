"""Merged LoRAs recovered: a fine-tuned block as another block plus an adapter, told apart by its rounding.

A checkpoint with a LoRA merged into it holds round(W + s B A). Its difference to W is the LoRA, of low rank,
plus rounding errors, of full rank but known size: an element that is rounded to a grid of spacing u (its unit
in the last place) is off by at most u / 2, with variance u^2 / 12 where the sum falls anywhere between two
grid points, and less where the LoRA is too small to reach the next one. Independent errors of variances
v_ij have a spectral norm of about sqrt(max_i sum_j v_ij) + sqrt(max_j sum_i v_ij) (Latala 2005; Bandeira and
van Handel, arXiv 1408.6185): singular values above that are signal, those below are rounding, and what is
left after the signal is taken away must have no more energy than sum_ij v_ij. A full fine-tune fails this:
its difference has more energy below its largest singular values than rounding explains.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from blockzoo.build.partition import CutAdapter, make_adapter
from blockzoo.zoo.adapter import LoraPair
from blockzoo.zoo.blocks import PROJECTIONS, BlockSpec
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.tensors import BlockTensor, Dtype, from_f32

MAX_RANK = 256
_MARGIN = 1.1  # of singular values over the asymptotic edge, and of energies over their expectation
_ROUNDINGS = (1.0, 2.0)  # merged onto the base as it is, or onto what the base was rounded from
_MANTISSA_BITS = {"bf16": 7, "f16": 10, "f32": 23}
_MIN_EXPONENT = {"bf16": -126, "f16": -14, "f32": -126}
_WORTH_IT = 0.75  # an adapter of more than this share of its block's bytes is not
NEAR = 0.5
"""A fine-tune's relative distance to its base is below this (unrelated weights: 1.4)."""
_SAMPLE = 1 << 16  # elements that the distance of two blocks is estimated from


@dataclass(frozen=True, slots=True)
class Recovered:
    """A block as an adapter on another."""

    adapter: CutAdapter
    rounding: float
    """Largest ratio of left-out energy to that of one rounding, over the changed projections."""


class NotLowRankError(Exception):
    """A block is not another one with a LoRA merged into it; the message says what it is."""


def distance(block: Mapping[str, BlockTensor], other: Mapping[str, BlockTensor]) -> float:
    """Relative distance of two blocks of one spec, estimated from a sample of their largest tensor."""
    name = max(block, key=lambda key: block[key].size)
    step = max(1, block[name].size // _SAMPLE) | 1  # odd: a power of two would sample few columns
    ours, theirs = (_sampled(tensor, step) for tensor in (block[name], other[name]))
    return float(np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(theirs)), 1e-30))


def _sampled(tensor: BlockTensor, step: int) -> np.ndarray:
    if tensor.scales is not None:
        return tensor.to_f32().reshape(-1)[::step]
    return BlockTensor(tensor.dtype, tensor.data.reshape(-1)[::step]).to_f32()


def nearest_block(
    manifest: Manifest,
    read: Callable[[str], Mapping[str, BlockTensor]],
    spec: BlockSpec,
    tensors: Mapping[str, BlockTensor],
    position: int,
    besides: Collection[str] = (),
) -> str | None:
    """The block of the same shape and place in another model (none of `besides`) that differs least.

    Of quantized blocks none: what they were made of is not known any more.
    """
    candidates = {
        model.chain[position]
        for name, model in manifest.models.items()
        if name not in besides
        and position < len(model.chain) - 1
        and manifest.blocks[model.chain[position]].spec == spec
        and not manifest.blocks[model.chain[position]].is_quantized
    }
    return min(sorted(candidates), key=lambda other: distance(tensors, read(other)), default=None)


def recover(spec: BlockSpec, block: Mapping[str, BlockTensor], base: Mapping[str, BlockTensor]) -> Recovered:
    """Find the LoRAs that turn `base` into `block`, both with the canonical tensors of `spec`.

    Raises NotLowRankError with what was found instead.
    """
    projections = PROJECTIONS.get(spec.kind, ())
    for name, tensor in block.items():
        if name not in projections and not np.array_equal(tensor.to_f32(), base[name].to_f32()):
            raise NotLowRankError(f"{name} differs, which no LoRA changes")
    if distance(block, base) > NEAR:
        raise NotLowRankError("the weights are unrelated")
    pairs, rounding = {}, 0.0
    for name in projections:
        found = _recover_matrix(name, block[name], base[name])
        if found is not None:
            pairs[name] = found[0]
            rounding = max(rounding, found[1])
    adapter = make_adapter(pairs)
    size = sum(tensor.data.nbytes for tensor in block.values())
    if adapter.num_bytes > _WORTH_IT * size:
        raise NotLowRankError(
            f"an adapter of rank {adapter.spec.rank} would take {adapter.num_bytes / size:.0%} of the block"
        )
    return Recovered(adapter, rounding)


def _recover_matrix(name: str, block: BlockTensor, base: BlockTensor) -> tuple[LoraPair, float] | None:
    """The LoRA of one matrix and its left-out energy over that of one rounding; None when nothing changed."""
    values = block.to_f32()
    # the rounding of f32 weights is below what float32 arithmetic resolves of the difference
    difference = values.astype(np.float64 if block.dtype == "f32" else np.float32) - base.to_f32()
    energy = _energy(difference)
    if not energy:
        return None
    variance = _rounding_variance(values, difference, block.given_dtype)
    expected = float(variance.sum(dtype=np.float64))
    edge = math.sqrt(variance.sum(axis=1).max()) + math.sqrt(variance.sum(axis=0).max())
    limit = min(MAX_RANK, min(difference.shape) // 2)
    u, s, vt = leading(difference, limit + 1)
    for roundings in _ROUNDINGS:
        rank = int((s > _MARGIN * math.sqrt(roundings) * edge).sum())
        left = max(0.0, energy - float((s[:rank].astype(np.float64) ** 2).sum()))
        if 0 < rank <= limit and left <= _MARGIN * roundings * expected:
            root = np.sqrt(s[:rank])
            a, b = root[:, None] * vt[:rank], u[:, :rank] * root
            return LoraPair(
                from_f32(a, block.given_dtype), from_f32(b, block.given_dtype), 1.0
            ), left / expected
    if not rank:
        raise NotLowRankError(
            f"{name} differs by less than its rounding, in no direction more than in others"
        )
    if rank > limit:
        raise NotLowRankError(f"{name} differs in more than {limit} directions")
    raise NotLowRankError(
        f"{name}: next to {rank} directions, {left / expected:.3g} times what rounding explains is left"
    )


def _energy(values: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))


def _rounding_variance(values: np.ndarray, difference: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Of each element's rounding error, float32: of the sum, and of the LoRA's product before it is added
    (tools that merge in the checkpoint's own dtype round that too)."""
    variance = (_spacing(values, dtype) ** 2 + _spacing(difference, dtype) ** 2) / np.float32(12)
    return np.asarray(variance, np.float32)


def _spacing(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """The distance to the next number of `dtype`, float32."""
    _, exponent = np.frexp(values)
    exponent = np.where(values == 0, _MIN_EXPONENT[dtype], np.maximum(exponent - 1, _MIN_EXPONENT[dtype]))
    return np.asarray(np.ldexp(np.float32(1), exponent - _MANTISSA_BITS[dtype]), np.float32)


def leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular triplets, at least `count` or as many as there are.

    Of large matrices by randomized subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061).
    """
    if min(matrix.shape) <= 4 * count:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u, s, vt
    rng = np.random.default_rng(0)
    basis = matrix @ rng.standard_normal((matrix.shape[1], count + 16), dtype=np.float32).astype(matrix.dtype)
    for _ in range(3):
        basis, _ = np.linalg.qr(matrix.T @ np.linalg.qr(basis)[0])
        basis = matrix @ basis
    basis, _ = np.linalg.qr(basis)
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vt
