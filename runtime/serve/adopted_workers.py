"""Workers that an engine before has left, in the place of new ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from blockzoo.runtime.exec.topology import Topology
from blockzoo.runtime.serve.span_groups import leaders
from blockzoo.runtime.workers.head_line import Held
from blockzoo.runtime.workers.processes import LocalProcesses
from blockzoo.runtime.workers.settings import EngineKind

_LOG = logging.getLogger(__name__)


def adopt(
    processes: LocalProcesses, topology: Topology, kind: EngineKind, count: int
) -> tuple[int, ...] | None:
    """Take the workers that an engine before has left, where they have all that is needed: by span index, the
    one that has it. Else they end; None."""
    orphans = processes.orphans()
    if orphans is None:
        return None
    chosen = {orphan.held.worker: orphan for orphan in orphans.found if orphan.held.kind == kind}
    homes = None
    if chosen.keys() == set(range(count)):
        homes = _held_homes(topology, {index: orphan.held for index, orphan in chosen.items()})
    if not processes.adopt(orphans, {} if homes is None else chosen):
        return None
    _LOG.warning("%d workers of an engine that has ended go on, with the spans that they have", count)
    return homes


def _held_homes(topology: Topology, held: Mapping[int, Held]) -> tuple[int, ...] | None:
    """By span index, the worker that has it, and those that stay together; None: some span is nowhere."""
    first = leaders(topology)
    holders: dict[int, set[int]] = {}
    for leader, span in zip(first, topology.spans, strict=True):
        found = {index for index, each in held.items() if span in each.spans}
        holders[leader] = holders.get(leader, found) & found
    return tuple(min(holders[leader]) for leader in first) if all(holders.values()) else None
