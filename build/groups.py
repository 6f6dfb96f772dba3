"""How many columns of a matrix share a scale: as many as a model bears.

OpenVINO rounds activations too, in groups that divide those of the weights. Larger ones are multiplied
faster, and weights with one scale a row, beside activations in the largest groups, faster still
(docs/log.md). Most of what that loses is lost by the activations: a single large value makes all of its group
coarse. How large they are differs from model to model, so it is tried.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from blockzoo.build.likeness import Judged, divergence
from blockzoo.build.rounding import rounded_in_haste
from blockzoo.engines.base import EngineMaker
from blockzoo.zoo.blocks import Block, BlockSpec, matrix_names, tensor_shapes
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.packing import GROUP, WHOLE_ROW, QuantizedDtype, groups_dividing

SHARE = 0.05
"""Of the bound on what quantization may lose: what rounded activations may, and scales of whole rows."""


def larger(specs: Iterable[BlockSpec]) -> list[int]:
    """Numbers of columns that divide all matrices, the largest first; without the smallest one."""
    widths = {tensor_shapes(spec)[name][1] for spec in specs for name in matrix_names(spec)}
    return [group for group in groups_dividing(widths) if group != GROUP]


def in_use(manifest: Manifest, given: Collection[str], dtypes: Collection[QuantizedDtype]) -> int | None:
    """The groups of a model that has blocks in one of these dtypes made of some of those given already; None
    where none has."""
    for model in manifest.models.values():
        made = [manifest.blocks[key].quantized for key in model.chain]
        if model.quantization is not None and any(
            each is not None and each.dtype in dtypes and each.source in given for each in made
        ):
            return model.quantization.group
    return None


def in_matrices(blocks: Sequence[Block]) -> int | None:
    """How many columns share a scale in matrices of 8 bits: the largest number of those that are less than a
    row; `WHOLE_ROW` where none is; None without such matrices."""
    tensors = (tensor for block in blocks for tensor in block.tensors.values())
    shapes = {(t.shape[1], t.scales.shape[1]) for t in tensors if t.dtype == "i8" and t.scales is not None}
    parts = [columns // groups for columns, groups in shapes if groups > 1]
    return max(parts, default=WHOLE_ROW) if shapes else None


def largest_borne(
    judged: Judged,
    blocks: Sequence[Block],
    sizes: Sequence[int],
    exact: EngineMaker,
    rounding: Callable[[int], EngineMaker],
    bound: float,
) -> int:
    """The most columns with which the divergence that rounding causes stays within a bound; the smallest
    number where none does. `WHOLE_ROW`, beside activations in groups of the largest number, if that is borne.

    Args:
        judged: the model.
        blocks: of it, as they were given.
        sizes: numbers of columns to try, the largest first; at least one.
        exact: makes engines of f32.
        rounding: the same, with activations rounded in groups of so many.
        bound: in nats.
    """
    own = judged.distributions(judged.chain(exact, blocks))

    def lost(size: int, tried: Sequence[Block]) -> float:
        return divergence(own, judged.distributions(judged.chain(rounding(size), tried)))

    for size in sizes:
        if lost(size, blocks) > bound:
            continue
        by_row = size == sizes[0] and lost(size, [_by_row(block) for block in blocks]) <= bound
        return WHOLE_ROW if by_row else size
    return GROUP


def _by_row(block: Block) -> Block:
    """Its matrices in 8 bits with one scale a row, rounded in haste."""
    tensors = dict(block.tensors)
    for name in matrix_names(block.spec):
        tensors[name] = rounded_in_haste(tensors[name].to_f32(), "i8", tensors[name].shape[1])
    return replace(block, tensors=tensors)
