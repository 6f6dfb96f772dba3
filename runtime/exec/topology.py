"""What the manifest implies for serving: spans to compile, chains over them, KV identity of layers.

Ids only; nothing here knows tensors, engines or requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from blockzoo.runtime.exec.segments import Variant, is_attn, layer_keys, plan_segments, variant_key
from blockzoo.runtime.kv.sequence import Segment
from blockzoo.zoo.blocks import PROJECTIONS, AttnSpec, HeadSpec
from blockzoo.zoo.manifest import AdapterRecord, BlockRecord, Manifest

_EDGE = ""  # stands for "before the first block" and "after the last"


@dataclass(frozen=True, slots=True)
class Family:
    """Models that can meet in one batch and one pool: same hidden size and KV geometry."""

    hidden_size: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Span:
    """A maximal run of blocks that no chain splits: compiled into one engine.

    Attributes:
        block_ids: the run, in order.
        num_layers: attention blocks in it.
        drops_rows: rows whose logits nobody needs leave here (see `engines.base.SpanSpec`).
        lora: by index of a block in the span, the projections that some chain has adapters on.
        scores: whether its engine tells how much attention each token received.
    """

    block_ids: tuple[str, ...]
    num_layers: int
    drops_rows: bool
    lora: tuple[tuple[int, tuple[str, ...]], ...] = ()
    scores: bool = False


@dataclass(frozen=True, slots=True)
class SpanUse:
    """One occurrence of a span in a chain: `position` is its first block's index in the chain."""

    span: int
    position: int
    first_layer: int


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """One model as the runtime sees it. Models with equal chains and adapters share one plan.

    Adapters split no span: the rows of models that differ in them alone go through the same engines.

    Attributes:
        uses: the spans of the chain, in order.
        segments: what KV is shared with which other models.
        entries: per segment, the first of `uses` that runs for tokens whose KV below the segment is there:
            the one at which the models that share the segment below part. 0 for the first segment, and
            where they part within a span, by an adapter: nothing enters there.
        adapters: (position in the chain, adapter id).
        check: the first of `uses` behind the check layers, where rows may leave and enter (approximate reuse
            that looks at deviations); None without such.
        key: stands for the chain in every topology that has it.
        layer_keys: per layer, what stands for its K and V in every topology.
    """

    family: Family
    embed_id: str
    uses: tuple[SpanUse, ...]
    num_layers: int
    segments: tuple[Segment, ...]
    vocab_size: int
    adapters: tuple[tuple[int, str], ...] = ()  # (position in the chain, adapter id)
    entries: tuple[int, ...] = (0,)
    check: int | None = None
    key: str = ""
    layer_keys: tuple[str, ...] = ()


class _Limits(NamedTuple):
    """Where spans are cut though no chain parts there, in layers."""

    span: int | None  # at most, of a span
    check: int | None  # from the bottom of the chain


@dataclass(frozen=True, slots=True)
class Topology:
    """All spans, and the chains over them; `chains` is sorted so that chains with common spans are
    neighbours: a batch in this order has the rows of a shared span in one slice."""

    spans: tuple[Span, ...]
    chains: tuple[ChainPlan, ...]
    chain_of_model: Mapping[str, int]

    def chain_ids(self, chain: ChainPlan) -> tuple[str, ...]:
        """The block ids of a chain, from embed to head."""
        return chain.embed_id, *(i for use in chain.uses for i in self.spans[use.span].block_ids)


def plan_topology(
    manifest: Manifest,
    max_span_layers: int | None = None,
    enable_lora: bool = False,
    check_layers: int | None = None,
    scores: bool = False,
    known: Iterable[Span] = (),
) -> Topology:
    """Derive spans, chains and segments from a manifest.

    Args:
        manifest: of the zoo to serve.
        max_span_layers: cut spans after this many layers (benchmarks); None: as long as possible.
        enable_lora: let every projection take adapters, for those that come later.
        check_layers: cut also after so many layers of each chain that has more; None: nowhere.
        scores: engines with attention tell how much of it each token received.
        known: spans that are compiled. One of the same blocks goes on taking the adapters that it takes.
    """
    models_of: dict[Variant, list[str]] = defaultdict(list)
    for name, model in manifest.models.items():
        models_of[Variant(model.chain, tuple(sorted(model.adapters.items())))].append(name)
    variants = sorted(models_of)
    chains = sorted({variant.chain for variant in variants})
    limits = _Limits(max_span_layers, check_layers)
    runs = {chain: _cut(chain[1:], chains, manifest.blocks, limits) for chain in chains}
    drops = _dropping_runs(runs, manifest.blocks)
    spans = sorted({run for chain_runs in runs.values() for run in chain_runs})
    index = {run: i for i, run in enumerate(spans)}
    variants.sort(key=lambda variant: ([index[run] for run in runs[variant.chain]], variant.adapters))
    segments = plan_segments(variants, manifest.blocks)
    if enable_lora:
        lora = {span: _all_projections(span, manifest.blocks) for span in spans}
    else:
        lora = _lora_targets(variants, runs, manifest.adapters)
        for span in known:
            lora[span.block_ids] = _either(lora.get(span.block_ids, ()), span.lora)
    return Topology(
        spans=tuple(
            Span(
                run,
                layers := _num_layers(run, manifest.blocks),
                run in drops,
                lora.get(run, ()),
                scores and layers > 0,
            )
            for run in spans
        ),
        chains=tuple(
            _chain_plan(
                variant, runs[variant.chain], index, *segments[variant], manifest.blocks, check_layers
            )
            for variant in variants
        ),
        chain_of_model={name: i for i, variant in enumerate(variants) for name in models_of[variant]},
    )


def _lora_targets(
    variants: Sequence[Variant],
    runs: Mapping[tuple[str, ...], tuple[tuple[str, ...], ...]],
    adapters: Mapping[str, AdapterRecord],
) -> dict[tuple[str, ...], tuple[tuple[int, tuple[str, ...]], ...]]:
    """By run, the projections of its blocks that adapters change (`Span.lora`)."""
    found: dict[tuple[str, ...], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for chain, adapter_ids in variants:
        changed = dict(adapter_ids)
        position = 1
        for run in runs[chain]:
            for i in range(len(run)):
                if position + i in changed:
                    loras = adapters[changed[position + i]].spec.loras
                    found[run][i].update(lora.projection for lora in loras)
            position += len(run)
    return {run: tuple((i, tuple(sorted(names))) for i, names in sorted(found[run].items())) for run in found}


def _either(
    one: Sequence[tuple[int, tuple[str, ...]]], other: Sequence[tuple[int, tuple[str, ...]]]
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """The projections that are in one of two (`Span.lora`)."""
    joined: dict[int, set[str]] = defaultdict(set)
    for index, names in (*one, *other):
        joined[index].update(names)
    return tuple((index, tuple(sorted(names))) for index, names in sorted(joined.items()))


def _all_projections(
    run: Sequence[str], blocks: Mapping[str, BlockRecord]
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    kinds = [blocks[block_id].spec.kind for block_id in run]
    return tuple((i, tuple(sorted(PROJECTIONS[kind]))) for i, kind in enumerate(kinds) if kind in PROJECTIONS)


def _num_layers(run: Sequence[str], blocks: Mapping[str, BlockRecord]) -> int:
    return sum(is_attn(block_id, blocks) for block_id in run)


def _cut(
    body: tuple[str, ...],
    chains: Sequence[tuple[str, ...]],
    blocks: Mapping[str, BlockRecord],
    limits: _Limits,
) -> tuple[tuple[str, ...], ...]:
    """Cut a chain's body wherever some chain goes on differently (the unitigs of block succession)."""
    after: dict[str, set[str]] = defaultdict(set)
    before: dict[str, set[str]] = defaultdict(set)
    for chain in chains:
        padded = (_EDGE, *chain[1:], _EDGE)
        for left, right in pairwise(padded):
            after[left].add(right)
            before[right].add(left)
    runs: list[tuple[str, ...]] = []
    start, layers, depth = 0, 0, 0
    for i, block_id in enumerate(body):
        layers += is_attn(block_id, blocks)
        depth += is_attn(block_id, blocks)
        following = body[i + 1] if i + 1 < len(body) else _EDGE
        splits = len(after[block_id]) > 1 or len(before[following]) > 1 or following == _EDGE
        full = (limits.span is not None and layers >= limits.span) or depth == limits.check
        if splits or (full and _starts_layer(following, blocks)):
            runs.append(body[start : i + 1])
            start, layers = i + 1, 0
    return tuple(runs)


def _starts_layer(block_id: str, blocks: Mapping[str, BlockRecord]) -> bool:
    return block_id != _EDGE and is_attn(block_id, blocks)


def _dropping_runs(
    runs: Mapping[tuple[str, ...], tuple[tuple[str, ...], ...]], blocks: Mapping[str, BlockRecord]
) -> set[tuple[str, ...]]:
    """The runs in which rows leave: per chain the first that nowhere, in no chain, has attention after it.

    (A run that ends in a head has none anywhere, so every chain has such a run.)
    """
    has_attention_after: set[tuple[str, ...]] = set()
    for chain_runs in runs.values():
        last = max(i for i, run in enumerate(chain_runs) if _num_layers(run, blocks))
        has_attention_after.update(chain_runs[:last])
    return {next(run for run in chain_runs if run not in has_attention_after) for chain_runs in runs.values()}


def _chain_plan(
    variant: Variant,
    chain_runs: tuple[tuple[str, ...], ...],
    index: Mapping[tuple[str, ...], int],
    segments: tuple[Segment, ...],
    boundaries: tuple[int, ...],
    blocks: Mapping[str, BlockRecord],
    check_layers: int | None,
) -> ChainPlan:
    chain = variant.chain
    uses, position, layer = [], 1, 0
    for run in chain_runs:
        uses.append(SpanUse(index[run], position, layer))
        position += len(run)
        layer += _num_layers(run, blocks)
    attn, head = blocks[chain[1]].spec, blocks[chain[-1]].spec
    assert isinstance(attn, AttnSpec), "the manifest reader checks the order of kinds"
    assert isinstance(head, HeadSpec), "the manifest reader checks the order of kinds"
    family = Family(attn.hidden_size, attn.num_kv_heads, attn.head_dim)
    # chains that part at a block go on differently after the one before: a span begins there
    use_at = {use.position: i for i, use in enumerate(uses)}
    entries = tuple(use_at.get(position, 0) for position in boundaries)
    segments = tuple(
        s if entry else replace(s, boundary="") for s, entry in zip(segments, entries, strict=True)
    )
    behind = (i for i, use in enumerate(uses) if use.first_layer == check_layers)
    check = next(behind, None) if check_layers != layer else None
    return ChainPlan(
        family,
        chain[0],
        tuple(uses),
        layer,
        segments,
        head.vocab_size,
        variant.adapters,
        entries,
        check,
        variant_key(variant),
        tuple(layer_keys(variant, blocks)),
    )
