"""Local search over the routes of a placement task; `placement` says what is searched and why.

Routes are changed one move at a time, and what follows from them (loads, room, traffic) is kept up to date,
so that a move is judged by what it touches. What does not fit, or is more than a worker can do, is not
forbidden but dear: so a search may begin anywhere, and finds its way back.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise, product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockzoo.zoo.placement import Chain, Task

Route = tuple[int, ...]
_OVERFULL = 1e9  # cost of a worker's whole memory that is not there
_BUSIEST = 0.999
_ROUNDS = 2  # until a worker's cycle is as long as what it finds to do
_FEW = 12  # chains, of which all pairs are tried
_WAIT = 0.5  # of a round: who comes from another worker finds this one in the middle of one
_NO_RATE = 1e-12
_GAIN = 1e-9  # relative, that a move must bring


class Search:
    """Routes, and their cost.

    Args:
        task: whose chains are routed.
        routes: to begin with; chains without one are given the cheapest, in this order.
    """

    def __init__(self, task: Task, routes: Mapping[str, Route]) -> None:
        self._task = task
        self.routes: dict[str, Route] = {}
        self._flows = [Flow() for _ in task.workers]
        self._room = [worker.num_bytes for worker in task.workers]
        self._costs = [0.0] * len(task.workers)  # tokens there, and what does not fit
        self._wires: dict[str, float] = {}  # by chain
        self._fetches: dict[tuple[str, int], float] = {}  # of what lies where it is not held
        self._uses = Counter[tuple[str, int]]()
        self._homes = Counter[str]()  # workers that hold each span
        self._num_copies = 0  # more than may be
        self._chains_of: dict[str, list[str]] = {}
        for name, chain in task.chains.items():
            for span in dict.fromkeys(chain.spans):
                self._chains_of.setdefault(span, []).append(name)
        for name, route in routes.items():
            self._put(name, route)

    @property
    def cost(self) -> float:
        """`Plan.cost`, finite where that is infinite."""
        moving = sum(self._fetches.values()) / self._task.horizon_s
        return sum(self._costs) + sum(self._wires.values()) + moving + _OVERFULL * self._num_copies

    def add_all(self, order: Iterable[str]) -> Search:
        """Give chains their cheapest routes, one after the other."""
        for name in order:
            self._put(name, self._cheapest(name))
        return self

    def improve(self) -> Search:
        """Move by move until none is better."""
        before = float("inf")
        while self.cost < before * (1 - _GAIN):
            before = self.cost
            for name in list(self.routes):
                self._move_chain(name)
            for name in list(self.routes):
                self._move_parts(name)
            for span in self._chains_of:
                self._move_span(span)
            if not self._task.copies:
                self._swap_spans()
            if self.cost >= before * (1 - _GAIN) and len(self.routes) <= _FEW:
                self._exchange()
        return self

    # ---- moves

    def _move_chain(self, name: str) -> None:
        """All of a chain, given the others."""
        before, old = self.cost, self.routes[name]
        self._take(name)
        self._put(name, self._cheapest(name))
        if self.cost >= before * (1 - _GAIN):
            self._set({name: old})

    def _move_parts(self, name: str) -> None:
        """One span of a chain, to wherever it is better."""
        for place in range(len(self.routes[name])):
            for worker in range(len(self._task.workers)):
                route = self.routes[name]
                if worker != route[place]:
                    self._try({name: (*route[:place], worker, *route[place + 1 :])})

    def _move_span(self, span: str) -> None:
        """A span with all chains that use it on one worker; or on any, as a copy less."""
        users = self._chains_of[span]
        for origin in sorted({at for at in range(len(self._room)) if self._uses[span, at]}):
            for worker in range(len(self._room)):
                if worker != origin:
                    self._try({name: self._moved(name, span, origin, worker) for name in users})

    def _swap_spans(self) -> None:
        """Two spans, each of one home, in each other's places: there may be no room to move one alone."""
        for one, other in combinations(self._chains_of, 2):
            a, b = self._home(one), self._home(other)
            if a != b:
                now = {(one, a): b, (other, b): a}
                users = {*self._chains_of[one], *self._chains_of[other]}
                spans = {
                    name: zip(self._task.chains[name].spans, self.routes[name], strict=True) for name in users
                }
                self._try({name: tuple(now.get(stage, stage[1]) for stage in spans[name]) for name in users})

    def _home(self, span: str) -> int:
        return next(at for at in range(len(self._room)) if self._uses[span, at])

    def _exchange(self) -> None:
        """Two chains, what they do on two workers."""
        for one, other in combinations(list(self.routes), 2):
            for a, b in product(range(len(self._room)), repeat=2):
                if a in self.routes[one] and b in self.routes[other] and a != b:
                    swap = {a: b, b: a}
                    self._try({n: tuple(swap.get(w, w) for w in self.routes[n]) for n in (one, other)})

    def _moved(self, name: str, span: str, origin: int, worker: int) -> Route:
        stages = zip(self._task.chains[name].spans, self.routes[name], strict=True)
        return tuple(worker if stage == (span, origin) else stage[1] for stage in stages)

    def _try(self, routes: Mapping[str, Route]) -> None:
        changed = {name: route for name, route in routes.items() if route != self.routes[name]}
        before, old = self.cost, {name: self.routes[name] for name in changed}
        self._set(changed)
        if self.cost >= before * (1 - _GAIN):
            self._set(old)

    # ---- state

    def _set(self, routes: Mapping[str, Route]) -> None:
        for name in routes:
            self._take(name)
        for name, route in routes.items():
            self._put(name, route)

    def _put(self, name: str, route: Route) -> None:
        chain = self._task.chains[name]
        self.routes[name] = route
        hops = pairwise((self._task.head, *route, self._task.head))
        self._wires[name] = chain.rate * sum(self._task.hop_s[a][b] for a, b in hops)
        for span, worker in zip(chain.spans, route, strict=True):
            self._uses[span, worker] += 1
            if self._uses[span, worker] == 1:
                self._count_home(span, 1)
                self._room[worker] -= self._task.spans[span].num_bytes
                self._fetches[span, worker] = fetch_s(self._task, span, worker)
        for worker in set(route):
            self._flows[worker].add(self._task, chain, route, worker)
        self._judge(set(route))

    def _take(self, name: str) -> None:
        route, chain = self.routes.pop(name), self._task.chains[name]
        del self._wires[name]
        for span, worker in zip(chain.spans, route, strict=True):
            self._uses[span, worker] -= 1
            if not self._uses[span, worker]:
                self._count_home(span, -1)
                self._room[worker] += self._task.spans[span].num_bytes
                del self._fetches[span, worker]
        for worker in set(route):
            self._flows[worker].add(self._task, chain, route, worker, -1)
        self._judge(set(route))

    def _count_home(self, span: str, sign: int) -> None:
        before = self._homes[span]
        self._homes[span] += sign
        if not self._task.copies:
            self._num_copies += max(0, self._homes[span] - 1) - max(0, before - 1)

    def _judge(self, workers: Iterable[int]) -> None:
        for worker in workers:
            overfull = max(0, -self._room[worker]) / max(1, self._task.workers[worker].num_bytes)
            self._costs[worker] = self._flows[worker].tokens(self._task, worker) + _OVERFULL * overfull

    # ---- the cheapest route

    def _cheapest(self, name: str) -> Route:
        """Of a chain that has none, given the others': the shortest path through the workers."""
        task, chain = self._task, self._task.chains[name]
        paths: dict[int, tuple[float, Route, dict[int, int]]] = {task.head: (0.0, (), {})}
        for span in chain.spans:
            reached: dict[int, tuple[float, Route, dict[int, int]]] = {}
            for worker in range(len(task.workers)):
                comes, stays, size = self._step(chain, span, worker)
                for before, (cost, path, taken) in paths.items():
                    lacking = max(0, taken.get(worker, 0) + size - max(0, self._room[worker])) if size else 0
                    dear = _OVERFULL * lacking / max(1, task.workers[worker].num_bytes)
                    step = stays if path and before == worker else comes
                    total = cost + step + dear + chain.rate * task.hop_s[before][worker]
                    if worker not in reached or total < reached[worker][0]:
                        more = {**taken, worker: taken.get(worker, 0) + size}
                        reached[worker] = total, (*path, worker), more
            paths = reached
        return min(
            (cost + chain.rate * task.hop_s[at][task.head], path) for at, (cost, path, _) in paths.items()
        )[1]

    def _step(self, chain: Chain, span: str, worker: int) -> tuple[float, float, int]:
        """What a span more costs on a worker, with and without a visit more, and the bytes that it takes."""
        flow, task = self._flows[worker], self._task
        now = flow.tokens(task, worker)
        comes, stays = (flow.tokens(task, worker, span, chain.rate, n) - now for n in (1 + _WAIT, 0))
        if self._uses[span, worker]:
            return comes, stays, 0
        more = fetch_s(task, span, worker) / task.horizon_s
        if self._homes[span] and not task.copies:
            more += _OVERFULL
        return comes + more, stays + more, task.spans[span].num_bytes


class Flow:
    """What goes through a worker."""

    def __init__(self) -> None:
        self.load = 0.0  # share of its time for the rows
        self._visits = 0.0  # of tokens, a second, in rounds: spans that follow each other here take one
        self._rates: dict[str, float] = {}  # tokens a second by span

    def add(self, task: Task, chain: Chain, route: Route, worker: int, sign: int = 1) -> None:
        """Add a chain, or with -1 take it away."""
        before = -1
        rounds = 1 if len(set(route)) == 1 else 1 + _WAIT
        for span, at in zip(chain.spans, route, strict=True):
            if at == worker:
                rate = sign * chain.rate
                after = self._rates.get(span, 0.0) + rate
                if after > _NO_RATE:
                    self._rates[span] = after
                else:
                    self._rates.pop(span, None)
                self._visits += rate * rounds * (before != worker)
                self.load += rate * task.spans[span].seconds / task.workers[worker].speed
            before = at
        if not self._rates:
            self.load = self._visits = 0.0  # roundings go, too

    def tokens(
        self, task: Task, worker: int, span: str | None = None, rate: float = 0, visits: float = 0
    ) -> float:
        """Tokens there on average, with a rate through a span (and so many visits of it) besides; beyond the
        limit something large that still grows, so that there is a way back."""
        speed = task.workers[worker].speed
        load, rates = self.load, self._rates
        if span is not None:
            load += rate * task.spans[span].seconds / speed
            rates = {**rates, span: rates.get(span, 0.0) + rate}
        if load >= _BUSIEST:
            return 1e3 + 1e6 * (load - _BUSIEST)
        calls = [(task.spans[name].call_seconds / speed, rate) for name, rate in rates.items()]
        cycle = sum(seconds for seconds, _ in calls) / (1 - load)
        if cycle:
            for _ in range(_ROUNDS):
                busy = sum(seconds * (1 - math.exp(-rate * cycle)) for seconds, rate in calls)
                cycle = busy / (1 - load)
        return load / (1 - load) + (self._visits + rate * visits) * cycle


def scattered(task: Task, source: random.Random) -> dict[str, Route]:
    """Anything, anywhere."""
    workers = range(len(task.workers))
    return {name: tuple(source.choice(workers) for _ in chain.spans) for name, chain in task.chains.items()}


def packed(task: Task) -> dict[str, Route]:
    """Each span once, the largest first, where most room is."""
    room = [worker.num_bytes for worker in task.workers]
    home: dict[str, int] = {}
    for span in sorted(task.spans, key=lambda span: -task.spans[span].num_bytes):
        home[span] = max(range(len(room)), key=room.__getitem__)
        room[home[span]] -= task.spans[span].num_bytes
    return {name: tuple(home[span] for span in chain.spans) for name, chain in task.chains.items()}


def fetch_s(task: Task, span: str, worker: int) -> float:
    """Seconds until a worker has a span: none where it has, else from the nearest that has, or from disk."""
    holders: Sequence[int] | frozenset[int] = task.held.get(span, frozenset())
    if worker in holders:
        return 0.0
    nearest = min(task.byte_s[other][worker] for other in (*holders, worker))
    return task.spans[span].num_bytes * nearest
