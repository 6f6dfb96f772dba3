"""Where spans are, as requests come: whether other places would pay, by the rates of models of late."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from blockzoo.runtime.exec.topology import Topology
from blockzoo.runtime.serve.loaded import LoadedZoo
from blockzoo.runtime.serve.over_workers import Workers
from blockzoo.runtime.serve.search_apart import adapt_apart
from blockzoo.runtime.serve.span_groups import with_others
from blockzoo.runtime.serve.span_moves import Moved, MoveError, SpanMover, check_owners
from blockzoo.zoo.placement import PlacementError, judge, moves

HORIZON_S = 300.0
"""Within which moving must pay."""
LEAST_GAIN = 0.1
"""Share of the tokens under way that it must spare: rates and times are not quite right."""
_LEAST_RATE = 1.0  # tokens a second in all, below which nothing is worth a move
_NAMED = 3  # models, of those that share a span

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A placement that pays.

    Attributes:
        homes: by span index, the worker that it goes to.
        before, after: tokens under way, by the placement's estimate.
        seconds: that moving is thought to take, weights and KV.
    """

    homes: Mapping[int, int]
    before: float
    after: float
    seconds: float


class LivePlacement:
    """Measures rates, and moves spans as they change.

    Args:
        mover: of an engine's spans.
        told: called with how many spans, and pages of KV, have moved.
    """

    def __init__(self, mover: SpanMover, told: Callable[[int, int], None]) -> None:
        self._mover, self._zoo, self._told = mover, mover.zoo, told

    def stop(self) -> None:
        """Have spans that are about to move stay where they are, from now on."""
        self._mover.stop.set()

    def note(self, tokens: Mapping[str, int]) -> None:
        """Tokens were run, by model. From the thread that steps."""
        workers, now = self._zoo().workers, time.monotonic()
        if workers is not None:
            for model, count in tokens.items():
                workers.rates.note(model, count, now)

    def follow(self) -> Moved | None:
        """Look at the rates, and move what pays; None: nothing does, or it cannot be moved. Thread-safe."""
        proposal = self.propose()
        if proposal is None:
            return None
        try:
            return self.move(proposal.homes)
        except MoveError as error:
            _LOG.warning("the spans stay where they are: %s", error)
            return None

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
            best = adapt_apart(task, workers.routes, LEAST_GAIN, self._mover.stop)
        except PlacementError as error:
            _LOG.warning("no placement for the rates of now: %s", error)
            return None
        found = moves(task, best)
        homes = {int(move.span): move.worker for move in found}
        kv_seconds = _kv_seconds(zoo, workers, with_others(homes, workers.leaders))
        spared = stays.cost - best.cost - kv_seconds / HORIZON_S
        if not homes or spared < LEAST_GAIN * stays.cost:
            return None
        seconds = sum(move.seconds for move in found) + kv_seconds
        proposal = Proposal(homes, stays.cost, best.cost - best.moving, seconds)
        _LOG.warning("%s", _in_words(proposal, rates, zoo, workers))
        return proposal

    def move(self, homes: Mapping[int, int]) -> Moved:
        """Move spans, by index, to workers. Raises MoveError: they stay where they are. Thread-safe."""
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
        return {(name, str(home)): 1 for name, home in zip(span_names(zoo.topology), homes, strict=True)}

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
        more = f" and {len(models) - _NAMED} more" if len(models) > _NAMED else ""
        names.append(f"{index}: {place} of {', '.join(models[:_NAMED])}{more}")
    return names


def _kv_seconds(zoo: LoadedZoo, workers: Workers, homes: Mapping[int, int]) -> float:
    """About how long the K and V of spans are on the wire: as though their layers had an equal share of what
    the pools hold."""
    seconds = 0.0
    for chain_index in set(zoo.topology.chain_of_model.values()):
        chain = zoo.topology.chains[chain_index]
        stats = zoo.caches[chain.family].stats()
        layers = sum(c.num_layers for c in zoo.topology.chains if c.family == chain.family)
        held = (stats.pages_total - stats.pages_free) * workers.page_bytes[chain.family]
        for use in chain.uses:
            if use.span in homes:
                link = workers.link_byte_s[workers.group.plan.homes[use.span]][homes[use.span]]
                seconds += link * held * zoo.topology.spans[use.span].num_layers / layers
    return seconds


def _in_words(proposal: Proposal, rates: Mapping[str, float], zoo: LoadedZoo, workers: Workers) -> str:
    names, now = span_names(zoo.topology), workers.group.plan.homes
    asked = sorted(rates.items(), key=lambda item: -item[1])
    most = ", ".join(f"{model} {rate:.0f}" for model, rate in asked[:_NAMED])
    parts = "; ".join(
        f"span {names[span]}: worker {now[span]} -> {worker}"
        for span, worker in sorted(proposal.homes.items())
    )
    return (
        f"models are asked otherwise (tokens a second: {most}), so spans move. {parts}. Tokens under way at "
        f"these rates {proposal.before:.2f} -> {proposal.after:.2f}, for about {proposal.seconds:.2g} s of "
        "loading and sending"
    )
