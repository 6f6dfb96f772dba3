"""Spans that stay together, in one worker: those that write the same K and V.

A surrogate goes on behind what its model has computed, in the same pages: where it has another block in the
place of one of the model's, both have their pages in one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockzoo.runtime.exec.topology import ChainPlan, Topology


def leaders(topology: Topology) -> tuple[int, ...]:
    """By span, the first of those that it stays with."""
    first = list(range(len(topology.spans)))

    def leader(span: int) -> int:
        while first[span] != span:
            span = first[span]
        return span

    for surrogate, model in topology.models_of_surrogates().items():
        own, known = (_blocks(topology, topology.chains[index]) for index in (surrogate, model))
        for position, span in own.items():
            one, other = sorted((leader(span), leader(known[position])))
            first[other] = one
    return tuple(map(leader, range(len(first))))


def _blocks(topology: Topology, chain: ChainPlan) -> dict[int, int]:
    """By position in the model's chain, the span that is there."""
    return {
        use.position + offset: use.span
        for use in chain.uses
        for offset in range(len(topology.spans[use.span].block_ids))
    }


class ApartError(ValueError):
    """Spans that stay together were to go to several workers."""


def with_others(homes: Mapping[int, int], first: Sequence[int]) -> dict[int, int]:
    """Workers of some spans, and of those that stay with them. Raises ApartError."""
    wanted: dict[int, int] = {}
    for span, worker in homes.items():
        if wanted.setdefault(first[span], worker) != worker:
            raise ApartError(f"span {span} stays with span {first[span]}: send both to one worker")
    return {span: wanted[leader] for span, leader in enumerate(first) if leader in wanted}
