"""What engines take of memory."""

from __future__ import annotations

from collections.abc import Iterable

from blockzoo.zoo.blocks import Block


def engine_bytes(blocks: Iterable[Block], itemsize: int) -> int:
    """Bytes of an engine's weights: quantized matrices are not unpacked. `itemsize`: of activations."""
    return sum(
        tensor.num_bytes if tensor.scales is not None else itemsize * tensor.size
        for block in blocks
        for tensor in block.tensors.values()
    )
