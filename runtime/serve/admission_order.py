"""In which order the waiting sequences of one tenant are admitted."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import islice

from blockzoo.runtime.serve.config import SchedulerConfig
from blockzoo.runtime.serve.tenants import Entry, Tenant

PROBES_PER_STEP = 16  # waiting sequences whose expected cache hits are looked up again in one step


class AdmissionOrder:
    """Preempted sequences by age, then new ones: by arrival ("fair") or most cached first ("hit-first")."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float]) -> None:
        self._config, self._clock = config, clock
        self._probes = 0  # left in this step

    def begin_step(self) -> None:
        """A step begins."""
        self._probes = PROBES_PER_STEP

    def on_added(self, entry: Entry) -> None:
        """A sequence has come."""
        if self._config.policy == "hit-first":
            _probe(entry)

    def of(self, tenant: Tenant) -> Iterator[Entry]:
        """The tenant's waiting sequences, in order, as they are now; who asks may take them out."""
        queue = self._ranked(tenant) if tenant.waiting else []
        yield from tenant.preempted.copy()
        while queue:
            yield heapq.heappop(queue)[-1]

    def _ranked(self, tenant: Tenant) -> list[tuple[float, float, int, Entry]]:
        """A heap: (rank, arrival, order of add, entry)."""
        if self._config.policy == "fair":
            queue = [(0.0, *entry.age, entry) for entry in tenant.waiting]
        else:
            self._refresh_probes(tenant)
            aged = self._clock() - self._config.ageing_s
            queue = [
                (float("-inf") if entry.age[0] < aged else -entry.expected, *entry.age, entry)
                for entry in tenant.waiting
            ]
        heapq.heapify(queue)
        return queue

    def _refresh_probes(self, tenant: Tenant) -> None:
        """Look some outdated expectations up again, in turn: cheap with hundreds waiting, never far off."""
        for entry in list(islice(tenant.waiting, self._probes)):
            self._probes -= 1
            _probe(entry)
            tenant.waiting.move_to_end(entry)


def _probe(entry: Entry) -> None:
    cache = entry.seq.cache
    if entry.probed != cache.version:
        entry.expected = cache.probe(entry.seq)
        entry.probed = cache.version
