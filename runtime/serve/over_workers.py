"""Spans placed over workers, and executors over them, in the place of engines in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from blockzoo.engines import kv_pages
from blockzoo.engines.base import EngineMaker, activation_dtype
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.exec.rows import RowChecks
from blockzoo.runtime.exec.topology import Family, Topology
from blockzoo.runtime.serve.config import MAX_PROMPT_LOGITS, EngineConfig
from blockzoo.runtime.serve.memory import available_memory, engine_bytes
from blockzoo.runtime.workers.distributed import DistributedExecutor
from blockzoo.runtime.workers.group import WorkerGroup, WorkerStartError
from blockzoo.runtime.workers.settings import WorkerPlan
from blockzoo.zoo.blocks import Block, HeadSpec
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.placement import Chain, PlacementError, Span, Task, Worker, judge, place
from blockzoo.zoo.rates import Rates

_BUSY = 0.5  # share of the time for which workers are taken to be busy
_HOP_S = 1e-4  # that rows take from worker to worker: measured with ZeroMQ on one machine
_HEAD_SHARE = 0.5  # of tokens that need logits: as many are generated as are read
_STARTS = 3  # that are tried in the place of a worker that is lost
_BYTE_S = 1e-9  # of weights, that a token takes where blocks were not timed
_LOAD_BYTE_S = 2e-9  # of weights, until a worker has them: read and compiled
_LINK_BYTE_S = 1.1e-9  # of K and V between workers, until it is measured: ZeroMQ, encrypted, on one machine
_HALF_LIFE_S = 60.0  # of rates
_MOST_LOAD = 0.8  # that workers are taken to have: what serves such rates is not overloaded by them
_LEAST_RATE = 1e-3  # of a model that nobody asks


@dataclass(frozen=True, slots=True)
class Workers:
    """What runs the steps of a zoo.

    Attributes:
        task: by which spans were placed, all models asked as often.
        rates: tokens a second by model.
        page_bytes: of each family.
        link_byte_s: [from][to] seconds of a byte of K and V between workers, as last measured.
    """

    group: WorkerGroup
    executors: Mapping[Family, DistributedExecutor]
    task: Task
    rates: Rates
    page_bytes: Mapping[Family, int]
    link_byte_s: list[list[float]]

    @property
    def routes(self) -> dict[str, tuple[int, ...]]:
        """By model, the worker of each of its spans, as `adapt` takes them."""
        homes = self.group.plan.homes
        return {name: tuple(homes[int(s)] for s in c.spans) for name, c in self.task.chains.items()}

    def task_now(self, rates: Mapping[str, float]) -> Task:
        """The task at other rates, given where spans are."""
        held = {str(span): frozenset({home}) for span, home in enumerate(self.group.plan.homes)}
        task = replace(_asked(self.task, rates), held=held)
        busiest = max(judge(task, self.routes).loads)
        return _busier(task, min(1.0, _MOST_LOAD / busiest))

    def recover(self) -> list[int]:
        """Start again what is lost, over pages that hold nothing; which they were.

        Raises WorkerStartError, UnloadableError: they cannot be.
        """
        started = self._restart()
        for executor in self.executors.values():
            executor.forget_pages()
        return started

    def _restart(self) -> list[int]:
        for _ in range(_STARTS - 1):
            with suppress(WorkerStartError):  # it may have been killed, as the one before
                return self.group.restart()
        return self.group.restart()


def start_workers(
    zoo: Path,
    manifest: Manifest,
    topology: Topology,
    blocks: Mapping[str, Block],
    num_pages: Mapping[Family, int],
    rope_tables: Mapping[int, tuple],
    vocab_sizes: Mapping[str, int],
    maker: EngineMaker,
    config: EngineConfig,
    kv_bytes: int,
    rates: Rates | None = None,
) -> Workers:
    """Start the workers of a configuration that has some.

    Args:
        zoo: its folder.
        manifest, topology, blocks: of what is served.
        num_pages: of each family's pool.
        rope_tables: by chain index.
        vocab_sizes: by embed block id.
        maker: of engines like theirs.
        kv_bytes: of all pools.
        rates: as they were measured of other workers; None: models are taken to be asked alike.

    Raises:
        InvalidRequestError: the spans do not fit in their memory.
        WorkerStartError, UnloadableError.
    """
    count = config.workers or 1
    task = placement_task(manifest, topology, blocks, maker, config, kv_bytes)
    homes = _homes(task, topology, config, kv_bytes, rates)
    models = {index: manifest.models[name] for name, index in topology.chain_of_model.items()}
    plan = WorkerPlan(
        zoo.resolve(),
        manifest,
        topology,
        homes,
        dict(num_pages),
        {index: (model.config.rope, len(rope_tables[index][0])) for index, model in models.items()},
        maker.precision,
        bool(getattr(maker, "int8_activations", False)),
        "u8" if maker.kv_precision == "u8" else None,
        config.num_threads or max(1, len(os.sched_getaffinity(0)) // count),
        config.max_num_batched_tokens,
        config.max_num_seqs,
        MAX_PROMPT_LOGITS,
        config.adapter_cache_bytes,
    )
    group = WorkerGroup(plan, count)
    max_logits = plan.max_seqs + plan.max_more_logits
    executors = {
        family: DistributedExecutor(
            family,
            topology.chains,
            group,
            RowChecks(
                topology.chains,
                vocab_sizes,
                rope_tables,
                pages,
                family.hidden_size,
                plan.max_tokens,
                max_logits,
            ),
            maker.arrays,
            cuts=plan.num_threads * count <= len(os.sched_getaffinity(0)),
        )
        for family, pages in num_pages.items()
    }
    if rates is None:
        rates = Rates(_HALF_LIFE_S, time.monotonic())
    page_bytes = {
        family: kv_pages.page_bytes(family.num_kv_heads, family.head_dim, maker.kv_precision)
        for family in num_pages
    }
    links = [[_LINK_BYTE_S] * count for _ in range(count)]
    return Workers(group, executors, task, rates, page_bytes, links)


def _homes(
    task: Task, topology: Topology, config: EngineConfig, kv_bytes: int, rates: Rates | None
) -> tuple[int, ...]:
    """By span index, its worker. Each span has one, as the pages of its layers have."""
    if rates is not None:
        task = _asked(task, rates.per_second(time.monotonic()))
        busy = sum(c.rate * sum(task.spans[span].seconds for span in c.spans) for c in task.chains.values())
        task = _busier(task, _BUSY * len(task.workers) / busy)
    try:
        plan = place(task)
    except PlacementError as error:
        raise InvalidRequestError(
            f"the zoo does not fit in {config.workers} workers of {_memory(config)} bytes, of which the KV "
            f"pool may take {kv_bytes} in each: {error}, give them more memory, or lower kv_cache_bytes"
        ) from error
    return tuple(min(plan.homes[str(index)]) for index in range(len(topology.spans)))


def _asked(task: Task, rates: Mapping[str, float]) -> Task:
    """A task at other rates, in tokens a second by model."""
    chains = {n: replace(c, rate=max(rates.get(n, 0.0), _LEAST_RATE)) for n, c in task.chains.items()}
    return replace(task, chains=chains)


def _busier(task: Task, share: float) -> Task:
    """A task at so many times its rates: blocks were timed elsewhere, so loads are known but for a factor."""
    return replace(task, chains={n: replace(c, rate=share * c.rate) for n, c in task.chains.items()})


def placement_task(
    manifest: Manifest,
    topology: Topology,
    blocks: Mapping[str, Block],
    maker: EngineMaker,
    config: EngineConfig,
    kv_bytes: int,
) -> Task:
    """What is to be placed: all models are taken to be asked as often, and workers to be as fast."""
    count, itemsize = config.workers or 1, activation_dtype(maker.precision).itemsize
    spans = {}
    for index, span in enumerate(topology.spans):
        size = engine_bytes((blocks[i] for i in span.block_ids), itemsize)
        spans[str(index)] = Span(size, _seconds([blocks[i] for i in span.block_ids], manifest, itemsize))
    ways = {
        name: tuple(str(use.span) for use in topology.chains[index].uses)
        for name, index in topology.chain_of_model.items()
    }
    rate = _BUSY * count / sum(spans[span].seconds for way in ways.values() for span in way)
    workers = range(count)
    return Task(
        spans,
        {name: Chain(way, rate) for name, way in ways.items()},
        [Worker(_memory(config) - kv_bytes)] * count,
        hop_s=[[0.0 if a == b else _HOP_S for b in workers] for a in workers],
        byte_s=[[_LOAD_BYTE_S] * count for _ in workers],
        copies=False,
    )


def _seconds(blocks: Sequence[Block], manifest: Manifest, itemsize: int) -> float:
    """That a token takes through blocks: by their times, or by their bytes where some have none."""
    times = [manifest.blocks[block.id].latency_us for block in blocks]
    shares = [_HEAD_SHARE if isinstance(block.spec, HeadSpec) else 1.0 for block in blocks]
    if all(times):
        known = [each[max(each)] * 1e-6 / max(each) for each in times if each]
    else:
        known = [engine_bytes((block,), itemsize) * _BYTE_S for block in blocks]
    return sum(share * seconds for share, seconds in zip(shares, known, strict=True))


def _memory(config: EngineConfig) -> int:
    """Bytes of a worker."""
    return available_memory() if config.worker_memory_bytes is None else config.worker_memory_bytes
