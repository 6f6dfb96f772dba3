"""Which worker each chain goes through in each span, and the copies of spans that this takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from blockzoo.runtime.exec.topology import Copy, Topology, originals
from blockzoo.runtime.serve.over_workers import Workers
from blockzoo.runtime.serve.span_loading import MoveError
from blockzoo.runtime.workers.settings import NOWHERE

Ways = Mapping[tuple[int, int], int]
"""By chain, and span that is no copy, the worker."""


@dataclass(frozen=True, slots=True)
class Hosts:
    """Where spans are.

    Attributes:
        copies: of spans (`Topology.copies`).
        homes: by span, copies behind the others, its worker; NOWHERE: no chain goes through it.
    """

    copies: tuple[Copy, ...]
    homes: tuple[int, ...]

    @property
    def originals(self) -> tuple[int, ...]:
        """As of a topology."""
        return originals(len(self.homes), self.copies)

    def coming(self, before: Sequence[int]) -> dict[int, int]:
        """By span, the worker that gets it, given the homes of before."""
        now = {(span, home) for span, home in enumerate(self.homes) if home != NOWHERE}
        return dict(sorted(now - set(enumerate(before))))

    def given_up(self, before: Sequence[int]) -> list[int]:
        """Spans that are in no worker any more, given the homes of before."""
        now = {span for span, home in enumerate(self.homes) if home != NOWHERE}
        return [span for span, home in enumerate(before) if home != NOWHERE and span not in now]


def ways(topology: Topology, homes: Sequence[int]) -> dict[tuple[int, int], int]:
    """Those of all chains."""
    known = topology.originals
    return {
        (index, known[use.span]): homes[use.span]
        for index, chain in enumerate(topology.chains)
        for use in chain.uses
    }


def of_model(topology: Topology, first: Sequence[int], model: str, span: int) -> list[tuple[int, int]]:
    """The chains, each with a span, that go where a model goes in a span: its own, and those of its
    surrogates, as both write the same pages; in all spans that stay together. `first`: `span_groups.leaders`
    of the spans that are no copies."""
    chain = topology.chain_of_model[model]
    together = [chain, *(s for s, m in topology.models_of_surrogates().items() if m == chain)]
    known = topology.originals
    return [
        (index, original)
        for index in together
        for original in (known[use.span] for use in topology.chains[index].uses)
        if first[original] == first[span]
    ]


def wanted_ways(workers: Workers, wanted: Mapping[str, Mapping[int, int]]) -> dict[tuple[int, int], int]:
    """The ways for models that are to go through some workers in some spans, by index. Raises MoveError where
    there is no such model, span or worker."""
    plan, count = workers.group.plan, len(workers.task.workers)
    found: dict[tuple[int, int], int] = {}
    for model, spans in wanted.items():
        if model not in plan.topology.chain_of_model:
            raise MoveError(f"there is no model {model!r}")
        for span, worker in spans.items():
            if not (0 <= worker < count and 0 <= span < len(plan.homes)):
                raise MoveError(f"span {span} of {len(plan.homes)}, in worker {worker} of {count}")
            own = of_model(plan.topology, workers.leaders, model, plan.topology.originals[span])
            if not own:
                raise MoveError(f"{model} does not go through span {span}")
            found |= dict.fromkeys(own, worker)
    return found


def check_room(workers: Workers, hosts: Hosts, coming: Collection[int]) -> None:
    """Raise MoveError where a worker that gets something has no room for what it is to hold."""
    task = workers.task
    for worker in sorted(set(coming)):
        spans = zip(hosts.originals, hosts.homes, strict=True)
        held = {workers.leaders[span] for span, home in spans if home == worker}
        need, room = sum(task.spans[str(span)].num_bytes for span in held), task.workers[worker].num_bytes
        if need > room:
            raise MoveError(
                f"worker {worker} has room for {room} bytes of weights beside its KV pool, and with the copy "
                f"it would hold {need}: give it more memory, or move spans away from it first"
            )


def hosts_for(topology: Topology, homes: Sequence[int], wanted: Ways) -> Hosts:
    """What has all chains go where they go now, but for those that are wanted elsewhere.

    What has chains before and after stays what and where it is. A copy that no chain goes through any more
    keeps its number, for the next one that is needed; so does a span of which only copies are used.
    """
    first = len(topology.spans) - len(topology.copies)
    chains: dict[tuple[int, int], list[int]] = defaultdict(list)
    for (chain, span), worker in sorted({**ways(topology, homes), **wanted}.items()):
        chains[span, worker].append(chain)
    copies = [Copy(copy.span, ()) for copy in topology.copies]
    found = [NOWHERE] * len(topology.spans)
    for (span, worker), users in chains.items():
        index = _known(topology, homes, span, worker)
        if index is None:
            free = (i for i, home in enumerate(homes) if home == found[i] == NOWHERE)
            index = next((i for i in free if i == span or i >= first), len(found))
        if index == len(found):
            found.append(NOWHERE)
            copies.append(Copy(span, ()))
        found[index] = worker
        if index >= first:
            copies[index - first] = Copy(span, tuple(users))
    if not any(copy.chains for copy in copies):
        return Hosts((), tuple(found[:first]))
    return Hosts(tuple(copies), tuple(found))


def _known(topology: Topology, homes: Sequence[int], span: int, worker: int) -> int | None:
    """The span or the copy of it that a worker has."""
    known = topology.originals
    return next((i for i, home in enumerate(homes) if home == worker and known[i] == span), None)
