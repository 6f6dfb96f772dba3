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
from blockzoo.zoo.packing import GROUP, groups_dividing

SHARE = 0.2
"""Of the bound on what quantization may lose: what rounded activations may."""


def larger(blocks: Sequence[Block]) -> list[int]:
    """Numbers of columns that divide all matrices, the largest first; without the smallest one."""
    widths = {block.tensors[name].shape[1] for block in blocks for name in matrix_names(block.spec)}
    return [group for group in groups_dividing(widths) if group != GROUP]


def in_use(blocks: Mapping[str, BlockRecord], chain: Sequence[str]) -> int | None:
    """In which groups blocks of a chain are stored already; None where none is."""
    made = (block.quantized for block in blocks.values())
    return next((q.group for q in made if q is not None and q.dtype == "i8" and q.source in chain), None)


def largest_borne(
    judged: Judged,
    blocks: Sequence[Block],
    sizes: Sequence[int],
    exact: EngineMaker,
    rounding: Callable[[int], EngineMaker],
    bound: float,
) -> int:
    """The most columns with which the divergence that rounded activations cause stays within a bound; the
    smallest number where none does.

    Args:
        judged: the model.
        blocks: of it, as they were given.
        sizes: numbers of columns to try, the largest first.
        exact: makes engines of f32.
        rounding: the same, with activations rounded in groups of so many.
        bound: in nats.
    """
    own = judged.distributions(judged.chain(exact, blocks))
    for size in sizes:
        theirs = judged.distributions(judged.chain(rounding(size), blocks))
        if divergence(own, theirs) <= bound:
            return size
    return GROUP
