"""A fine-tuned block as another block plus a difference of low rank.

Training changes every weight of a model by a little, so the difference D of a matrix to the base's has full
rank, but most of it lies in few directions. Of all B A of a rank the nearest to D is U U^T D, with U the
leading left singular vectors.

The norm in front of matrices changes too. As norm' * x^ = norm * (norm' / norm * x^), its change goes into
the difference of the matrices behind it.
"""

from collections.abc import Mapping

import numpy as np

from blockzoo.build.partition import CutAdapter, make_adapter
from blockzoo.build.recover import leading
from blockzoo.zoo.adapter import LoraPair
from blockzoo.zoo.blocks import PROJECTIONS, BlockSpec, tensor_shapes
from blockzoo.zoo.fingerprint import block_id
from blockzoo.zoo.packing import GROUP, LIMITS
from blockzoo.zoo.tensors import BlockTensor, from_f32

Factors = Mapping[str, LoraPair]
"""By projection that was changed, in bf16, the directions that matter most first."""


def factors(
    spec: BlockSpec, block: Mapping[str, BlockTensor], base: Mapping[str, BlockTensor], rank: int
) -> Factors:
    """What the matrices of `block` add to those of `base`, both of `spec`, as far as `rank` tells it."""
    found = {}
    for name, difference in difference_of(spec, block, base).items():
        if difference.any():
            a, b = nearest(difference, rank)
            found[name] = LoraPair(from_f32(a, "bf16"), from_f32(b, "bf16"), 1.0)
    return found


def difference_of(
    spec: BlockSpec, block: Mapping[str, BlockTensor], base: Mapping[str, BlockTensor]
) -> dict[str, np.ndarray]:
    """By projection, float32 [out, in]: what the base's matrices lack, behind the base's norm."""
    ratio, names = _ratio(block, base), PROJECTIONS[spec.kind]
    weights = {name: block[name].to_f32() for name in names}
    for name in names[:-1]:  # the last one meets no norm
        weights[name] = weights[name] * ratio
    return {name: weight - base[name].to_f32() for name, weight in weights.items()}


def nearest(difference: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, in] and B [out, rank], float32, with B A nearest to a matrix [out, in]."""
    rank = min(rank, *difference.shape)
    u, _, _ = leading(difference, rank)
    b = np.ascontiguousarray(u[:, :rank])
    return b.T @ difference, b


def cut_down(found: Factors, rank: int) -> CutAdapter | None:
    """The adapter of a block, at most of `rank`; None where nothing was changed."""
    pairs = {
        name: LoraPair(
            BlockTensor(pair.a.dtype, pair.a.data[:rank]),
            BlockTensor(pair.b.dtype, np.ascontiguousarray(pair.b.data[:, :rank])),
            pair.scale,
        )
        for name, pair in found.items()
    }
    return make_adapter(pairs) if pairs else None


def in_eight_bits(cut: CutAdapter) -> CutAdapter:
    """The adapter with integers and scales in the place of its values."""
    tensors = {name: _eight_bits(tensor.to_f32()) for name, tensor in cut.tensors.items()}
    return CutAdapter(block_id(cut.spec, tensors), cut.spec, tensors)


def _eight_bits(values: np.ndarray) -> BlockTensor:
    """[rows, columns] with a scale for each group of a row, by its largest value."""
    rows, columns = values.shape
    groups = values.reshape(rows, -1, GROUP if columns % GROUP == 0 else columns)
    scales = np.abs(groups).max(axis=2) / np.float32(LIMITS["i8"][1])
    scales = np.where(scales == 0, np.float32(1), scales)
    integers = np.rint(groups / scales[..., None]).astype(np.int8)
    return BlockTensor("i8", integers.reshape(rows, columns), scales)


def rank_bytes(spec: BlockSpec) -> int:
    """About the bytes of an adapter on all matrices of a block in 8 bits, by rank."""
    shapes = tensor_shapes(spec)
    return sum(sum(shapes[name]) for name in PROJECTIONS[spec.kind]) * 9 // 8


def _ratio(block: Mapping[str, BlockTensor], base: Mapping[str, BlockTensor]) -> np.ndarray:
    """What the inputs behind the base's norm are to be multiplied with to be those behind the block's own.

    Where one of the two is zero nothing can be made up for.
    """
    norm, other = block["norm"].to_f32(), base["norm"].to_f32()
    usable = (norm != 0) & (other != 0)
    return np.where(usable, norm / np.where(usable, other, 1), np.float32(1)).astype(np.float32)
