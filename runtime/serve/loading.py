"""From a zoo on disk to loaded engines, pools and tokenizers: done once, before the first request.

What is wrong with one model is no reason not to serve the others: models with damaged files, of spans that do
not compile and with logits that are not finite are left out, by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS, Engine, EngineError, EngineMaker, activation_dtype
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.exec.adapters import AdapterCache, AdapterInputs
from blockzoo.runtime.exec.executor import Executor, Rows
from blockzoo.runtime.exec.topology import ChainPlan, Family, Span, Topology, plan_topology
from blockzoo.runtime.kv.boundary import BoundaryCache
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.serve.config import MAX_PROMPT_LOGITS, EngineConfig
from blockzoo.runtime.serve.model_files import ModelFiles, reason
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.generation_defaults import sampling_defaults
from blockzoo.zoo.manifest import ModelRecord
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.store import Zoo

_LOG = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # engines done, engines in all


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a request needs to know of its model."""

    name: str
    chain_index: int
    chain: ChainPlan
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    max_len: int  # tokens of prompt and answer together
    plain_rope: bool  # rotating a key by a difference of positions moves it there
    generation_defaults: Mapping[str, float | int]  # of its maker, as fields of SamplingParams


@dataclass(frozen=True, slots=True)
class LoadedZoo:
    """A zoo ready to run: one executor and one KV cache per family, one entry per model.

    Attributes:
        left_out: models of the zoo that are not served, and why.
        unsound: those of them whose files are whole: what they compute is not.
    """

    models: Mapping[str, LoadedModel]
    topology: Topology
    executors: Mapping[Family, Executor]
    caches: Mapping[Family, KVCache]
    boundaries: BoundaryCache
    adapters: AdapterCache
    engine_facts: Mapping[str, object]
    left_out: Mapping[str, str]
    unsound: frozenset[str] = frozenset()


class _UnsoundError(Exception):
    """Some chains cannot be run; why, by the model."""

    def __init__(self, models: Mapping[str, Exception]) -> None:
        super().__init__(", ".join(models))
        self.models = models


def load_zoo(
    zoo: Zoo, config: EngineConfig, maker: EngineMaker, progress: Progress | None = None
) -> LoadedZoo:
    """Compile all spans, allocate the pools and run every engine once; for all models that can be served.

    Those left out are logged as warnings.

    Raises:
        InvalidRequestError: the KV budget holds no page for some family, or the zoo has no models.
        StoreError, TokenizerError, EngineError, InvalidRequestError: no model can be served; or, where
            `config.strict`, some model cannot.
    """
    if not zoo.manifest.models:
        raise InvalidRequestError(f"{zoo.path} holds no models; add one with zoo-compile")
    files = ModelFiles(zoo)
    problems: dict[str, Exception] = {
        name: error for name in zoo.manifest.models if (error := files.damage(name)) is not None
    }
    damaged = frozenset(problems)
    engines: dict[Span, Engine] = {}
    while True:
        _check_enough(zoo, problems, config.strict)
        try:
            loaded = _load(zoo.without(problems), files, config, maker, engines, progress)
            break
        except _UnsoundError as error:  # what models share depends on which there are: planned again
            problems |= error.models
    for block in files.blocks.values():
        block.drop_pages()
    left_out = {name: reason(error, zoo.path) for name, error in sorted(problems.items())}
    for name, why in left_out.items():
        _LOG.warning("model %s is left out: %s", name, why)
    return replace(loaded, left_out=left_out, unsound=frozenset(problems) - damaged)


def _check_enough(zoo: Zoo, problems: Mapping[str, Exception], strict: bool) -> None:
    """Raise the first of the problems, which says all, where no model is left, or one must not be missing."""
    if not problems or (len(problems) < len(zoo.manifest.models) and not strict):
        return
    first, *others = problems.values()
    if all(str(other) == str(first) for other in others):
        raise first
    raise type(first)("; ".join(f"model {name}: {error}" for name, error in problems.items())) from first


def _load(
    zoo: Zoo,
    files: ModelFiles,
    config: EngineConfig,
    maker: EngineMaker,
    engines_of: dict[Span, Engine],
    progress: Progress | None,
) -> LoadedZoo:
    """Load a zoo of undamaged models; `engines_of`: those compiled so far. Raises _UnsoundError."""
    reuse = config.approximate
    topology = plan_topology(
        zoo.manifest,
        config.max_span_layers,
        config.enable_lora,
        check_layers=None if reuse is None or not reuse.uses_check else reuse.check_layers,
        scores=reuse is not None and reuse.uses_scores,
    )
    num_pages = pages_per_family(topology, config, maker)
    models = {
        name: _load_model(name, record, topology, files.tokenizer(name), config, num_pages)
        for name, record in zoo.manifest.models.items()
    }
    _warn_of_short_pools(zoo, config, models)
    embeddings = {embed_id: maker.embedding(files.blocks[embed_id]) for embed_id in _embeds(topology)}
    engines = _compile_spans(topology, files.blocks, maker, engines_of, progress)
    rope_tables = _rope_tables(zoo, topology, models)
    adapters = AdapterCache(zoo.read_adapter, maker.arrays, config.adapter_cache_bytes)
    specs = [[files.blocks[i].spec for i in span.block_ids] for span in topology.spans]
    executors = {
        family: Executor(
            family,
            topology.chains,
            topology.spans,
            {i: engines[i] for c in topology.chains if c.family == family for i in {u.span for u in c.uses}},
            embeddings,
            rope_tables,
            maker.arrays,
            pages,
            max_tokens=config.max_num_batched_tokens,
            max_seqs=config.max_num_seqs,
            adapters=AdapterInputs(adapters, topology.chains, topology.spans, specs),
            max_more_logits=MAX_PROMPT_LOGITS,
        )
        for family, pages in num_pages.items()
    }
    _warm_up(topology, executors)
    boundaries = BoundaryCache(
        config.boundary_cache_bytes if config.prefix_caching else 0, maker.arrays.rows_like
    )
    caches = {
        family: KVCache(pages, config.prefix_caching, boundaries, config.approximate)
        for family, pages in num_pages.items()
    }
    return LoadedZoo(models, topology, executors, caches, boundaries, adapters, maker.facts(), {})


def _embeds(topology: Topology) -> set[str]:
    return {chain.embed_id for chain in topology.chains}


def pages_per_family(topology: Topology, config: EngineConfig, maker: EngineMaker) -> dict[Family, int]:
    """Split the budget between families by what a token takes in all layers of their models together."""
    itemsize = activation_dtype(maker.precision).itemsize
    page_bytes: dict[Family, int] = {}
    shares: dict[Family, int] = {}
    for chain_index in topology.chain_of_model.values():
        chain = topology.chains[chain_index]
        family = chain.family
        page_bytes[family] = 2 * PAGE_TOKENS * family.num_kv_heads * family.head_dim * itemsize
        shares[family] = shares.get(family, 0) + chain.num_layers * page_bytes[family]
    budget, total = config.resolved_kv_bytes(), sum(shares.values())
    pages = {}
    for family, share in shares.items():
        pages[family] = budget * share // (total * page_bytes[family])
        layers = max(chain.num_layers for chain in topology.chains if chain.family == family)
        if pages[family] < layers:
            need = -(-layers * page_bytes[family] * total // share)
            raise InvalidRequestError(
                f"kv_cache_bytes is {budget}; one page of {PAGE_TOKENS} tokens in each of {layers} layers "
                f"needs {need}: raise it"
            )
    return pages


def _warn_of_short_pools(zoo: Zoo, config: EngineConfig, models: Mapping[str, LoadedModel]) -> None:
    """Say which models the pool and not their own (or the configured) length bounds."""
    short: dict[tuple[int, int], list[str]] = {}  # by tokens that fit, and the model's own
    for name, model in models.items():
        own = zoo.manifest.models[name].config.max_position_embeddings
        if model.max_len < min(own, config.max_model_len or own):
            short.setdefault((model.max_len, own), []).append(name)
    for (fits, own), names in sorted(short.items()):
        _LOG.warning(
            "the KV pool holds %d tokens of one sequence of %s, which could take %d: longer requests are "
            "refused; raise kv_cache_bytes (zoo-serve --kv-cache-gb), or set max_model_len (--max-model-len) "
            "to what you need",
            fits,
            ", ".join(names),
            own,
        )


def _load_model(
    name: str,
    record: ModelRecord,
    topology: Topology,
    tokenizer: Tokenizer,
    config: EngineConfig,
    num_pages: Mapping[Family, int],
) -> LoadedModel:
    index = topology.chain_of_model[name]
    chain = topology.chains[index]
    pool_tokens = num_pages[chain.family] // chain.num_layers * PAGE_TOKENS
    bounds = [record.config.max_length, pool_tokens]
    if config.max_model_len is not None:
        bounds.append(config.max_model_len)
    plain = record.config.rope.rope_type == "default"
    defaults = sampling_defaults(record.generation_defaults)
    return LoadedModel(name, index, chain, tokenizer, record.end_ids, min(bounds), plain, defaults)


def _compile_spans(
    topology: Topology,
    blocks: Mapping[str, Block],
    maker: EngineMaker,
    engines_of: dict[Span, Engine],
    progress: Progress | None,
) -> dict[int, Engine]:
    maker.expect(len(topology.spans))
    """The engine of each span, compiled where `engines_of` has none. Raises _UnsoundError."""
    failed: dict[int, Exception] = {}
    for index, span in enumerate(topology.spans):
        if span not in engines_of:
            try:
                engines_of[span] = maker.span(
                    [blocks[i] for i in span.block_ids],
                    drops_rows=span.drops_rows,
                    lora=dict(span.lora),
                    scores=span.scores,
                )
            except (EngineError, ZooError) as error:
                failed[index] = error
        if progress is not None:
            progress(index + 1, len(topology.spans))
    if failed:
        raise _UnsoundError(_models_of(topology, _chains_over(topology, failed)))
    return {index: engines_of[span] for index, span in enumerate(topology.spans)}


def _chains_over(topology: Topology, spans: Mapping[int, Exception]) -> dict[int, Exception]:
    """Of the chains that use one of the spans, the exception of the first."""
    found = {
        i: [spans[use.span] for use in c.uses if use.span in spans] for i, c in enumerate(topology.chains)
    }
    return {index: errors[0] for index, errors in found.items() if errors}


def _models_of(topology: Topology, chains: Mapping[int, Exception]) -> dict[str, Exception]:
    return {name: chains[index] for name, index in topology.chain_of_model.items() if index in chains}


def _rope_tables(
    zoo: Zoo, topology: Topology, models: Mapping[str, LoadedModel]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Per chain, tables as long as its longest model; chains with one rotary embedding share one."""
    longest: dict[tuple[RopeConfig, int], int] = {}
    keys: dict[int, tuple[RopeConfig, int]] = {}
    for model in models.values():
        key = (zoo.manifest.models[model.name].config.rope, model.chain.family.head_dim)
        keys[model.chain_index] = key
        longest[key] = max(longest.get(key, 0), model.max_len)
    tables = {(rope, dim): rope.tables(dim, length) for (rope, dim), length in longest.items()}
    return {index: tables[key] for index, key in keys.items()}


def _warm_up(topology: Topology, executors: Mapping[Family, Executor]) -> None:
    """Run one token through every chain, while no page is in use.

    Engines pack their weights at the first run, so that the files' memory can be given back; and a
    broken attention operator shows here and not in an answer.

    Raises:
        _UnsoundError: the logits of some chains are not finite.
    """
    broken: dict[int, Exception] = {}
    for index, chain in enumerate(topology.chains):
        table = np.zeros((chain.num_layers, 1), np.int32)
        result = executors[chain.family].run([Rows(index, np.zeros(1, np.int32), 0, table, 1)])
        if not all(np.isfinite(logits).all() for logits, _ in result.logits):
            broken[index] = InvalidRequestError(
                "its first logits are not finite: run zoo-inspect --check; bf16 may be too narrow for it, "
                "try precision f32"
            )
    if broken:
        raise _UnsoundError(_models_of(topology, broken))
