"""How many columns of a matrix share a scale in 8 bits: as many as a model bears.

OpenVINO rounds activations in groups as large as those of the weights. Larger ones are multiplied faster
(docs/log.md), and what they lose is lost by the activations: a single large value makes all of its group
coarse. How large they are differs from model to model, so it is tried, with the weights as they were given.
"""

from collections.abc import Callable, Mapping, Sequence

from blockzoo.build.likeness import Judged, divergence
from blockzoo.engines.base import EngineMaker
from blockzoo.zoo.blocks import Block, matrix_names
from blockzoo.zoo.manifest import BlockRecord
from blockzoo.zoo.packing import GROUP, GROUPS

SHARE = 0.2
"""Of the bound on what quantization may lose: what rounded activations may."""


def fitting(blocks: Sequence[Block]) -> list[int]:
    """Numbers of columns that divide all matrices, the largest first; without the smallest one."""
    widths = {block.tensors[name].shape[1] for block in blocks for name in matrix_names(block.spec)}
    return [group for group in GROUPS if group != GROUP and not any(width % group for width in widths)]


def in_use(blocks: Mapping[str, BlockRecord], chain: Sequence[str]) -> int | None:
    """In which groups blocks of a chain are stored already; None where none is."""
    made = (block.quantized for block in blocks.values())
    return next((q.group for q in made if q is not None and q.dtype == "i8" and q.source in chain), None)


def largest_borne(
    judged: Judged,
    blocks: Sequence[Block],
    exact: EngineMaker,
    rounding: Callable[[int], EngineMaker],
    bound: float,
) -> int:
    """The most columns with which the divergence that rounded activations cause stays within a bound.

    Args:
        judged: the model.
        blocks: of it, as they were given.
        exact: makes engines of f32.
        rounding: the same, with activations rounded in groups of so many.
        bound: in nats.
    """
    sizes = fitting(blocks)
    own = judged.distributions(exact, blocks) if sizes else []
    return next(
        (g for g in sizes if divergence(own, judged.distributions(rounding(g), blocks)) <= bound), GROUP
    )
