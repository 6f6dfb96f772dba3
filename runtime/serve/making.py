"""A manifest -> a loaded zoo: spans are compiled, pools and executors put around them.

What another zoo, whose place it takes, has of that already is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blockzoo.engines import kv_pages
from blockzoo.engines.base import PAGE_TOKENS, Embedding, Engine, EngineError, EngineMaker
from blockzoo.engines.probe import first_run
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.exec.adapters import AdapterCache, AdapterInputs, AdapterUnavailableError
from blockzoo.runtime.exec.executor import Executor
from blockzoo.runtime.exec.interface import StepExecutor
from blockzoo.runtime.exec.span_engine import span_engine
from blockzoo.runtime.exec.topology import Family, Span, Topology, plan_topology
from blockzoo.runtime.kv.boundary import BoundaryCache
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.serve.config import MAX_PROMPT_LOGITS, EngineConfig
from blockzoo.runtime.serve.loaded import (
    Calibrated,
    LoadedModel,
    LoadedZoo,
    RopeTables,
    Surrogate,
    UnsoundError,
)
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.generation_defaults import sampling_defaults
from blockzoo.zoo.manifest import Manifest, ReuseRecord, is_drafter
from blockzoo.zoo.rope import RopeConfig

if TYPE_CHECKING:
    from blockzoo.runtime.serve.over_workers import Workers

Progress = Callable[[int, int], None]  # engines done, engines in all
Rotation = tuple[np.ndarray, np.ndarray]  # cos, sin float32 [positions, head_dim]

_SPANS_PER_WORKER = 2  # that a chain is cut into at least


@dataclass(frozen=True, slots=True)
class Making:
    """What makes loaded zoos.

    Attributes:
        zoo: folder of the zoo.
        config: of the engine.
        maker: of engines.
        boundaries, adapters: of all that are made, one after the other.
        kv_bytes: of all pools together.
    """

    zoo: Path
    config: EngineConfig
    maker: EngineMaker
    boundaries: BoundaryCache
    adapters: AdapterCache
    kv_bytes: int

    @property
    def with_surrogates(self) -> bool:
        """Whether surrogates of models are loaded; where steps are recorded, they are of no use."""
        return self.config.speculate == "auto" and not self.maker.arrays.records

    def plan(self, manifest: Manifest, known: Iterable[Span] = ()) -> Topology:
        """The topology of a manifest, as the configuration wants it."""
        reuse = self.config.approximate
        return plan_topology(
            manifest,
            self._span_layers(manifest),
            self.config.enable_lora,
            check_layers=None if reuse is None or not reuse.uses_check else reuse.check_layers,
            scores=reuse is not None and reuse.uses_scores,
            known=known,
            surrogates=self.with_surrogates,
        )

    def _span_layers(self, manifest: Manifest) -> int | None:
        """Where spans are cut though no model parts there: with workers, so that there is what to divide."""
        count = self.config.workers or 1
        if self.config.max_span_layers is not None or count == 1:
            return self.config.max_span_layers
        most = max(model.config.num_layers for model in manifest.models.values())
        return max(1, most // (_SPANS_PER_WORKER * count))

    def pages(self, topology: Topology, before: LoadedZoo | None = None) -> dict[Family, int]:
        """Pages of each family's pool; those of `before` where it has the same families.

        Raises:
            InvalidRequestError: the KV budget holds no page for some family.
        """
        if before is not None and before.caches.keys() == {chain.family for chain in topology.chains}:
            return {family: cache.pool.num_pages for family, cache in before.caches.items()}
        return pages_per_family(topology, replace(self.config, kv_cache_bytes=self.kv_bytes), self.maker)

    def compile(
        self,
        topology: Topology,
        engines: dict[Span, Engine],
        block: Callable[[str], Block],
        progress: Progress | None = None,
        runs_once: bool = False,
    ) -> None:
        """Add the engine of each span that has none; `runs_once`: it is run, so that it packs its weights.
        Workers compile theirs as they start (`put_together`).

        Raises:
            UnsoundError: some cannot be compiled; the others were added.
        """
        if self.config.workers is not None:
            return
        self.maker.expect(len(topology.spans))
        failed: dict[int, Exception] = {}
        for index, span in enumerate(topology.spans):
            if span not in engines:
                try:
                    engine = span_engine(self.maker, span, block)
                    if runs_once:
                        first_run(engine, self.maker.arrays)
                    engines[span] = engine
                except (RuntimeError, ZooError) as error:  # an EngineError, or what a first run came to
                    failed[index] = error
            if progress is not None:
                progress(index + 1, len(topology.spans))
        if failed:
            raise UnsoundError(models_of(topology, _chains_over(topology, failed)))

    def put_together(
        self,
        manifest: Manifest,
        gone: Collection[str],
        topology: Topology,
        engines: Mapping[Span, Engine],
        blocks: Mapping[str, Block],
        tokenizers: Mapping[str, Tokenizer],
        before: LoadedZoo | None = None,
    ) -> LoadedZoo:
        """A loaded zoo of engines that are compiled; nothing of `before`, whose place it takes, is changed.
        Over workers it has others than `before`, with all engines anew.

        Args:
            manifest, gone, engines, blocks: see `LoadedZoo`.
            topology: planned from the manifest.
            tokenizers: by model.

        Raises:
            InvalidRequestError: the KV budget holds no page for some family.
        """
        maker, config = self.maker, self.config
        pages = self.pages(topology, before)
        caches = {
            family: before.caches[family]
            if before is not None and family in before.caches
            else self._cache(family, count)
            for family, count in pages.items()
        }
        capacity = {family: cache.pool.capacity for family, cache in caches.items()}
        embeds = {chain.embed_id for chain in topology.chains}
        known = {} if before is None else before.embeddings
        embeddings = {key: known.get(key) or maker.embedding(blocks[key]) for key in embeds}
        ropes = _ropes(manifest, topology, capacity, config, {} if before is None else before.ropes)
        tables = {
            index: ropes[manifest.models[name].config.rope, topology.chains[index].family.head_dim]
            for name, index in (*topology.chain_of_model.items(), *topology.surrogate_of_model.items())
        }
        workers = None
        executors: Mapping[Family, StepExecutor]
        if config.workers is not None:
            workers = self._start_workers(manifest, topology, blocks, capacity, tables, embeddings, before)
            executors = workers.executors
        else:
            executors = {
                family: self._executor(
                    family, topology, engines, blocks, embeddings, tables, capacity[family], before
                )
                for family in pages
            }
        models = {
            name: replace(
                _model(name, manifest, topology, tokenizers[name]),
                surrogate=_surrogate(name, manifest, topology) if self.with_surrogates else None,
            )
            for name in manifest.models
            if name not in gone
        }
        return LoadedZoo(
            fitted(models, manifest, config, pages),
            manifest,
            topology,
            executors,
            caches,
            self.boundaries,
            self.adapters,
            {span: engines[span] for span in topology.spans if workers is None},
            {i: blocks[i] for chain in topology.chains for i in topology.chain_ids(chain)},
            embeddings,
            ropes,
            {chain.key: index for index, chain in enumerate(topology.chains)},
            maker.facts(),
            frozenset(gone),
            workers=workers,
        )

    def _start_workers(
        self,
        manifest: Manifest,
        topology: Topology,
        blocks: Mapping[str, Block],
        num_pages: Mapping[Family, int],
        tables: Mapping[int, Rotation],
        embeddings: Mapping[str, Embedding],
        before: LoadedZoo | None,
    ) -> Workers:
        """Raises UnsoundError: some spans cannot be loaded; InvalidRequestError."""
        from blockzoo.runtime.serve.over_workers import start_workers  # ZeroMQ is imported with workers alone
        from blockzoo.runtime.workers.processes import UnloadableError

        vocab_sizes = {key: table.vocab_size for key, table in embeddings.items()}
        old = None if before is None else before.workers
        try:
            return start_workers(
                self.zoo,
                manifest,
                topology,
                blocks,
                num_pages,
                tables,
                vocab_sizes,
                self.maker,
                self.config,
                self.kv_bytes,
                None if old is None else old.group.processes,
                None if old is None else old.rates,
            )
        except UnloadableError as error:
            problems = {span: EngineError(why) for span, why in error.problems.items()}
            raise UnsoundError(models_of(topology, _chains_over(topology, problems))) from error

    def _cache(self, family: Family, num_pages: int) -> KVCache:
        """A pool that may grow to all there is for KV, where that takes no memory before it is used."""
        most = self.kv_bytes // page_bytes(family, self.maker) if self.maker.arrays.is_lazy else 0
        return KVCache(
            num_pages,
            self.config.prefix_caching,
            self.boundaries,
            self.config.approximate,
            max(num_pages, most),
        )

    def _executor(
        self,
        family: Family,
        topology: Topology,
        engines: Mapping[Span, Engine],
        blocks: Mapping[str, Block],
        embeddings: Mapping[str, Embedding],
        tables: Mapping[int, Rotation],
        num_pages: int,
        before: LoadedZoo | None,
    ) -> Executor:
        chains = topology.chains
        used = {use.span for chain in chains if chain.family == family for use in chain.uses}
        specs = [[blocks[i].spec for i in span.block_ids] for span in topology.spans]
        return Executor(
            family,
            chains,
            topology.spans,
            {index: engines[topology.spans[index]] for index in used},
            embeddings,
            tables,
            self.maker.arrays,
            num_pages,
            max_tokens=self.config.max_num_batched_tokens,
            max_seqs=self.config.max_num_seqs,
            max_more_logits=MAX_PROMPT_LOGITS,
            adapters=AdapterInputs(self.adapters, chains, topology.spans, specs),
            before=None if before is None else before.local_executors.get(family),
        )


def page_bytes(family: Family, maker: EngineMaker) -> int:
    """K and V of 32 tokens in a layer."""
    return kv_pages.page_bytes(family.num_kv_heads, family.head_dim, maker.kv_precision)


def pages_per_family(topology: Topology, config: EngineConfig, maker: EngineMaker) -> dict[Family, int]:
    """Split the budget between families by what a token takes in all layers of their models together."""
    shares: dict[Family, int] = {}
    for chain_index in topology.chain_of_model.values():
        chain = topology.chains[chain_index]
        more = chain.num_layers * page_bytes(chain.family, maker)
        shares[chain.family] = shares.get(chain.family, 0) + more
    budget, total = config.resolved_kv_bytes(), sum(shares.values())
    pages = {}
    for family, share in shares.items():
        size = page_bytes(family, maker)
        pages[family] = budget * share // (total * size)
        layers = most_layers(topology, family)
        if pages[family] < layers:
            need = -(-layers * size * total // share)
            raise InvalidRequestError(
                f"kv_cache_bytes is {budget}; one page of {PAGE_TOKENS} tokens in each of {layers} layers "
                f"needs {need}: raise it"
            )
    return pages


def most_layers(topology: Topology, family: Family) -> int:
    """Of the chains of a family."""
    return max(chain.num_layers for chain in topology.chains if chain.family == family)


def fitted(
    models: Mapping[str, LoadedModel],
    manifest: Manifest,
    config: EngineConfig,
    pages: Mapping[Family, int],
) -> dict[str, LoadedModel]:
    """Models with the longest sequence that they, the configuration and so many pages allow."""
    found = {}
    for name, model in models.items():
        pool = pages[model.chain.family] // model.chain.num_layers * PAGE_TOKENS
        found[name] = replace(model, max_len=min(pool, _own_length(name, manifest, config)))
    return found


def _own_length(name: str, manifest: Manifest, config: EngineConfig) -> int:
    own = manifest.models[name].config.max_length
    return own if config.max_model_len is None else min(own, config.max_model_len)


def _model(name: str, manifest: Manifest, topology: Topology, tokenizer: Tokenizer) -> LoadedModel:
    record, index = manifest.models[name], topology.chain_of_model[name]
    plain = record.config.rope.rope_type == "default"
    defaults = sampling_defaults(record.generation_defaults)
    return LoadedModel(
        name,
        index,
        topology.chains[index],
        tokenizer,
        record.end_ids,
        0,
        plain,
        defaults,
        calibrated=None if record.reuse is None else Calibrated(_reuse(record.reuse)),
    )


def _surrogate(name: str, manifest: Manifest, topology: Topology) -> Surrogate | None:
    """What guesses for a model; None where nothing does, or it is no longer there."""
    record = manifest.models[name]
    found = record.surrogate
    if found is None:
        return None
    index = topology.surrogate_of_model.get(name)
    if found.model is not None and is_drafter(manifest, found.model, name):
        index = topology.chain_of_model[found.model]
    if index is None:
        return None
    key = topology.chains[index].key
    return Surrogate(index, key, found.model is not None, found.acceptance, found.cost)


def _reuse(record: ReuseRecord) -> ReuseConfig | None:
    """Settings of approximate reuse as zoo-calibrate chose them; what it leaves alone is by default."""
    return None if record.settings is None else ReuseConfig(**asdict(record.settings))


def _ropes(
    manifest: Manifest,
    topology: Topology,
    capacity: Mapping[Family, int],
    config: EngineConfig,
    known: RopeTables,
) -> RopeTables:
    """Tables as long as the longest model of each needs: chains with one rotary embedding share one.

    Those that there are go on being used where they are long enough: requests under way may need them.
    """
    longest: dict[tuple[RopeConfig, int], int] = {}
    for name, index in topology.chain_of_model.items():
        chain = topology.chains[index]
        key = manifest.models[name].config.rope, chain.family.head_dim
        most = capacity[chain.family] // chain.num_layers * PAGE_TOKENS
        longest[key] = max(longest.get(key, 0), min(most, _own_length(name, manifest, config)))
    return {
        (rope, dim): known[rope, dim]
        if (rope, dim) in known and len(known[rope, dim][0]) >= length
        else rope.tables(dim, length)
        for (rope, dim), length in longest.items()
    }


def _chains_over(topology: Topology, spans: Mapping[int, Exception]) -> dict[int, Exception]:
    """Of the chains that use one of the spans, the exception of the first."""
    found = {
        i: [spans[use.span] for use in c.uses if use.span in spans] for i, c in enumerate(topology.chains)
    }
    return {index: errors[0] for index, errors in found.items() if errors}


def models_of(topology: Topology, chains: Mapping[int, Exception]) -> dict[str, Exception]:
    """The exception of the chain, or the surrogate, of each model that has one."""
    of_models = (*topology.surrogate_of_model.items(), *topology.chain_of_model.items())
    return {name: chains[index] for name, index in of_models if index in chains}


def check_sound(topology: Topology, executors: Mapping[Family, StepExecutor], chains: Iterable[int]) -> None:
    """Run one token through chains.

    At the start engines pack their weights here, so that the files' memory can be given back; and a broken
    attention operator shows here and not in an answer.

    Raises:
        UnsoundError: the logits of some are not finite.
    """
    broken: dict[int, Exception] = {}
    for index in chains:
        try:
            if not executors[topology.chains[index].family].is_sound(index):
                broken[index] = InvalidRequestError(
                    "its first logits are not finite: run zoo-inspect --check; bf16 may be too narrow for "
                    "it, try precision f32"
                )
        except AdapterUnavailableError as error:
            broken[index] = error
    if broken:
        raise UnsoundError(models_of(topology, broken))


def check_all(loaded: LoadedZoo) -> None:
    """`check_sound` of all chains; workers end where it raises."""
    try:
        check_sound(loaded.topology, loaded.executors, range(len(loaded.topology.chains)))
    except BaseException:
        loaded.close_workers()
        raise
    if loaded.workers is not None:
        loaded.workers.group.release_memory()
