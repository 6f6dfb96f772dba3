"""Where chains are cut into runs of blocks, each of them compiled into one engine.

Ids only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

from blockzoo.runtime.exec.segments import is_attn
from blockzoo.zoo.blocks import PROJECTIONS
from blockzoo.zoo.manifest import AdapterRecord, BlockRecord

Run = tuple[str, ...]
"""Block ids, in order."""
Lora = tuple[tuple[int, tuple[str, ...]], ...]
"""By index of a block in a run, the projections that take adapters."""

_EDGE = ""  # stands for "before the first block" and "after the last"


class Path(NamedTuple):
    """The blocks of a chain, from embed to head, and their positions in a model's chain."""

    blocks: tuple[str, ...]
    positions: tuple[int, ...]


class Limits(NamedTuple):
    """Where spans are cut though no chain parts there, in layers."""

    span: int | None  # at most, of a span
    check: int | None  # from the bottom of the chain


def lora_targets(
    adapted: Sequence[tuple[Path, tuple[tuple[int, str], ...]]],
    runs: Mapping[Path, tuple[Run, ...]],
    adapters: Mapping[str, AdapterRecord],
) -> dict[Run, Lora]:
    """By run, the projections of its blocks that adapters change (`Span.lora`)."""
    found: dict[Run, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path, adapter_ids in adapted:
        changed = dict(adapter_ids)
        places = iter(path.positions[1:])
        for run in runs[path]:
            for i, position in enumerate(islice(places, len(run))):
                if position in changed:
                    loras = adapters[changed[position]].spec.loras
                    found[run][i].update(lora.projection for lora in loras)
    return {run: tuple((i, tuple(sorted(names))) for i, names in sorted(found[run].items())) for run in found}


def either(one: Sequence[tuple[int, tuple[str, ...]]], other: Sequence[tuple[int, tuple[str, ...]]]) -> Lora:
    """The projections that are in one of two (`Span.lora`)."""
    joined: dict[int, set[str]] = defaultdict(set)
    for index, names in (*one, *other):
        joined[index].update(names)
    return tuple((index, tuple(sorted(names))) for index, names in sorted(joined.items()))


def all_projections(run: Sequence[str], blocks: Mapping[str, BlockRecord]) -> Lora:
    """All projections of a run's blocks that may take adapters."""
    kinds = [blocks[block_id].spec.kind for block_id in run]
    return tuple((i, tuple(sorted(PROJECTIONS[kind]))) for i, kind in enumerate(kinds) if kind in PROJECTIONS)


def num_layers(run: Sequence[str], blocks: Mapping[str, BlockRecord]) -> int:
    """Attention blocks of a run."""
    return sum(is_attn(block_id, blocks) for block_id in run)


def cut(
    path: Path, paths: Sequence[Path], blocks: Mapping[str, BlockRecord], limits: Limits
) -> tuple[Run, ...]:
    """Cut a chain's body wherever some chain goes on differently (the unitigs of block succession), and where
    it leaves blocks of its model out."""
    after: dict[str, set[str]] = defaultdict(set)
    before: dict[str, set[str]] = defaultdict(set)
    for other in paths:
        padded = (_EDGE, *other.blocks[1:], _EDGE)
        for left, right in pairwise(padded):
            after[left].add(right)
            before[right].add(left)
    body, positions = path.blocks[1:], path.positions[1:]
    runs: list[tuple[str, ...]] = []
    start, layers, depth = 0, 0, 0
    for i, block_id in enumerate(body):
        layers += is_attn(block_id, blocks)
        depth += is_attn(block_id, blocks)
        following = body[i + 1] if i + 1 < len(body) else _EDGE
        splits = len(after[block_id]) > 1 or len(before[following]) > 1 or following == _EDGE
        splits = splits or positions[i + 1] != positions[i] + 1
        full = (limits.span is not None and layers >= limits.span) or depth == limits.check
        if splits or (full and _starts_layer(following, blocks)):
            runs.append(body[start : i + 1])
            start, layers = i + 1, 0
    return tuple(runs)


def _starts_layer(block_id: str, blocks: Mapping[str, BlockRecord]) -> bool:
    return block_id != _EDGE and is_attn(block_id, blocks)


def dropping_runs(runs: Mapping[Path, tuple[Run, ...]], blocks: Mapping[str, BlockRecord]) -> set[Run]:
    """The runs in which rows leave: per chain the first that nowhere, in no chain, has attention after it.

    (A run that ends in a head has none anywhere, so every chain has such a run.)
    """
    has_attention_after: set[Run] = set()
    for chain_runs in runs.values():
        last = max(i for i, run in enumerate(chain_runs) if num_layers(run, blocks))
        has_attention_after.update(chain_runs[:last])
    return {next(run for run in chain_runs if run not in has_attention_after) for chain_runs in runs.values()}
