"""Spans placed over workers, and executors over them, in the place of engines in this process."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from blockzoo.engines import kv_pages
from blockzoo.engines.base import EngineMaker, activation_dtype
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.exec.rows import RowChecks
from blockzoo.runtime.exec.topology import Family, Topology
from blockzoo.runtime.serve.adopted_workers import adopt
from blockzoo.runtime.serve.config import MAX_PROMPT_LOGITS, EngineConfig
from blockzoo.runtime.serve.memory import engine_bytes
from blockzoo.runtime.serve.span_groups import leaders
from blockzoo.runtime.workers.distributed import DistributedExecutor
from blockzoo.runtime.workers.group import WorkerGroup
from blockzoo.runtime.workers.meeting import Links, MachineFacts
from blockzoo.runtime.workers.processes import LocalProcesses, Processes, WorkerStartError
from blockzoo.runtime.workers.settings import NOWHERE, EngineKind, WorkerPlan
from blockzoo.runtime.workers.sockets import LOOPBACK
from blockzoo.zoo.blocks import Block, HeadSpec
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.placement import Chain, PlacementError, Span, Task, Worker, judge, place
from blockzoo.zoo.rates import Rates

_BUSY = 0.5  # share of the time for which workers are taken to be busy
_HEAD_SHARE = 0.5  # of tokens that need logits: as many are generated as are read
_STARTS = 3  # that are tried in the place of a worker that is lost
_BYTE_S = 1e-9  # of weights, that a token takes where blocks were not timed
_LOAD_BYTE_S = 2e-9  # of weights, until a worker has them: read and compiled
_HALF_LIFE_S = 60.0  # of rates
_MOST_LOAD = 0.8  # that workers are taken to have: what serves such rates is not overloaded by them
_LEAST_RATE = 1e-3  # of a model that nobody asks


@dataclass(frozen=True, slots=True)
class Workers:
    """What runs the steps of a zoo.

    Attributes:
        task: by which spans were placed, those that stay together as one; all models asked as often.
        leaders: by span that is no copy, its name in the task (`span_groups`).
        rates: tokens a second by model.
        page_bytes: of each family.
        link_byte_s: [from][to] seconds of a byte of K and V between workers, as last measured.
    """

    group: WorkerGroup
    executors: Mapping[Family, DistributedExecutor]
    task: Task
    leaders: tuple[int, ...]
    rates: Rates
    page_bytes: Mapping[Family, int]
    link_byte_s: list[list[float]]

    @property
    def routes(self) -> dict[str, tuple[int, ...]]:
        """By model, the worker of each of its spans, as `adapt` takes them."""
        plan, found = self.group.plan, {}
        originals = plan.topology.originals
        for name in self.task.chains:
            uses = plan.topology.chains[plan.topology.chain_of_model[name]].uses
            runs = groupby(uses, key=lambda use: self.leaders[originals[use.span]])
            found[name] = tuple(plan.homes[next(run).span] for _, run in runs)
        return found

    def task_now(self, rates: Mapping[str, float]) -> Task:
        """The task at other rates, given where spans are."""
        plan = self.group.plan
        held: dict[str, set[int]] = defaultdict(set)
        for span, home in zip(plan.topology.originals, plan.homes, strict=True):
            if home != NOWHERE:
                held[str(self.leaders[span])].add(home)
        homes = {span: frozenset(workers) for span, workers in held.items()}
        task = replace(_asked(self.task, rates), held=homes)
        busiest = max(judge(task, self.routes).loads)
        return _busier(task, min(1.0, _MOST_LOAD / busiest))

    def go_over(self, homes: Sequence[int], topology: Topology) -> None:
        """Between two steps: to other copies of spans, and by span its worker."""
        self.group.go_over(homes, topology)
        for executor in self.executors.values():
            executor.follow(topology.chains)

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
    processes: Processes | None = None,
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
        processes: that start theirs, of workers whose place they take; None: as the configuration says.
        rates: as they were measured of other workers; None: models are taken to be asked alike.

    Raises:
        InvalidRequestError: the spans do not fit in their memory.
        WorkerStartError, UnloadableError.
    """
    count, kind = config.workers or 1, _engine_kind(zoo, maker, config)
    adopted: tuple[int, ...] | None = None
    if processes is None:
        processes = _processes(config)
        if isinstance(processes, LocalProcesses):
            adopted = adopt(processes, topology, kind, count)
    group = WorkerGroup(
        processes,
        tuple(ms / 1e3 for ms in config.worker_delays_ms or [0.0] * count),
        config.worker_interface or LOOPBACK,
    )
    try:
        facts = group.facts
        if adopted is not None:  # what they have is there for them
            theirs = (blocks[block_id] for span in topology.spans for block_id in span.block_ids)
            held = engine_bytes(theirs, activation_dtype(maker.precision).itemsize)
            facts = [replace(each, memory=each.memory + held) for each in facts]
        task = placement_task(manifest, topology, blocks, maker, config, kv_bytes, facts, group.links)
        homes = _homes(task, topology, config, kv_bytes, rates) if adopted is None else adopted
    except BaseException:
        group.close()
        raise
    chains = (*topology.chain_of_model.items(), *topology.surrogate_of_model.items())
    models = {index: manifest.models[name] for name, index in chains}
    plan = WorkerPlan(
        manifest,
        topology,
        homes,
        dict(num_pages),
        {index: (model.config.rope, len(rope_tables[index][0])) for index, model in models.items()},
        kind,
        config.max_num_batched_tokens,
        config.max_num_seqs,
        MAX_PROMPT_LOGITS,
        config.adapter_cache_bytes,
    )
    group.serve(plan)
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
            cuts=min(worker.speed for worker in task.workers) >= 1,
        )
        for family, pages in num_pages.items()
    }
    if rates is None:
        rates = Rates(_HALF_LIFE_S, time.monotonic())
    page_bytes = {
        family: kv_pages.page_bytes(family.num_kv_heads, family.head_dim, maker.kv_precision)
        for family in num_pages
    }
    links = [list(row) for row in group.links.byte_s]
    return Workers(group, executors, task, leaders(topology), rates, page_bytes, links)


def _engine_kind(zoo: Path, maker: EngineMaker, config: EngineConfig) -> EngineKind:
    """Of the engines in workers."""
    return EngineKind(
        zoo.resolve(),
        maker.precision,
        bool(getattr(maker, "int8_activations", False)),
        maker.kv_precision,
        num_threads(config),
    )


def _processes(config: EngineConfig) -> Processes:
    """Where workers are started. Raises WorkerStartError: on a Ray that cannot be used."""
    if config.ray_address is None:
        return LocalProcesses(None if config.worker_folder is None else Path(config.worker_folder))
    from blockzoo.runtime.workers.on_ray import RayProcesses  # it is imported where it is asked for alone

    count, threads = config.workers or 1, num_threads(config)
    return RayProcesses(config.ray_address, count, threads, config.worker_memory_bytes)


def num_threads(config: EngineConfig) -> int:
    """Of each worker: by default of all cores, which those of one machine then have in turn."""
    return config.num_threads or len(os.sched_getaffinity(0))


def _homes(
    task: Task, topology: Topology, config: EngineConfig, kv_bytes: int, rates: Rates | None
) -> tuple[int, ...]:
    """By span index, its worker."""
    if rates is not None:
        task = _asked(task, rates.per_second(time.monotonic()))
        busy = sum(c.rate * sum(task.spans[span].seconds for span in c.spans) for c in task.chains.values())
        task = _busier(task, _BUSY * sum(worker.speed for worker in task.workers) / busy)
    try:
        plan = place(replace(task, copies=False))  # they come as rates tell what for
    except PlacementError as error:
        raise InvalidRequestError(
            f"the zoo does not fit in {config.workers} workers, which have room for "
            f"{[worker.num_bytes for worker in task.workers]} bytes of weights beside the KV pool of "
            f"{kv_bytes}: {error}, give them more memory, or lower kv_cache_bytes"
        ) from error
    return tuple(min(plan.homes[str(leader)]) for leader in leaders(topology))


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
    facts: Sequence[MachineFacts],
    links: Links,
) -> Task:
    """What is to be placed, over workers as they were found: all models are taken to be asked as often."""
    itemsize = activation_dtype(maker.precision).itemsize
    first = leaders(topology)
    spans: dict[str, Span] = {}
    for index, span in enumerate(topology.spans):
        size = engine_bytes((blocks[i] for i in span.block_ids), itemsize)
        seconds = _seconds([blocks[i] for i in span.block_ids], manifest, itemsize)
        known = spans.get(str(first[index]), Span(0, 0.0))
        spans[str(first[index])] = Span(known.num_bytes + size, max(known.seconds, seconds))
    ways = {
        name: tuple(str(span) for span, _ in groupby(first[use.span] for use in topology.chains[index].uses))
        for name, index in topology.chain_of_model.items()
    }
    workers = _workers(config, kv_bytes, facts)
    work = sum(spans[span].seconds for way in ways.values() for span in way)
    rate = _BUSY * sum(worker.speed for worker in workers) / work
    width = itemsize * max(chain.family.hidden_size for chain in topology.chains)
    return Task(
        spans,
        {name: Chain(way, rate) for name, way in ways.items()},
        workers,
        hop_s=[
            [_told(hop + width * byte) for hop, byte in zip(*rows, strict=True)]
            for rows in zip(links.hop_s, links.byte_s, strict=True)
        ],
        byte_s=[[_LOAD_BYTE_S] * len(workers) for _ in workers],
        head=min(range(len(workers)), key=lambda index: _told(links.head_s[index])),
        copies=min(worker.speed for worker in workers) >= 1,  # of two that have cores in turn, one waits
    )


def _told(seconds: float) -> float:
    """As far as a machine with other work can tell: equal links are to be equal."""
    return round(seconds, 4)


def _workers(config: EngineConfig, kv_bytes: int, facts: Sequence[MachineFacts]) -> list[Worker]:
    """Workers of one machine share its memory and cores; its pools together take what one would."""
    beside = Counter(each.machine for each in facts)
    found = []
    for each in facts:
        if config.worker_memory_bytes is not None:
            room = config.worker_memory_bytes - kv_bytes
        else:
            room = (each.memory - kv_bytes) // beside[each.machine]
        cores = min(each.cores, config.worker_cores or each.cores) / beside[each.machine]
        found.append(Worker(room, min(1.0, cores / num_threads(config))))
    return found


def _seconds(blocks: Sequence[Block], manifest: Manifest, itemsize: int) -> float:
    """That a token takes through blocks: by their times, or by their bytes where some have none."""
    times = [manifest.blocks[block.id].latency_us for block in blocks]
    shares = [_HEAD_SHARE if isinstance(block.spec, HeadSpec) else 1.0 for block in blocks]
    if all(times):
        known = [each[max(each)] * 1e-6 / max(each) for each in times if each]
    else:
        known = [engine_bytes((block,), itemsize) * _BYTE_S for block in blocks]
    return sum(share * seconds for share, seconds in zip(shares, known, strict=True))
