"""What KV is the same as whose: the identity of each layer's K and V, and which layers models share."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from blockzoo.runtime.kv.sequence import Segment
from blockzoo.zoo.blocks import AttnSpec
from blockzoo.zoo.manifest import BlockRecord


class Variant(NamedTuple):
    """What tells two models apart."""

    chain: tuple[str, ...]
    adapters: tuple[tuple[int, str], ...]


def is_attn(block_id: str, blocks: Mapping[str, BlockRecord]) -> bool:
    """Whether a block has K and V."""
    return isinstance(blocks[block_id].spec, AttnSpec)


def plan_segments(
    variants: Sequence[Variant], blocks: Mapping[str, BlockRecord]
) -> dict[Variant, tuple[tuple[Segment, ...], tuple[int, ...]]]:
    """Per model the maximal layer ranges whose KV is shared by one and the same set of models.

    The KV of a layer depends on every block up to its attention, and on their adapters, so its identity is
    the hash of that prefix. That of a range's last layer says what is in all of it, whatever other models
    there are or will be. With each range comes the position in the chain at which its sharers below part.
    """
    prefixes = {variant: layer_keys(variant, blocks) for variant in variants}
    sharers: dict[str, set[Variant]] = defaultdict(set)
    for variant, keys in prefixes.items():
        for key in keys:
            sharers[key].add(variant)
    result = {}
    for variant, keys in prefixes.items():
        starts = [i for i in range(len(keys)) if i == 0 or sharers[keys[i]] != sharers[keys[i - 1]]]
        ends = [*starts[1:], len(keys)]
        # before them: blocks that all sharers of the layer below have in common
        boundaries = [1, *(_common_length(sharers[keys[start - 1]]) for start in starts[1:])]
        result[variant] = (
            tuple(
                Segment(start, end, keys[end - 1], _prefix_key(variant, boundary))
                for start, end, boundary in zip(starts, ends, boundaries, strict=True)
            ),
            tuple(boundaries),
        )
    return result


def steps(variant: Variant) -> list[str]:
    """What computes, block by block: the block, and its adapter."""
    adapters = dict(variant.adapters)
    return [f"{block_id} {adapters.get(i, '')}" for i, block_id in enumerate(variant.chain)]


def variant_key(variant: Variant) -> str:
    """What stands for a variant, among whichever others."""
    return hashlib.sha256("\n".join(steps(variant)).encode()).hexdigest()


def _common_length(variants: set[Variant]) -> int:
    """The number of steps that all models begin with."""
    columns = zip(*map(steps, variants), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _prefix_key(variant: Variant, length: int) -> str:
    return hashlib.sha256("\n".join(["hidden states after", *steps(variant)[:length]]).encode()).hexdigest()


def layer_keys(variant: Variant, blocks: Mapping[str, BlockRecord]) -> list[str]:
    """Per layer the identity of its K and V: a hash of all that computes them."""
    digest = hashlib.sha256()
    adapters = dict(variant.adapters)
    keys = []
    for position, block_id in enumerate(variant.chain):
        digest.update(f"{block_id} {adapters.get(position, '')}\n".encode())
        if is_attn(block_id, blocks):
            keys.append(digest.hexdigest())
    return keys
