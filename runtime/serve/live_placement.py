"""Where spans are, as requests come: whether other places would pay, by the rates of models of late."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.exec.topology import Family, Topology
from blockzoo.runtime.serve.loaded import LoadedZoo
from blockzoo.runtime.serve.over_workers import Workers
from blockzoo.runtime.serve.search_apart import adapt_apart
from blockzoo.runtime.serve.span_loading import MoveError
from blockzoo.runtime.serve.span_moves import Moved, Routed, SpanMover, check_owners
from blockzoo.runtime.workers.settings import NOWHERE
from blockzoo.zoo.placement import PlacementError, Plan, Task, judge, moves

HORIZON_S = 300.0
"""Within which moving must pay."""
LEAST_GAIN = 0.1
"""Share of the tokens under way that it must spare: rates and times are not quite right."""
_KEEPS_COPY = LEAST_GAIN / 2  # of the tokens under way, that a copy spares which is not given up
_LEAST_RATE = 1.0  # tokens a second in all, below which nothing is worth a move
_NAMED = 3  # models, of those that share a span

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A placement that pays.

    Attributes:
        homes: by span index, the worker that it goes to.
        routes: by model, the workers through which it goes in spans that get copies, or lose some.
        before, after: tokens under way, by the placement's estimate.
        seconds: that moving is thought to take, weights and KV.
    """

    homes: Mapping[int, int]
    routes: Mapping[str, Mapping[int, int]]
    before: float
    after: float
    seconds: float


class LivePlacement:
    """Measures rates, and moves and copies spans as they change.

    Args:
        mover: of an engine's spans.
        told: called with how many spans have moved or got a copy, and how many pages of KV have moved.
    """

    def __init__(self, mover: SpanMover, told: Callable[[int, int], None]) -> None:
        self._mover, self._zoo, self._told = mover, mover.zoo, told
        self._lock = Lock()  # whoever moves or copies spans does so alone

    def stop(self) -> None:
        """Have spans that are about to move stay where they are, from now on."""
        self._mover.stop.set()

    def note(self, tokens: Mapping[str, int]) -> None:
        """Tokens were run, by model. From the thread that steps."""
        workers, now = self._zoo().workers, time.monotonic()
        if workers is not None:
            for model, count in tokens.items():
                workers.rates.note(model, count, now)

    def follow(self) -> Moved | Routed | None:
        """Look at the rates, and move or copy what pays; None: nothing does, or it cannot be. Thread-safe."""
        proposal = self.propose()
        if proposal is None:
            return None
        done: Moved | Routed | None = None
        try:
            if proposal.homes:
                done = self.move(proposal.homes)
            if proposal.routes:
                done = self.route(proposal.routes)
        except MoveError as error:
            _LOG.warning("the spans stay where they are: %s", error)
        return done

    def propose(self) -> Proposal | None:
        """A placement that pays, and says in the log why; None: none does. Thread-safe."""
        zoo = self._zoo()
        workers = zoo.workers
        if workers is None:
            return None
        rates = self._mover.between.run(lambda: workers.rates.per_second(time.monotonic()))
        if sum(rates.values()) < _LEAST_RATE:
            return None
        task = replace(workers.task_now(rates), horizon_s=HORIZON_S)
        stays = judge(task, workers.routes)
        try:
            best = self._best(task, workers.routes)
        except PlacementError as error:
            _LOG.warning("no placement for the rates of now: %s", error)
            return None
        homes, routes = _homes(task, best, workers), _routes(task, best, stays)
        kv_seconds = _kv_seconds(zoo, workers, homes) + self._anew_seconds(zoo, workers, routes)
        spared = stays.cost - best.cost - kv_seconds / HORIZON_S
        least = LEAST_GAIN if _held(best) >= _held(stays) else -_KEEPS_COPY
        if not (homes or routes) or spared < least * stays.cost:
            return None
        seconds = sum(move.seconds for move in moves(task, best)) + kv_seconds
        proposal = Proposal(homes, routes, stays.cost, best.cost - best.moving, seconds)
        _LOG.warning("%s", _in_words(proposal, rates, zoo, workers))
        return proposal

    def _best(self, task: Task, routes: Mapping[str, tuple[int, ...]]) -> Plan:
        """The best plan with each span in one worker, or one with copies that is better by enough."""
        once = adapt_apart(replace(task, copies=False), routes, LEAST_GAIN, self._mover.stop)
        if not task.copies:
            return once
        try:
            copied = adapt_apart(task, routes, LEAST_GAIN, self._mover.stop)
        except PlacementError as error:  # it takes longer
            _LOG.warning("no placement with copies for the rates of now: %s", error)
            return once
        return copied if copied.cost < (1 - LEAST_GAIN) * once.cost else once

    def _anew_seconds(
        self, zoo: LoadedZoo, workers: Workers, routes: Mapping[str, Mapping[int, int]]
    ) -> float:
        """About how long K and V of models take to be computed anew: as though all layers had an equal share
        of what the pools hold."""
        chains = {zoo.topology.chain_of_model[model]: model for model in routes}
        return sum(
            _layer_pages(zoo, zoo.topology.chains[index].family)
            * PAGE_TOKENS
            * (self._mover.token_seconds(model) or 0.0)
            for index, model in chains.items()
        )

    def route(self, wanted: Mapping[str, Mapping[int, int]]) -> Routed:
        """Have models, by name, go through some workers in some spans, by index: a worker that lacks one gets
        a copy, and what no model goes through is given up. Raises MoveError: all stays. Thread-safe."""
        with self._lock:
            routed = self._mover.route(wanted)
        self._told(len(routed.homes), 0)
        _LOG.warning(
            "%d copies of spans made, %d given up: loaded in %.1f s, %d requests are computed anew",
            len(routed.homes),
            len(routed.given_up),
            routed.load_seconds,
            routed.anew,
        )
        return routed

    def move(self, homes: Mapping[int, int]) -> Moved:
        """Move spans, by index, to workers. Raises MoveError: they stay where they are. Thread-safe."""
        with self._lock:
            moved = self._mover.move(homes)
        self._told(len(moved.homes), moved.pages)
        _LOG.warning(
            "%d spans moved: loaded in %.1f s, steps stood still for %.3f s; %d pages of KV went along "
            "(%.1f MB), %d requests are computed anew, %d cached pages were dropped",
            len(moved.homes),
            moved.load_seconds,
            moved.still_seconds,
            moved.pages,
            moved.num_bytes / 1e6,
            moved.anew,
            moved.dropped,
        )
        return moved

    def spans_held(self) -> dict[tuple[str, str], int]:
        """1 by (span, worker), for each span that is there."""
        zoo = self._zoo()
        if zoo.workers is None:
            return {}
        homes = zoo.workers.group.plan.homes
        held = zip(span_names(zoo.topology), homes, strict=True)
        return {(name, str(home)): 1 for name, home in held if home != NOWHERE}

    def check_integrity(self) -> None:
        """Check that all K and V lie where their layers are. Raises IntegrityError: a bug of ours."""
        zoo = self._zoo()
        if zoo.workers is not None:
            check_owners(zoo, zoo.workers, self._mover.scheduler.running)


def span_names(topology: Topology) -> list[str]:
    """Spans in words, each another: "3: layers 6-8 of base, notes"."""
    users: list[list[str]] = [[] for _ in topology.spans]
    places: list[str] = ["" for _ in topology.spans]
    chains = sorted(topology.chain_of_model.items())
    known = {use.span for _, index in chains for use in topology.chains[index].uses}
    guessing = [(f"the surrogate of {n}", index) for n, index in sorted(topology.surrogate_of_model.items())]
    for model, index in (*chains, *guessing):
        for use in topology.chains[index].uses:
            count, first = topology.spans[use.span].num_layers, int(use.first_layer)
            if index in topology.surrogate_of_model.values() and use.span in known:
                continue
            users[use.span].append(model)
            last = first + count - 1
            places[use.span] = (
                f"layers {first}-{last}" if count > 1 else f"layer {first}" if count else "head"
            )
    names = []
    for index, (models, place) in enumerate(zip(users, places, strict=True)):
        names.append(f"{index}: {place} of {_named(models)}")
    return names


def _named(models: Sequence[str]) -> str:
    """The first of them."""
    more = f" and {len(models) - _NAMED} more" if len(models) > _NAMED else ""
    return ", ".join(models[:_NAMED]) + more


def _kv_seconds(zoo: LoadedZoo, workers: Workers, homes: Mapping[int, int]) -> float:
    """About how long the K and V of spans are on the wire: as though their layers had an equal share of what
    the pools hold."""
    seconds = 0.0
    for chain_index in set(zoo.topology.chain_of_model.values()):
        chain = zoo.topology.chains[chain_index]
        held = _layer_pages(zoo, chain.family) * workers.page_bytes[chain.family]
        for use in chain.uses:
            if use.span in homes:
                link = workers.link_byte_s[workers.group.plan.homes[use.span]][homes[use.span]]
                seconds += link * held * zoo.topology.spans[use.span].num_layers
    return seconds


def _layer_pages(zoo: LoadedZoo, family: Family) -> float:
    """Pages that a layer of a chain would have of those in use, were they shared out equally."""
    stats = zoo.caches[family].stats()
    layers = sum(chain.num_layers for chain in zoo.topology.chains if chain.family == family)
    return (stats.pages_total - stats.pages_free) / layers


def _held(plan: Plan) -> int:
    """Spans that workers have, copies counted."""
    return sum(len(workers) for workers in plan.homes.values())


def _homes(task: Task, plan: Plan, workers: Workers) -> dict[int, int]:
    """By index, where spans go that are, and are to be, in one worker."""
    now, found = workers.group.plan, {}
    for span, original in enumerate(now.topology.originals):
        name = str(workers.leaders[original])
        before, after = task.held[name], plan.homes[name]
        if now.homes[span] != NOWHERE and len(before) == len(after) == 1 and before != after:
            found[span] = min(after)
    return found


def _routes(task: Task, plan: Plan, stays: Plan) -> dict[str, dict[int, int]]:
    """Of the other spans, by model the worker of each that is another than now."""
    found: dict[str, dict[int, int]] = {}
    for model, route in plan.routes.items():
        for span, worker, now in zip(task.chains[model].spans, route, stays.routes[model], strict=True):
            if worker != now and len(task.held[span]) + len(plan.homes[span]) > 2:
                found.setdefault(model, {})[int(span)] = worker
    return found


def _in_words(proposal: Proposal, rates: Mapping[str, float], zoo: LoadedZoo, workers: Workers) -> str:
    names, now = span_names(zoo.topology), workers.group.plan.homes
    asked = sorted(rates.items(), key=lambda item: -item[1])
    most = ", ".join(f"{model} {rate:.0f}" for model, rate in asked[:_NAMED])
    moved = [
        f"span {names[span]}: worker {now[span]} -> {worker}"
        for span, worker in sorted(proposal.homes.items())
    ]
    users: dict[tuple[int, int], list[str]] = defaultdict(list)
    for model, spans in sorted(proposal.routes.items()):
        for span, worker in spans.items():
            users[span, worker].append(model)
    routed = [
        f"span {span}: worker {worker} for {_named(models)}"
        for (span, worker), models in sorted(users.items())
    ]
    parts = "; ".join(moved + routed)
    return (
        f"models are asked otherwise (tokens a second: {most}), so spans move. {parts}. Tokens under way at "
        f"these rates {proposal.before:.2f} -> {proposal.after:.2f}, for about {proposal.seconds:.2g} s of "
        "loading and sending"
    )
