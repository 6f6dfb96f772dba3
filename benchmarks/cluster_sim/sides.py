"""Ways to serve the same applications on the same GPUs: placed by the real solver, made into lanes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.cluster_sim.cluster import Cluster, Coordination, Place, Route, Stage
from benchmarks.cluster_sim.devices import DISK_BYTES_PER_S, SHAPES, Link, Machines, Piece
from benchmarks.cluster_sim.lanes import Lane
from benchmarks.cluster_sim.traffic import App, Mix
from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.serve.config import SchedulerConfig
from blockzoo.zoo.placement import Chain, PlacementError, Plan, Span, Task, Worker, fits, judge, place
from blockzoo.zoo.placement_cells import place_in_cells

USABLE = 0.9  # of a GPU's memory; the rest is for activations and the runtime
BLOCKS = 0.8  # of it, that weights may take: the rest is for KV
LORA_RANK = 16
SCHEDULER = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=1024, max_waiting=1 << 20)
_ONE_SEARCH = 16  # GPUs that are placed in one; more are placed by server
_CONTEXT = 500.0  # tokens, for such estimates


@dataclass(frozen=True, slots=True)
class Side:
    """A way to serve.

    Attributes:
        shared: blocks are held and run once for all applications; False: each application is a model.
        placement: by the solver; by the solver without what links cost; at random.
        replicas: busy applications may have several routes.
        coordination: of KV, `cluster.Router`.
        per_block: `cluster.Cluster`.
        chance: that a guess of the next token is right; None: nothing is guessed.
    """

    shared: bool = True
    placement: Literal["solver", "blind", "random"] = "solver"
    replicas: bool = True
    coordination: Coordination = "best"
    per_block: bool = True
    chance: float | None = None


PER_MODEL = Side(shared=False)
BLOCKS_SIDE = Side()


def pieces_and_chains(
    apps: Sequence[App], shared: bool
) -> tuple[dict[str, Piece], dict[str, tuple[str, ...]]]:
    """Spans, and those of each application in order."""
    pieces: dict[str, Piece] = {}
    chains: dict[str, tuple[str, ...]] = {}
    for app in apps:
        shape = SHAPES[app.base]
        lower = shape.layers * 3 // 4
        if not shared or app.kind == "full":
            pieces[app.name] = Piece(shape, shape.layers, True)
            chains[app.name] = (app.name,)
            continue
        pieces.setdefault(f"{app.base}/trunk", Piece(shape, lower, False))
        top = f"{app.base}/top" if app.kind == "lora" else f"{app.name}/top"
        pieces.setdefault(top, Piece(shape, shape.layers - lower, True))
        chains[app.name] = (f"{app.base}/trunk", top)
    return pieces, chains


def token_rates(apps: Sequence[App], mix: Mix, rate: float) -> dict[str, float]:
    """Generated tokens a second by application, of `rate` requests a second."""
    mean = mix.answer * math.exp(mix.sigma**2 / 2)
    return {app.name: rate * app.share * mean for app in apps}


def make_task(
    machines: Machines,
    pieces: Mapping[str, Piece],
    chains: Mapping[str, tuple[str, ...]],
    rates: Mapping[str, float],
    mix: Mix,
    side: Side,
) -> Task:
    """What the solver is asked: chains are named `application#replica`."""
    spans = {name: _span(piece, machines, mix) for name, piece in pieces.items()}
    costs = {app: rates[app] * sum(pieces[name].num_bytes for name in names) for app, names in chains.items()}
    routed: dict[str, Chain] = {}
    for app, names in chains.items():
        count = (
            max(1, math.ceil(costs[app] / sum(costs.values()) * machines.num_gpus)) if side.replicas else 1
        )
        for number in range(count):
            routed[f"{app}#{number}"] = Chain(names, rates[app] / count)
    links, blind = machines.links(), side.placement == "blind" or not side.shared
    width = 2 * max(piece.shape.hidden for piece in pieces.values())
    hops = [[0.0 if blind else link.seconds(width) for link in row] for row in links]
    per_byte = [
        [1 / DISK_BYTES_PER_S if a == b else 1 / link.bytes_per_s for b, link in enumerate(row)]
        for a, row in enumerate(links)
    ]
    worker = Worker(int(machines.device.memory_bytes * USABLE * BLOCKS))
    return Task(spans, routed, [worker] * machines.num_gpus, hops, per_byte)


def _span(piece: Piece, machines: Machines, mix: Mix) -> Span:
    """A call reads weights; a generated token adds its KV, arithmetic and part of the prompts."""
    device = machines.device
    call = piece.seconds(device, 0, 0, 0.0, 0.0, 0.0)
    kv = _CONTEXT * piece.shape.kv_bytes * piece.layers / piece.shape.layers
    decode = kv / (device.bytes_per_s * device.memory_share)
    prompt = piece.flops(1, 0, _CONTEXT) / (device.flops_per_s * device.flops_share)
    return Span(piece.num_bytes, decode + prompt * (1 + mix.prompt / mix.answer), call)


def make_plan(task: Task, side: Side, seed: int, cells: Sequence[Sequence[int]] = ()) -> Plan:
    """Where spans are and chains go; of many workers in each of the cells. Raises PlacementError."""
    if len(task.workers) > _ONE_SEARCH:
        return place_in_cells(task, cells)
    if side.placement != "random":
        return place(task)
    rng = np.random.default_rng([seed, 4])
    for _ in range(200):  # until it fits
        homes: dict[str, int] = {}
        routes = {}
        for name, chain in task.chains.items():
            replica = name.partition("#")[2]
            routes[name] = tuple(
                homes.setdefault(f"{span}#{replica}", int(rng.integers(len(task.workers))))
                for span in chain.spans
            )
        plan = judge(task, routes)
        if fits(task, plan.homes):
            return plan
    raise PlacementError("no random placement fits")


def make_cluster(
    machines: Machines,
    apps: Sequence[App],
    mix: Mix,
    rates: Mapping[str, float],
    side: Side,
    plan: Plan,
    head_link: Link | None = None,
    seed: int = 0,
) -> Cluster:
    """Lanes for a plan: one for each worker at which applications with a common first span begin, two where
    their steps go on elsewhere, so that workers need not wait."""
    pieces, _ = pieces_and_chains(apps, side.shared)
    adapters = {app.name: _adapter_bytes(app) for app in apps if side.shared and app.kind == "lora"}
    head = 0 if side.shared and machines.num_gpus <= _ONE_SEARCH else None
    cluster = Cluster(machines, pieces, adapters, head, head_link, side.per_block)
    install(cluster, apps, rates, side, plan, seed)
    return cluster


def install(
    cluster: Cluster, apps: Sequence[App], rates: Mapping[str, float], side: Side, plan: Plan, seed: int = 0
) -> None:
    """Go over to a plan: lanes whose applications keep their routes stay, others are new; what ran in those
    that end goes on there until it is done."""
    pieces, machines = cluster.pieces, cluster.machines
    _, chains = pieces_and_chains(apps, side.shared)
    groups = _groups(plan, chains)
    lanes = [group for group in groups for _ in range(1 if len(_workers(group)) == 1 else 2)]
    tokens = _lane_tokens(machines, pieces, plan, lanes, rates)
    bases = {app.name: app.base for app in apps}
    before, cluster.routes = cluster.routes, {}
    old_places = {app: list(places) for app, places in cluster.places.items()}
    cluster.places.clear()
    for number, group in enumerate(lanes):
        lane = next(
            (lane for lane, held in before.items() if held == group and lane not in cluster.routes), None
        )
        if lane is None:
            chances = None if side.chance is None else dict.fromkeys(group, side.chance)
            pages = tokens[number] // PAGE_TOKENS
            lane = Lane(
                cluster.clock, cluster.run_step, pages, SCHEDULER, chances=chances, seed=seed + number
            )
        cluster.routes[lane] = group
        for app, route in group.items():
            found = next((p for p in old_places.get(app, ()) if p.lane is lane), None)
            cluster.places[app].append(found or _place(lane, route, pieces, bases[app], machines))
    cluster.ended |= {lane: held for lane, held in before.items() if lane not in cluster.routes}


def _groups(plan: Plan, chains: Mapping[str, tuple[str, ...]]) -> list[dict[str, Route]]:
    groups: dict[tuple[Stage, int], dict[str, Route]] = {}
    for name, workers in sorted(plan.routes.items()):
        app = name.partition("#")[0]
        route = tuple(Stage(*stage) for stage in zip(chains[app], workers, strict=True))
        number = 0
        while groups.setdefault((route[0], number), {}).get(app, route) != route:
            number += 1
        groups[route[0], number][app] = route
    return list(groups.values())


def _workers(group: Mapping[str, Route]) -> set[int]:
    return {stage.worker for route in group.values() for stage in route}


def _lane_tokens(
    machines: Machines,
    pieces: Mapping[str, Piece],
    plan: Plan,
    lanes: Sequence[Mapping[str, Route]],
    rates: Mapping[str, float],
) -> list[int]:
    """Tokens of KV that each lane has: each worker divides what weights leave by what is asked of lanes."""
    room = [machines.device.memory_bytes * USABLE] * machines.num_gpus
    for span, places in plan.homes.items():
        for worker in places:
            room[worker] -= pieces[span].num_bytes
    wanted: list[dict[int, tuple[float, float]]] = []  # by lane and worker: KV bytes of a token, and a second
    routes_of: dict[str, int] = defaultdict(int)
    for group in lanes:
        for app in group:
            routes_of[app] += 1
    for group in lanes:
        here: dict[int, tuple[float, float]] = {}
        for app, route in group.items():
            by_worker: dict[int, float] = defaultdict(float)
            for span, worker in route:
                shape = pieces[span].shape
                by_worker[worker] += shape.kv_bytes * pieces[span].layers / shape.layers
            for worker, size in by_worker.items():
                most, flow = here.get(worker, (0.0, 0.0))
                here[worker] = max(most, size), flow + size * rates[app] / routes_of[app]
        wanted.append(here)
    totals: dict[int, float] = defaultdict(float)
    for here in wanted:
        for worker, (_, flow) in here.items():
            totals[worker] += flow
    counts = {worker: sum(worker in here for here in wanted) for worker in totals}
    found = []
    for here in wanted:
        shares = {  # a fifth is divided evenly
            worker: 0.8 * flow / totals[worker] + 0.2 / counts[worker] for worker, (_, flow) in here.items()
        }
        found.append(int(min(room[w] * shares[w] / size for w, (size, _) in here.items())))
    return found


def _place(lane: Lane, route: Route, pieces: Mapping[str, Piece], base: str, machines: Machines) -> Place:
    device, chain = machines.device, [pieces[stage.span] for stage in route]
    prefill = sum(p.flops(1, 0, _CONTEXT) for p in chain) / (device.flops_per_s * device.flops_share)
    decode = sum(p.seconds(device, 8, 8, 8 * _CONTEXT, 8 * _CONTEXT, 0) for p in chain) / 8
    return Place(lane, route[0].worker, SHAPES[base].kv_bytes, prefill, decode)


def _adapter_bytes(app: App) -> int:
    """Of a LoRA on all projections, in bf16."""
    shape = SHAPES[app.base]
    widths = 4 * shape.hidden + 2 * (shape.hidden + shape.kv_width) + 3 * (shape.hidden + shape.ffn)
    return 2 * LORA_RANK * shape.layers * widths
