"""Which worker holds which spans of a zoo, and which of them each chain goes through.

A plan is judged by one figure, the tokens that are under way on average: by Little's law the rate of each
chain times the time that a token takes through it, on wires and in workers. A worker that is busy with rows
for a share `u` of the time holds `u / (1 - u)` tokens (M/M/1), so loads even out by themselves, and a hot
span gets a copy where the queue before it costs more than the wire to another worker. What a call costs
however few rows it has (weights are read) is shared by all rows that meet in it: a worker goes round its
spans, calls those for which tokens have come, and who comes takes one round. So chains of one base are drawn
together, as far as queues let them. (After BlockLLM, arXiv 2404.18322, whose placement follows the traffic
between blocks, too; the solver is ours.)

Chains are placed one after the other, the busiest first, each by the shortest path through the workers given
those before; then each is placed anew given all others, and spans are moved, until nothing gets better. What
a plan needs anew on a worker counts, too, as time on the wire spread over a horizon.

Ints and floats only: it knows of no manifest, engine or process.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from blockzoo.zoo.placement_search import Flow, Search, fetch_s, packed, scattered

_TRIES, _MOST_TRIES = 120, 12  # tried besides, in small tasks: they are soon done

Homes = Mapping[str, frozenset[int]]
"""By span, the workers that hold it."""


class PlacementError(ValueError):
    """There is no plan: memory is short, or the rates are more than the workers can do."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive blocks that the same chains use.

    Attributes:
        num_bytes: that a worker needs to hold it.
        seconds: that a token more takes, on a worker of speed 1.
        call_seconds: that a call takes beside its tokens, there.
    """

    num_bytes: int
    seconds: float
    call_seconds: float = 0.0


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
        loads: by worker, the share of time that it is busy with rows.
        tokens: by worker, those there on average.
        wire: tokens under way between workers.
        moving: share of the horizon for which weights are on the wire.
    """

    routes: Mapping[str, tuple[int, ...]]
    homes: Homes
    loads: tuple[float, ...]
    tokens: tuple[float, ...]
    wire: float
    moving: float

    @property
    def cost(self) -> float:
        """Tokens under way, and what moving counts for; infinite where a worker cannot keep up."""
        if max(self.loads, default=0.0) >= 1:
            return math.inf
        return sum(self.tokens) + self.wire + self.moving


@dataclass(frozen=True, slots=True)
class Move:
    """A span that a worker gets for a plan.

    Attributes:
        source: the worker that it comes from; None: the worker's own disk.
        seconds: that it takes.
    """

    span: str
    source: int | None
    worker: int
    num_bytes: int
    seconds: float


def place(task: Task) -> Plan:
    """A good plan. Raises PlacementError where none is found."""
    return _best(task, _fresh(task))


def adapt(task: Task, routes: Mapping[str, tuple[int, ...]], least_gain: float = 1e-6) -> Plan:
    """A plan to go over to from `routes`, as rates, chains or workers have changed (`task.held`: what the
    workers hold now).

    Only what pays is moved: bytes on the wire, spread over the horizon, count beside the tokens under way
    that they spare. Where nothing pays, the routes stay as they are.

    Args:
        task: as it is now.
        routes: of now.
        least_gain: share of the cost that a plan must spare for routes to be changed: rates are measured, so
            not quite right.

    Raises:
        PlacementError: there is no plan.
    """
    kept = {
        name: route
        for name, route in routes.items()
        if name in task.chains
        and len(route) == len(task.chains[name].spans)
        and all(0 <= worker < len(task.workers) for worker in route)
    }
    new = sorted(task.chains.keys() - kept.keys(), key=lambda name: (-task.chains[name].rate, name))
    here = Search(task, kept).add_all(new)
    stays = judge(task, here.routes)
    best = _best(task, [here, *_fresh(task)])
    is_worth_it = best.cost < stays.cost * (1 - least_gain) or not fits(task, stays.homes)
    return best if is_worth_it else stays


def moves(task: Task, plan: Plan) -> list[Move]:
    """What workers get that they do not hold, the largest first."""
    found = []
    for span, places in plan.homes.items():
        holders = task.held.get(span, frozenset())
        for worker in sorted(places - holders):
            source = min((*holders, worker), key=lambda other: task.byte_s[other][worker])
            size = task.spans[span].num_bytes
            origin = None if source == worker else source
            found.append(Move(span, origin, worker, size, fetch_s(task, span, worker)))
    return sorted(found, key=lambda move: (-move.num_bytes, move.span, move.worker))


def _fresh(task: Task) -> list[Search]:
    """Where a search that keeps nothing begins."""
    by_rate = sorted(task.chains, key=lambda name: -task.chains[name].rate)
    by_size = sorted(task.chains, key=lambda name: -_num_bytes(task, name))
    starts = [Search(task, {}).add_all(order) for order in (by_rate, by_size)]
    starts.append(Search(task, packed(task)))
    source = random.Random(0)
    for _ in range(min(_MOST_TRIES, _TRIES // (len(task.chains) * len(task.workers)))):
        starts.append(Search(task, scattered(task, source)))
    return starts


def _best(task: Task, starts: Iterable[Search]) -> Plan:
    plans = [judge(task, start.improve().routes) for start in starts]
    best = min(plans, key=lambda plan: (not fits(task, plan.homes), plan.cost))
    if fits(task, best.homes) and best.cost < math.inf:
        return best
    needed = sum(span.num_bytes for span in task.spans.values())
    room = sum(worker.num_bytes for worker in task.workers)
    busy = sum(c.rate * sum(task.spans[s].seconds for s in c.spans) for c in task.chains.values())
    raise PlacementError(
        f"no plan: spans have {needed} bytes, workers room for {room}; the rates keep {busy:.2f} workers "
        f"of speed 1 busy, and there are {sum(worker.speed for worker in task.workers):g}: add workers"
    )


def judge(task: Task, routes: Mapping[str, tuple[int, ...]]) -> Plan:
    """The plan that follows from routes; it may want more memory than there is (`fits`)."""
    homes: dict[str, set[int]] = defaultdict(set)
    flows = [Flow() for _ in task.workers]
    wire = 0.0
    for name, route in routes.items():
        chain = task.chains[name]
        for span, worker in zip(chain.spans, route, strict=True):
            homes[span].add(worker)
        for worker in set(route):
            flows[worker].add(task, chain, route, worker)
        hops = pairwise((task.head, *route, task.head))
        wire += chain.rate * sum(task.hop_s[a][b] for a, b in hops)
    moving = sum(fetch_s(task, span, worker) for span, places in homes.items() for worker in places)
    return Plan(
        dict(routes),
        {span: frozenset(places) for span, places in homes.items()},
        tuple(flow.load for flow in flows),
        tuple(flow.tokens(task, worker) for worker, flow in enumerate(flows)),
        wire,
        moving / task.horizon_s,
    )


def fits(task: Task, homes: Homes) -> bool:
    """Whether all workers have room for what they are to hold, and no span is on more than it may be."""
    single = task.copies or all(len(places) == 1 for places in homes.values())
    return single and all(room >= 0 for room in _room(task, homes))


def _room(task: Task, homes: Homes) -> list[int]:
    """Bytes left of each worker."""
    room = [worker.num_bytes for worker in task.workers]
    for span, places in homes.items():
        for worker in places:
            room[worker] -= task.spans[span].num_bytes
    return room


def _num_bytes(task: Task, name: str) -> int:
    return sum(task.spans[span].num_bytes for span in task.chains[name].spans)
