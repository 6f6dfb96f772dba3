"""Who shares an engine: tenants, what each has waiting and running, and whether its queue has room.

A tenant is the name that requests are counted under: their model, or a key that they came with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from blockzoo.runtime.api.errors import OverloadedError
from blockzoo.runtime.kv.sequence import TokenSequence


@dataclass(slots=True, eq=False)
class Entry:
    """A sequence in the scheduler. Ordered by age: the older is admitted first, the youngest preempted."""

    seq: TokenSequence
    tenant: Tenant
    age: tuple[float, int]  # arrival, then order of add
    running: bool = False
    expected: int = 0  # tokens the cache would give, as of cache version `probed`
    probed: int = -1

    def __lt__(self, other: Entry) -> bool:
        return self.age < other.age


@dataclass(slots=True, eq=False)
class Tenant:
    """One tenant as long as it has sequences: idle ones are forgotten, with what they had saved up."""

    name: str
    weight: float
    last_admitted: int  # number of its latest admission, at first that of the latest of all
    running: list[Entry] = field(default_factory=list)  # by age; they hold pages
    preempted: list[Entry] = field(default_factory=list)  # by age; admitted before any of `waiting`
    waiting: OrderedDict[Entry, None] = field(default_factory=OrderedDict)  # whose probe is oldest first
    deficit: float = 0.0  # rows of prefill that it may have before others have more
    lacks_pages: bool = False  # its first waiting sequence did when it was last tried

    @property
    def served(self) -> float:
        """Sequences that run, by weight."""
        return len(self.running) / self.weight

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission, new or preempted."""
        return len(self.preempted) + len(self.waiting)

    def may_take_from(self, other: Tenant) -> bool:
        """Whether this tenant with a sequence more has no more by weight than `other` with one less."""
        mine, theirs = len(self.running) + 1, len(other.running) - 1
        return mine * other.weight <= theirs * self.weight


def check_queue(
    tenant: str,
    held: Mapping[str, int],
    max_waiting: int,
    weights: Mapping[str, float],
    state: str = "waiting",
) -> None:
    """Whether one more request of a tenant may wait.

    It may where fewer than `max_waiting` wait in all: nobody's share lies idle. Beyond that it may where its
    tenant has fewer waiting than its share of max_waiting, by weight among the tenants present, and always
    where its tenant has none waiting. So a flood fills what others leave and is then refused itself, and who
    comes later never is because of it. With n tenants of equal weight at most max_waiting * (1 + 1/2 + ... +
    1/n) requests wait: nothing that was accepted is refused later.

    Args:
        tenant: whose request it is.
        held: waiting requests by tenant, of all that have any or run some.
        max_waiting: see `SchedulerConfig`.
        weights: by tenant; 1 where there is none.
        state: what the error says of them.

    Raises:
        OverloadedError: it may not; says whose share is full.
    """
    total, own = sum(held.values()), held.get(tenant, 0)
    present = sum(weights.get(name, 1.0) for name in {*held, tenant})
    share = max(1, int(max_waiting * weights.get(tenant, 1.0) / present))
    if total >= max_waiting and own >= share:
        raise OverloadedError(
            f"{total} requests are {state} already, {own} of them of {tenant!r}, whose share of the "
            f"{max_waiting} that may be is {share} (max_waiting): send the request again later"
        )
