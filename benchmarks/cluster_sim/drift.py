"""Request rates that change at once: plans that stay, and plans that follow rates as they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.cluster_sim.cluster import Cluster, Router
from benchmarks.cluster_sim.runs import Outcome, Setting, serve
from benchmarks.cluster_sim.sides import (
    BLOCKS_SIDE,
    install,
    make_cluster,
    make_plan,
    make_task,
    pieces_and_chains,
    token_rates,
)
from benchmarks.cluster_sim.traffic import App, Request, make_apps, make_requests
from blockzoo.zoo.placement import Plan, Task, adapt, moves
from blockzoo.zoo.rates import Rates

PERIOD_S, HALF_LIFE_S, HORIZON_S = 10.0, 20.0, 60.0
LEAST_GAIN = 0.1
SETTLED = 0.5  # of a run, when rates change


class Follower:
    """Measures rates, and now and then has the plan adapted to them.

    Args:
        cluster, apps: whose.
        make: the task of rates.
        plan: to begin with.
        horizon_s: of `Task`.
        until: when it ends.
    """

    def __init__(
        self,
        cluster: Cluster,
        apps: Sequence[App],
        make: Callable[[Mapping[str, float]], Task],
        plan: Plan,
        horizon_s: float,
        until: float,
    ) -> None:
        self.moved_bytes = 0  # of weights
        self.changes = 0  # of the plan
        self.cluster, self.apps, self.plan = cluster, apps, plan
        self._make, self._horizon_s, self._until = make, horizon_s, until
        self._rates = Rates(HALF_LIFE_S, cluster.clock.now)
        for lane in cluster.routes:
            lane.on_finished = self.note
        cluster.clock.after(PERIOD_S, self._look)

    def note(self, request: Request) -> None:
        """A request was answered."""
        self._rates.note(request.app, len(request.answer), self.cluster.clock.now)

    def _look(self) -> None:
        clock = self.cluster.clock
        seen = self._rates.per_second(clock.now)
        rates = {app.name: max(seen.get(app.name, 0.0), 1e-3) for app in self.apps}
        task = replace(self._make(rates), held=self.plan.homes, horizon_s=self._horizon_s)
        plan = adapt(task, self.plan.routes, LEAST_GAIN)
        if plan.routes != self.plan.routes:
            moved = moves(task, plan)
            self.changes += 1
            self.moved_bytes += sum(move.num_bytes for move in moved)
            self.plan = plan
            by_worker: dict[int, float] = {}
            for move in moved:
                by_worker[move.worker] = by_worker.get(move.worker, 0.0) + move.seconds
            clock.after(max(by_worker.values(), default=0.0), partial(self._go_over, rates, plan))
        if clock.now + PERIOD_S < self._until:
            clock.after(PERIOD_S, self._look)

    def _go_over(self, rates: Mapping[str, float], plan: Plan) -> None:
        install(self.cluster, self.apps, rates, BLOCKS_SIDE, plan)
        for lane in self.cluster.routes:
            lane.on_finished = self.note


def changing(
    setting: Setting, rate: float, seed: int, horizon_s: float | None, known: bool = False
) -> tuple[Outcome, float]:
    """Applications exchange their popularity in the middle of a run.

    Args:
        setting, rate, seed: as of `runs.run`.
        horizon_s: the plan follows measured rates, for which this is what moving must pay within; None: it
            stays.
        known: it is made for the later rates to begin with.

    Returns:
        (what came of requests behind the change, bytes of weights moved)
    """
    apps = make_apps(setting.num_apps, setting.mix, seed)
    shares = np.random.default_rng([seed, 6]).permutation([app.share for app in apps])
    later = [replace(app, share=float(share)) for app, share in zip(apps, shares, strict=True)]
    change = SETTLED * setting.seconds
    first = make_requests(apps, setting.mix, rate, change, seed)
    second = make_requests(later, setting.mix, rate, setting.seconds - change, seed + 1000)
    for number, request in enumerate(second):
        request.arrival += change
        request.session += 10**6
        request.number = len(first) + number
    pieces, chains = pieces_and_chains(apps, True)

    def make(rates: Mapping[str, float]) -> Task:
        return make_task(setting.machines, pieces, chains, rates, setting.mix, BLOCKS_SIDE)

    rates = token_rates(later if known else apps, setting.mix, rate)
    plan = make_plan(make(rates), BLOCKS_SIDE, seed)
    cluster = make_cluster(setting.machines, apps, setting.mix, rates, BLOCKS_SIDE, plan, seed=seed)
    follower = None
    if horizon_s is not None:
        follower = Follower(cluster, apps, make, plan, horizon_s, setting.seconds)
    outcome = serve(cluster, Router(cluster), [*first, *second], setting.seconds, warm_share=SETTLED)
    return outcome, 0.0 if follower is None else follower.moved_bytes / 1e9
