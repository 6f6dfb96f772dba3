"""What the manifest implies for serving: spans to compile, chains over them, KV identity of layers.

Ids only; nothing here knows tensors, engines or requests.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from blockzoo.runtime.exec.runs import (
    Limits,
    Lora,
    Path,
    Run,
    all_projections,
    cut,
    dropping_runs,
    either,
    lora_targets,
    num_layers,
)
from blockzoo.runtime.exec.segments import Variant, is_attn, layer_keys, plan_segments, variant_key
from blockzoo.runtime.kv.sequence import Segment
from blockzoo.zoo.blocks import AttnSpec, HeadSpec
from blockzoo.zoo.manifest import BlockRecord, Manifest


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
        drafts: whether surrogates alone go through it.
    """

    block_ids: tuple[str, ...]
    num_layers: int
    drops_rows: bool
    lora: Lora = ()
    scores: bool = False
    drafts: bool = False


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

    A surrogate of a model has a plan too, over the same page tables: K and V of its blocks are those of the
    layers in the model's chain for which they stand, so that it goes on behind what the model has computed.
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


class Copy(NamedTuple):
    """A span once more, for some chains: so that they go through another worker there."""

    span: int
    chains: tuple[int, ...]


def originals(num_spans: int, copies: Sequence[Copy]) -> tuple[int, ...]:
    """By span, itself, or which it is a copy of; copies are the last of the spans."""
    return *range(num_spans - len(copies)), *(copy.span for copy in copies)


class _Surrogate(NamedTuple):
    """What tells surrogates apart."""

    variant: Variant  # of the model
    path: Path


@dataclass(frozen=True, slots=True)
class Topology:
    """All spans, and the chains over them; `chains` is sorted so that chains with common spans are
    neighbours: a batch in this order has the rows of a shared span in one slice."""

    spans: tuple[Span, ...]
    chains: tuple[ChainPlan, ...]
    chain_of_model: Mapping[str, int]
    surrogate_of_model: Mapping[str, int]
    """Of those that have one, its chain; these stand behind all others."""
    copies: tuple[Copy, ...] = ()
    """The last of the spans (`with_copies`)."""

    @property
    def originals(self) -> tuple[int, ...]:
        """By span, itself, or which it is a copy of."""
        return originals(len(self.spans), self.copies)

    def models_of_surrogates(self) -> dict[int, int]:
        """By chain of a surrogate, the model's in whose pages it runs."""
        return {index: self.chain_of_model[name] for name, index in self.surrogate_of_model.items()}

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
    surrogates: bool = False,
) -> Topology:
    """Derive spans, chains and segments from a manifest.

    Args:
        manifest: of the zoo to serve.
        max_span_layers: cut spans after this many layers (benchmarks); None: as long as possible.
        enable_lora: let every projection take adapters, for those that come later.
        check_layers: cut also after so many layers of each chain that has more; None: nowhere.
        scores: engines with attention tell how much of it each token received.
        known: spans that are compiled. One of the same blocks goes on taking the adapters that it takes.
        surrogates: plan those of the models, too.
    """
    models_of: dict[Variant, list[str]] = defaultdict(list)
    stand_ins: dict[_Surrogate, list[str]] = defaultdict(list)
    for name, model in manifest.models.items():
        variant = Variant(model.chain, tuple(sorted(model.adapters.items())))
        models_of[variant].append(name)
        if surrogates and model.surrogate is not None and model.surrogate.model is None:
            at, ids = zip(*sorted(model.surrogate.blocks.items()), strict=True)
            stand_ins[_Surrogate(variant, Path(ids, at))].append(name)
    variants, others = sorted(models_of), sorted(stand_ins)
    paths = {variant: Path(variant.chain, tuple(range(len(variant.chain)))) for variant in variants}
    all_paths = sorted({*paths.values(), *(other.path for other in others)})
    limits = Limits(max_span_layers, check_layers)
    runs = {path: cut(path, all_paths, manifest.blocks, limits) for path in all_paths}
    drops = dropping_runs(runs, manifest.blocks)
    of_models = {run for path in paths.values() for run in runs[path]}
    spans = sorted({run for path_runs in runs.values() for run in path_runs})
    index = {run: i for i, run in enumerate(spans)}
    variants.sort(key=lambda variant: ([index[run] for run in runs[paths[variant]]], variant.adapters))
    segments = plan_segments(variants, manifest.blocks)
    if enable_lora:
        lora = {span: all_projections(span, manifest.blocks) for span in spans}
    else:
        adapted = [(path, variant.adapters) for variant, path in paths.items()]
        adapted += [(other.path, other.variant.adapters) for other in others]
        lora = lora_targets(adapted, runs, manifest.adapters)
        for span in known:
            lora[span.block_ids] = either(lora.get(span.block_ids, ()), span.lora)
    chains = [
        _chain_plan(
            variant,
            _uses(paths[variant], runs, index, variant, manifest.blocks),
            *segments[variant],
            manifest.blocks,
            check_layers,
        )
        for variant in variants
    ]
    chain_of = {variant: i for i, variant in enumerate(variants)}
    chains += [
        _surrogate_plan(
            chains[chain_of[other.variant]],
            other.path,
            _uses(other.path, runs, index, other.variant, manifest.blocks),
        )
        for other in others
    ]
    return Topology(
        spans=tuple(
            Span(
                run,
                layers := num_layers(run, manifest.blocks),
                run in drops,
                lora.get(run, ()),
                scores and layers > 0,
                run not in of_models,
            )
            for run in spans
        ),
        chains=tuple(chains),
        chain_of_model={name: chain_of[variant] for variant in variants for name in models_of[variant]},
        surrogate_of_model={
            name: len(variants) + i for i, other in enumerate(others) for name in stand_ins[other]
        },
    )


def with_copies(topology: Topology, copies: Sequence[Copy], blocks: Mapping[str, BlockRecord]) -> Topology:
    """A topology with these copies of spans, in the place of those that it has.

    Chains, and spans that are no copies, keep their numbers; copies follow, as they are given. Chains that go
    through different copies share no KV from there on, as it lies in different workers.

    Args:
        topology: planned from a manifest.
        copies: of spans that are none; each chain is in one of a span's at most, else it goes through the
            span itself.
        blocks: of the manifest.
    """
    known = topology.originals
    first = len(topology.spans) - len(topology.copies)
    taken = {(chain, copy.span): first + i for i, copy in enumerate(copies) for chain in copy.chains}
    uses = [
        tuple(replace(use, span=taken.get((i, s := known[use.span]), s)) for use in chain.uses)
        for i, chain in enumerate(topology.chains)
    ]
    models = topology.models_of_surrogates()
    variants = {}
    for index, chain in enumerate(topology.chains):
        if index not in models:
            steps = dict(chain.adapters)
            for use in uses[index]:
                if use.span >= first:  # K and V are others from here on, as with another adapter
                    steps[use.position] = f"{steps.get(use.position, '')} copy {use.span - first}"
            variants[index] = Variant(topology.chain_ids(chain), tuple(sorted(steps.items())))
    segments = plan_segments(list(variants.values()), blocks)
    chains: list[ChainPlan] = []
    for index, chain in enumerate(topology.chains):
        if index in models:  # they stand behind all others
            model = chains[models[index]]
            found = replace(chain, segments=model.segments, layer_keys=model.layer_keys)
        else:
            variant = variants[index]
            found = _chain_plan(variant, uses[index], *segments[variant], blocks, None)
        chains.append(
            replace(found, uses=uses[index], adapters=chain.adapters, check=chain.check, key=chain.key)
        )
    spans = (*topology.spans[:first], *(topology.spans[copy.span] for copy in copies))
    return replace(topology, spans=spans, chains=tuple(chains), copies=tuple(copies))


def _uses(
    path: Path,
    runs: Mapping[Path, tuple[Run, ...]],
    index: Mapping[Run, int],
    variant: Variant,
    blocks: Mapping[str, BlockRecord],
) -> tuple[SpanUse, ...]:
    """The spans of a path through a model's chain, with their places in that."""
    layers = [0, *accumulate(is_attn(block_id, blocks) for block_id in variant.chain)]  # before each position
    begins = accumulate((len(run) for run in runs[path]), initial=1)
    places = [path.positions[begin] for begin, _ in zip(begins, runs[path], strict=False)]
    return tuple(SpanUse(index[run], at, layers[at]) for run, at in zip(runs[path], places, strict=True))


def _surrogate_plan(model: ChainPlan, path: Path, uses: tuple[SpanUse, ...]) -> ChainPlan:
    """A model's plan with other spans: all of it runs, for sequences of the model."""
    said = "\n".join([model.key, *(f"{at} {i}" for i, at in zip(*path, strict=True))])
    key = hashlib.sha256(f"surrogate of {said}".encode()).hexdigest()
    return replace(model, embed_id=path.blocks[0], uses=uses, entries=(0,), check=None, key=key)


def _chain_plan(
    variant: Variant,
    uses: tuple[SpanUse, ...],
    segments: tuple[Segment, ...],
    boundaries: tuple[int, ...],
    blocks: Mapping[str, BlockRecord],
    check_layers: int | None,
) -> ChainPlan:
    chain = variant.chain
    layers = num_layers(chain, blocks)
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
    check = next(behind, None) if check_layers != layers else None
    return ChainPlan(
        family,
        chain[0],
        uses,
        layers,
        segments,
        head.vocab_size,
        variant.adapters,
        entries,
        check,
        variant_key(variant),
        tuple(layer_keys(variant, blocks)),
    )
