"""Placement for many workers: chains are dealt to cells (servers, say), and each cell is placed on its own.

A search over all workers at once would take hours with a thousand of them, and brings little: what a chain
goes through should stand together anyway, and a hot base needs a copy in many cells, whoever chooses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from blockzoo.zoo.placement import Chain, Plan, Task, judge, place

_PACKED = 0.85  # of a cell's memory: spans do not fill workers to the brim


@dataclass(slots=True)
class _Cell:
    workers: Sequence[int]
    num_bytes: int
    speed: float
    chains: dict[str, Chain] = field(default_factory=dict)
    spans: set[str] = field(default_factory=set)
    taken: int = 0
    load: float = 0.0


def place_in_cells(task: Task, cells: Sequence[Sequence[int]]) -> Plan:
    """A plan in which each chain stays in one of the cells (lists of workers, which are in one each).

    A cell that the head is not in is placed as if it began and ended at its first worker.

    Raises:
        PlacementError: what a cell was dealt does not fit there.
    """
    dealt = [
        _Cell(
            cell,
            sum(task.workers[worker].num_bytes for worker in cell),
            sum(task.workers[worker].speed for worker in cell),
        )
        for cell in cells
    ]
    for name in sorted(task.chains, key=lambda name: (-task.chains[name].rate, name)):
        _deal(task, name, dealt)
    routes: dict[str, tuple[int, ...]] = {}
    for cell in dealt:
        if cell.chains:
            plan = place(_part(task, cell.workers, cell.chains))
            routes |= {name: tuple(cell.workers[w] for w in route) for name, route in plan.routes.items()}
    return judge(task, routes)


def _deal(task: Task, name: str, cells: Sequence[_Cell]) -> None:
    """To the cell that is the least full after it, in memory and in work."""
    chain = task.chains[name]
    work = chain.rate * sum(task.spans[span].seconds for span in chain.spans)

    def fullness(cell: _Cell) -> tuple[bool, float]:
        new = [span for span in dict.fromkeys(chain.spans) if span not in cell.spans]
        taken = cell.taken + sum(task.spans[span].num_bytes for span in new)
        calls = sum(task.spans[span].call_seconds for span in new)  # each cell's own, whoever shares them
        memory = (taken - cell.taken) / cell.num_bytes
        return taken > _PACKED * cell.num_bytes, (cell.load + work + calls * chain.rate) / cell.speed + memory

    cell = min(cells, key=fullness)
    cell.chains[name] = chain
    cell.load += work
    cell.taken += sum(task.spans[span].num_bytes for span in set(chain.spans) - cell.spans)
    cell.spans |= set(chain.spans)


def _part(task: Task, workers: Sequence[int], chains: Mapping[str, Chain]) -> Task:
    """The task of one cell."""
    place_of = {worker: place for place, worker in enumerate(workers)}
    used = {span for chain in chains.values() for span in chain.spans}
    return replace(
        task,
        spans={span: task.spans[span] for span in task.spans if span in used},
        chains={name: chain for name, chain in task.chains.items() if name in chains},
        workers=[task.workers[worker] for worker in workers],
        hop_s=[[task.hop_s[a][b] for b in workers] for a in workers],
        byte_s=[[task.byte_s[a][b] for b in workers] for a in workers],
        head=place_of.get(task.head, 0),
        held={
            span: frozenset(place_of[worker] for worker in homes if worker in place_of)
            for span, homes in task.held.items()
        },
    )
