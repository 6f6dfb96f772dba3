"""Which worker holds which spans of a zoo, and which of them each chain goes through.

A plan is judged by one figure, the tokens that are under way on average: by Little's law the rate of each
chain times the time that a token takes through it, on wires and in workers. A worker that is busy for a share
`u` of the time holds `u / (1 - u)` tokens (M/M/1), so loads even out by themselves, and a hot span gets a
copy where the queue before it costs more than the wire to another worker. (After BlockLLM, arXiv 2404.18322,
whose placement follows the traffic between blocks, too; the solver is ours.)

Chains are placed one after the other, the busiest first, each by the shortest path through the workers given
those before; then each is placed anew given all others, and spans are moved, until nothing gets better. What
a plan needs anew on a worker counts, too, as time on the wire spread over a horizon.

Ints and floats only: it knows of no manifest, engine or process.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

Homes = Mapping[str, frozenset[int]]
"""By span, the workers that hold it."""


class PlacementError(ValueError):
    """There is no plan: memory is short, or the rates are more than the workers can do."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive blocks that the same chains use.

    Attributes:
        num_bytes: that a worker needs to hold it.
        seconds: that a token takes, on a worker of speed 1.
    """

    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Chain:
    """A model: its spans in order, and the tokens a second that it gets."""

    spans: tuple[str, ...]
    rate: float


@dataclass(frozen=True, slots=True)
class Worker:
    """A machine, or a device of one."""

    num_bytes: int
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be placed, and where.

    Attributes:
        hop_s: [worker][worker] seconds that a token's hidden states take between two workers; 0 within one.
        byte_s: [worker][worker] seconds of a byte of weights; from the worker itself: from its disk.
        head: the worker from which tokens come and to which they go back.
        held: what workers hold already.
        horizon_s: seconds for which a plan is made: what must be moved for it is spread over them.
        copies: whether more than one worker may hold a span.
    """

    spans: Mapping[str, Span]
    chains: Mapping[str, Chain]
    workers: Sequence[Worker]
    hop_s: Sequence[Sequence[float]]
    byte_s: Sequence[Sequence[float]]
    head: int = 0
    held: Homes = field(default_factory=dict)
    horizon_s: float = math.inf
    copies: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """An answer.

    Attributes:
        routes: by chain, the worker of each of its spans.
        homes: what each worker holds for that.
        loads: by worker, the share of time that it is busy.
        wire: tokens under way between workers.
        moving: share of the horizon for which weights are on the wire.
    """

    routes: Mapping[str, tuple[int, ...]]
    homes: Homes
    loads: tuple[float, ...]
    wire: float
    moving: float

    @property
    def cost(self) -> float:
        """Tokens under way, and what moving counts for; infinite where a worker cannot keep up."""
        if max(self.loads, default=0.0) >= 1:
            return math.inf
        return sum(load / (1 - load) for load in self.loads) + self.wire + self.moving


def place(task: Task) -> Plan:
    """A good plan. Raises PlacementError where none is found."""
    search = _Search(task)
    by_rate = sorted(task.chains, key=lambda name: -task.chains[name].rate)
    by_size = sorted(task.chains, key=lambda name: -_num_bytes(task, name))
    starts = (search.one_by_one(by_rate), search.one_by_one(by_size), search.packed())
    allowed = [start for start in starts if start is not None and fits(task, start.homes)]
    plans = [plan for start in allowed if (plan := search.improve(start)) is not None]
    if not plans:
        needed = sum(span.num_bytes for span in task.spans.values())
        room = sum(worker.num_bytes for worker in task.workers)
        busy = sum(c.rate * sum(task.spans[s].seconds for s in c.spans) for c in task.chains.values())
        raise PlacementError(
            f"no plan: spans have {needed} bytes, workers room for {room}; the rates keep {busy:.2f} workers "
            f"of speed 1 busy, and there are {sum(worker.speed for worker in task.workers):g}: add workers"
        )
    return min(plans, key=lambda plan: plan.cost)


def judge(task: Task, routes: Mapping[str, tuple[int, ...]]) -> Plan:
    """The plan that follows from routes; it may want more memory than there is (`fits`)."""
    homes: dict[str, set[int]] = defaultdict(set)
    loads = [0.0] * len(task.workers)
    wire = 0.0
    for name, route in routes.items():
        chain = task.chains[name]
        for span, worker in zip(chain.spans, route, strict=True):
            homes[span].add(worker)
            loads[worker] += chain.rate * task.spans[span].seconds / task.workers[worker].speed
        hops = pairwise((task.head, *route, task.head))
        wire += chain.rate * sum(task.hop_s[a][b] for a, b in hops)
    moving = sum(_fetch_s(task, span, worker) for span, places in homes.items() for worker in places)
    frozen = {span: frozenset(places) for span, places in homes.items()}
    return Plan(dict(routes), frozen, tuple(loads), wire, moving / task.horizon_s)


def fits(task: Task, homes: Homes) -> bool:
    """Whether all workers have room for what they are to hold, and no span is on more than it may be."""
    single = task.copies or all(len(places) == 1 for places in homes.values())
    return single and all(room >= 0 for room in _room(task, homes))


class _Search:
    """Local search over the routes of a task."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def one_by_one(self, order: Sequence[str]) -> Plan | None:
        """Chains placed in an order, each given those before; None where memory ends."""
        routes: dict[str, tuple[int, ...]] = {}
        for name in order:
            route = self._shortest(name, routes)
            if route is None:
                return None
            routes[name] = route
        return judge(self._task, routes)

    def packed(self) -> Plan | None:
        """Each span once, the largest first, where most room is; None where that ends."""
        room = [worker.num_bytes for worker in self._task.workers]
        home: dict[str, int] = {}
        for span in sorted(self._task.spans, key=lambda span: -self._task.spans[span].num_bytes):
            worker = max(range(len(room)), key=room.__getitem__)
            room[worker] -= self._task.spans[span].num_bytes
            if room[worker] < 0:
                return None
            home[span] = worker
        chains = self._task.chains.items()
        return judge(self._task, {name: tuple(home[span] for span in chain.spans) for name, chain in chains})

    def improve(self, plan: Plan) -> Plan | None:
        """Change by change until none helps; None where some worker still cannot keep up."""
        while (better := self._improved(plan)) is not None:
            plan = better
        return plan if plan.cost < math.inf else None

    def _improved(self, plan: Plan) -> Plan | None:
        best, limit = None, plan.cost
        for routes in self._neighbours(plan):
            found = judge(self._task, routes)
            lighter = best is None and limit == math.inf and max(found.loads) < max(plan.loads)
            if (found.cost < limit * (1 - 1e-9) or lighter) and fits(self._task, found.homes):
                best, limit = found, found.cost
        return best

    def _neighbours(self, plan: Plan) -> Iterable[dict[str, tuple[int, ...]]]:
        """Routes with one chain placed anew; with a span of one chain elsewhere, or with that of all."""
        routes = dict(plan.routes)
        for name in routes:
            rest = {other: route for other, route in routes.items() if other != name}
            route = self._shortest(name, rest)
            if route is not None:
                yield {**rest, name: route}
        for name, route in routes.items():
            for place in range(len(route)):
                for worker in range(len(self._task.workers)):
                    if worker != route[place]:
                        yield {**routes, name: (*route[:place], worker, *route[place + 1 :])}
        for span, places in plan.homes.items():
            for origin in places:
                for worker in range(len(self._task.workers)):
                    if worker != origin:
                        yield {
                            name: self._moved(name, route, span, origin, worker)
                            for name, route in routes.items()
                        }

        if not self._task.copies:
            yield from self._swaps(plan)

    def _swaps(self, plan: Plan) -> Iterable[dict[str, tuple[int, ...]]]:
        """Routes with two spans in each other's places, where memory may leave no room to move one alone."""
        home = {span: min(places) for span, places in plan.homes.items()}
        for one, other in combinations(home, 2):
            if home[one] != home[other]:
                now = {**home, one: home[other], other: home[one]}
                chains = self._task.chains.items()
                yield {name: tuple(now[span] for span in chain.spans) for name, chain in chains}

    def _moved(
        self, name: str, route: tuple[int, ...], span: str, origin: int, worker: int
    ) -> tuple[int, ...]:
        spans = self._task.chains[name].spans
        return tuple(
            worker if (each, at) == (span, origin) else at for each, at in zip(spans, route, strict=True)
        )

    def _shortest(self, name: str, others: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """The cheapest way of a chain through the workers, given the others' routes; None where no worker
        has room for a span that is nowhere yet."""
        task, chain = self._task, self._task.chains[name]
        around = judge(task, others)
        room = _room(task, around.homes)
        paths: dict[int, tuple[float, tuple[int, ...], dict[int, int]]] = {task.head: (0.0, (), {})}
        for span in chain.spans:
            reached: dict[int, tuple[float, tuple[int, ...], dict[int, int]]] = {}
            for worker in range(len(task.workers)):
                new = worker not in around.homes.get(span, ())
                if new and span in around.homes and not task.copies:
                    continue
                size = task.spans[span].num_bytes if new else 0
                step = self._step(chain.rate, span, worker, around.loads[worker], new)
                for before, (cost, path, taken) in paths.items():
                    if taken.get(worker, 0) + size > room[worker] and new:
                        continue
                    total = cost + step + chain.rate * task.hop_s[before][worker]
                    if worker not in reached or total < reached[worker][0]:
                        more = {**taken, worker: taken.get(worker, 0) + size}
                        reached[worker] = total, (*path, worker), more
            paths = reached
        ends = [
            (cost + chain.rate * task.hop_s[at][task.head], path) for at, (cost, path, _) in paths.items()
        ]
        return min(ends)[1] if ends else None

    def _step(self, rate: float, span: str, worker: int, load: float, new: bool) -> float:
        """What a span more costs on a worker: in its queue, and to get there."""
        more = rate * self._task.spans[span].seconds / self._task.workers[worker].speed
        fetch = _fetch_s(self._task, span, worker) / self._task.horizon_s if new else 0.0
        return _queue(load + more) - _queue(load) + fetch


def _queue(load: float) -> float:
    """Tokens in a worker; beyond its limit something large that still grows, so that there is a way back."""
    return load / (1 - load) if load < 0.999 else 1e3 + 1e6 * (load - 0.999)


def _fetch_s(task: Task, span: str, worker: int) -> float:
    """Seconds until a worker has a span: none where it has, else from the nearest that has, or from disk."""
    holders = task.held.get(span, frozenset())
    if worker in holders:
        return 0.0
    nearest = min((task.byte_s[other][worker] for other in (*holders, worker)), default=0.0)
    return task.spans[span].num_bytes * nearest


def _room(task: Task, homes: Homes) -> list[int]:
    """Bytes left of each worker."""
    room = [worker.num_bytes for worker in task.workers]
    for span, places in homes.items():
        for worker in places:
            room[worker] -= task.spans[span].num_bytes
    return room


def _num_bytes(task: Task, name: str) -> int:
    return sum(task.spans[span].num_bytes for span in task.chains[name].spans)
