"""From a zoo on disk to loaded engines, pools and tokenizers: done once, before the first request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS, Engine, EngineMaker, activation_dtype
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.exec.adapters import AdapterCache, AdapterInputs
from blockzoo.runtime.exec.executor import Executor, Rows
from blockzoo.runtime.exec.topology import ChainPlan, Family, Topology, plan_topology
from blockzoo.runtime.kv.boundary import BoundaryCache
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.serve.config import EngineConfig
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.manifest import ModelRecord
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.store import Zoo

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


@dataclass(frozen=True, slots=True)
class LoadedZoo:
    """A zoo ready to run: one executor and one KV cache per family, one entry per model."""

    models: Mapping[str, LoadedModel]
    topology: Topology
    executors: Mapping[Family, Executor]
    caches: Mapping[Family, KVCache]
    boundaries: BoundaryCache
    adapters: AdapterCache
    engine_facts: Mapping[str, object]


def load_zoo(
    zoo: Zoo, config: EngineConfig, maker: EngineMaker, progress: Progress | None = None
) -> LoadedZoo:
    """Compile all spans, allocate the pools and run every engine once.

    Raises:
        InvalidRequestError: the KV budget holds no page for some family, or the zoo has no models.
        StoreError, EngineError: a block is damaged, a span does not compile.
    """
    if not zoo.manifest.models:
        raise InvalidRequestError(f"{zoo.path} holds no models; add one with zoo-compile")
    reuse = config.approximate
    topology = plan_topology(
        zoo.manifest,
        config.max_span_layers,
        config.enable_lora,
        check_layers=None if reuse is None or not reuse.uses_check else reuse.check_layers,
        scores=reuse is not None and reuse.uses_scores,
    )
    num_pages = _pages_per_family(topology, config, maker)
    load_tokenizer = cache(Tokenizer.load)  # models of a family share one folder, so one tokenizer
    models = {
        name: _load_model(name, record, topology, load_tokenizer(zoo.tokenizer_dir(name)), config, num_pages)
        for name, record in zoo.manifest.models.items()
    }
    embeds = {chain.embed_id: zoo.read_block(chain.embed_id) for chain in topology.chains}
    embeddings = {embed_id: maker.embedding(block) for embed_id, block in embeds.items()}
    blocks = {i: zoo.read_block(i) for span in topology.spans for i in span.block_ids}
    engines = _compile_spans(topology, blocks, maker, progress)
    rope_tables = _rope_tables(zoo, topology, models)
    adapters = AdapterCache(zoo.read_adapter, maker.arrays, config.adapter_cache_bytes)
    specs = [[blocks[i].spec for i in span.block_ids] for span in topology.spans]
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
        )
        for family, pages in num_pages.items()
    }
    _warm_up(topology, executors)
    blocks |= embeds
    for block in blocks.values():
        block.drop_pages()
    boundaries = BoundaryCache(
        config.boundary_cache_bytes if config.prefix_caching else 0, maker.arrays.rows_like
    )
    caches = {
        family: KVCache(pages, config.prefix_caching, boundaries, config.approximate)
        for family, pages in num_pages.items()
    }
    return LoadedZoo(models, topology, executors, caches, boundaries, adapters, maker.facts())


def _pages_per_family(topology: Topology, config: EngineConfig, maker: EngineMaker) -> dict[Family, int]:
    """Split the budget between families by their number of models."""
    shares: dict[Family, int] = {}
    for chain_index in topology.chain_of_model.values():
        family = topology.chains[chain_index].family
        shares[family] = shares.get(family, 0) + 1
    budget = config.resolved_kv_bytes()
    pages = {}
    for family, share in shares.items():
        tokens_bytes = family.num_kv_heads * family.head_dim * activation_dtype(maker.precision).itemsize
        page_bytes = 2 * PAGE_TOKENS * tokens_bytes
        pages[family] = budget * share // (len(topology.chain_of_model) * page_bytes)
        layers = max(chain.num_layers for chain in topology.chains if chain.family == family)
        if pages[family] < layers:
            need = layers * page_bytes * len(topology.chain_of_model) // share
            raise InvalidRequestError(
                f"kv_cache_bytes is {budget}; one page of {PAGE_TOKENS} tokens in each of {layers} layers "
                f"needs {need}: raise it"
            )
    return pages


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
    return LoadedModel(name, index, chain, tokenizer, record.end_ids, min(bounds), plain)


def _compile_spans(
    topology: Topology, blocks: Mapping[str, Block], maker: EngineMaker, progress: Progress | None
) -> dict[int, Engine]:
    engines: dict[int, Engine] = {}
    for index, span in enumerate(topology.spans):
        engines[index] = maker.span(
            [blocks[i] for i in span.block_ids],
            drops_rows=span.drops_rows,
            lora=dict(span.lora),
            scores=span.scores,
        )
        if progress is not None:
            progress(index + 1, len(topology.spans))
    return engines


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
    """
    for family, executor in executors.items():
        for index, chain in enumerate(topology.chains):
            if chain.family != family:
                continue
            table = np.zeros((chain.num_layers, 1), np.int32)
            result = executor.run([Rows(index, np.zeros(1, np.int32), 0, table, True)])
            if not all(np.isfinite(logits).all() for logits, _ in result.logits):
                raise InvalidRequestError(
                    "a model's first logits are not finite: run zoo-inspect --check; bf16 may be too "
                    "narrow for it, try precision f32"
                )
