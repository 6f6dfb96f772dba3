"""Runs of a side under a load, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from benchmarks.cluster_sim.cluster import Cluster, Router
from benchmarks.cluster_sim.devices import Link, Machines
from benchmarks.cluster_sim.sides import (
    Side,
    make_cluster,
    make_plan,
    make_task,
    pieces_and_chains,
    token_rates,
)
from benchmarks.cluster_sim.traffic import Mix, Request, make_apps, make_requests

WARM = 0.2  # of a run, whose requests do not count


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a run.

    Attributes:
        p50_s, p95_s: of requests, from arrival to the last token; inf: not finished.
        first_p50_s, first_p95_s: to the first token.
        token_p95_s: of requests, for each token of the answer.
        tokens_per_s: generated.
        busy: share of the GPUs' time in which they run something.
        useful: arithmetic done, as a share of the peak of all GPUs all the time.
        useful_busy: the same while they run something.
        steps: of all lanes.
        weight_copies: bytes of weights held, over those of all distinct blocks.
        moved_gb: of KV.
        failed: requests that fit nowhere.
    """

    p50_s: float
    p95_s: float
    first_p50_s: float
    first_p95_s: float
    token_p95_s: float
    tokens_per_s: float
    busy: float
    useful: float
    useful_busy: float
    steps: int
    weight_copies: float
    moved_gb: float
    failed: int

    def numbers(self) -> dict[str, float]:
        """By name."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is served, and on what."""

    machines: Machines
    num_apps: int
    mix: Mix
    seconds: float = 60.0
    head_link: Link | None = None


def run(setting: Setting, side: Side, rate: float, seed: int) -> Outcome:
    """Serve `rate` requests a second. Raises PlacementError where the solver finds no plan."""
    apps = make_apps(setting.num_apps, setting.mix, seed)
    rates = token_rates(apps, setting.mix, rate)
    pieces, chains = pieces_and_chains(apps, side.shared)
    task = make_task(setting.machines, pieces, chains, rates, setting.mix, side)
    plan = make_plan(task, side, seed, setting.machines.cells())
    cluster = make_cluster(setting.machines, apps, setting.mix, rates, side, plan, setting.head_link, seed)
    requests = make_requests(apps, setting.mix, rate, setting.seconds, seed)
    copies = sum(pieces[span].num_bytes * len(homes) for span, homes in plan.homes.items())
    distinct = sum(piece.num_bytes for piece in pieces.values())
    return serve(cluster, Router(cluster, side.coordination), requests, setting.seconds, copies / distinct)


def serve(
    cluster: Cluster,
    router: Router,
    requests: Sequence[Request],
    seconds: float,
    copies: float = 1.0,
    warm_share: float = WARM,
) -> Outcome:
    """Let requests come, and look at the time between the warm-up and the last arrival."""
    clock, warm = cluster.clock, warm_share * seconds
    for request in requests:
        clock.after(request.arrival, partial(router.submit, request))
    clock.run(warm)
    before = _totals(cluster)
    clock.run(seconds)
    busy, flops = (b - a for a, b in zip(before, _totals(cluster), strict=True))
    clock.run(4 * seconds)
    counted = [request for request in requests if request.arrival >= warm]
    ends = np.array([_since(request, request.end) for request in counted])
    firsts = np.array([_since(request, request.first_token) for request in counted])
    lengths = np.array([len(request.answer) for request in counted])
    tokens = sum(len(r.answer) for r in requests if r.end is not None and warm <= r.end < seconds)
    span, device = seconds - warm, cluster.machines.device
    gpus = cluster.machines.num_gpus
    lanes = [*cluster.routes, *cluster.ended]
    return Outcome(
        *_percentiles(ends),
        *_percentiles(firsts),
        _percentiles(ends / lengths)[1],
        tokens / span,
        busy / span / gpus,
        flops / span / gpus / device.flops_per_s,
        flops / max(busy, 1e-9) / device.flops_per_s,
        sum(lane.num_steps for lane in lanes),
        copies,
        router.moved_bytes / 1e9,
        sum(lane.num_failed for lane in lanes),
    )


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    """The median and p95; of values that may be infinite."""
    ordered = np.sort(values)
    at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95)]
    return float(at[0]), float(at[1])


def _since(request: Request, time: float | None) -> float:
    return float("inf") if time is None else time - request.arrival


def _totals(cluster: Cluster) -> tuple[float, float]:
    return sum(w.busy_s for w in cluster.workers), sum(w.flops for w in cluster.workers)
