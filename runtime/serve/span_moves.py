"""Spans that go from worker to worker while requests run.

    the new worker reads and compiles them, beside the steps -> pages that are never written again are sent
    over, a few between two steps -> between two steps: the others are sent, or given up, and all workers go
    over to the new homes

Until the last nothing has changed: where something goes wrong before, spans stay where they are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Event

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.exec.topology import Copy, Family
from blockzoo.runtime.kv.nodes import Node
from blockzoo.runtime.kv.pool import IntegrityError
from blockzoo.runtime.kv.sequence import Segment, TokenSequence
from blockzoo.runtime.serve.between_steps import BetweenSteps
from blockzoo.runtime.serve.kv_moves import KVMoves, LayerMoves, Pages, choose_moves, forget, joined
from blockzoo.runtime.serve.loaded import LoadedZoo
from blockzoo.runtime.serve.over_workers import Workers
from blockzoo.runtime.serve.scheduler import Scheduler
from blockzoo.runtime.serve.span_copies import check_room, hosts_for, wanted_ways
from blockzoo.runtime.serve.span_groups import ApartError, leaders, with_others
from blockzoo.runtime.serve.span_loading import MoveError, SpanLoading
from blockzoo.runtime.workers.distributed import DistributedExecutor
from blockzoo.runtime.workers.settings import NOWHERE

_AHEAD_S = 0.02  # for which pages are sent between two steps, before all stands still for the rest
_LEAST_MEASURED = 1 << 20  # bytes over a link that tell how fast it is


@dataclass(frozen=True, slots=True)
class Moved:
    """What moving spans came to.

    Attributes:
        homes: by span, the worker that it went to.
        load_seconds: until the new workers had them, while steps went on.
        still_seconds: for which steps stood still.
        pages, num_bytes: of K and V that went along.
        anew: sequences that are computed anew.
        dropped: cached pages that were forgotten.
    """

    homes: Mapping[int, int]
    load_seconds: float
    still_seconds: float
    pages: int
    num_bytes: int
    anew: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Routed:
    """What having models go through other copies of spans came to.

    Attributes:
        homes: by span, the worker that has got it.
        given_up: those that no model goes through any more: copies, or what there were copies of.
        load_seconds: as of `Moved`.
        anew: sequences that are computed anew.
    """

    homes: Mapping[int, int]
    given_up: Sequence[int]
    load_seconds: float
    anew: int


class SpanMover:
    """Moves and copies spans of an engine's workers; from any thread, one at a time.

    Args:
        between: where its state may be changed.
        zoo: what is loaded now.
        scheduler: of the requests.
        token_seconds: that a token of a model's prompt takes; None: not known.
        before: is called before routes change, to let go of pages that the scheduler does not know of.
        take_copies: puts copies of spans in the place of those that there are (`ServedZoo.take_copies`).
    """

    def __init__(
        self,
        between: BetweenSteps,
        zoo: Callable[[], LoadedZoo],
        scheduler: Scheduler,
        token_seconds: Callable[[str], float | None],
        before: Callable[[], None],
        take_copies: Callable[[Workers, Sequence[Copy], Sequence[int]], bool],
    ) -> None:
        self.between, self.zoo, self.scheduler = between, zoo, scheduler
        self.token_seconds, self.before, self._take_copies = token_seconds, before, take_copies
        self.stop = Event()

    def move(self, homes: Mapping[int, int]) -> Moved:
        """Move spans, by index, to workers, with those that stay together with them.

        Raises:
            MoveError: they stay where they are.
        """
        workers = self._workers()
        plan = workers.group.plan
        if any(plan.homes[span] == NOWHERE for span in homes):
            raise MoveError(f"of spans {sorted(homes)}, one is a copy that was given up")
        try:
            homes = with_others(homes, leaders(plan.topology))
        except ApartError as error:
            raise MoveError(str(error)) from error
        loading = self._load(workers, homes, range(len(plan.homes)))
        move = _Move(self, workers, homes, loading)

        def go_over(load_seconds: float) -> Moved:
            while self.between.run(move.send_ahead):
                self.stop.wait(_AHEAD_S)  # steps have as much time as sending
            return self.between.run(partial(move.go_over, load_seconds))

        return loading.once_loaded(go_over)

    def route(self, wanted: Mapping[str, Mapping[int, int]]) -> Routed:
        """Have models go through some workers in some spans, by index. A worker that does not have the span
        gets a copy of it; what no model goes through any more is given up. What runs of these models is
        computed anew.

        Raises:
            MoveError: all stays as it is.
        """
        workers = self._workers()
        plan = workers.group.plan
        changed = wanted_ways(workers, wanted)
        hosts = hosts_for(plan.topology, plan.homes, changed)
        coming = hosts.coming(plan.homes)
        check_room(workers, hosts, coming.values())
        loading = self._load(workers, coming, hosts.originals)

        def go_over(load_seconds: float) -> Routed:
            chains = {chain for chain, _ in changed}
            anew = self.between.run(lambda: sum(s.chain_index in chains for s in self.scheduler.running))
            loading.check()
            if not self._take_copies(workers, hosts.copies, hosts.homes):
                loading.check()
            return Routed(coming, hosts.given_up(plan.homes), load_seconds, anew)

        return loading.once_loaded(go_over)

    def _load(self, workers: Workers, homes: Mapping[int, int], originals: Sequence[int]) -> SpanLoading:
        return SpanLoading(self.between, self.zoo, self.stop, workers, homes, originals)

    def _workers(self) -> Workers:
        workers = self.zoo().workers
        if workers is None:
            raise MoveError("the engines are in this process")
        return workers


class _Move:
    """A move under way. Its methods are called between steps, and raise MoveError where it must end."""

    def __init__(
        self, mover: SpanMover, workers: Workers, homes: Mapping[int, int], loading: SpanLoading
    ) -> None:
        self._mover, self._workers, self._homes, self._loading = mover, workers, homes, loading
        self._ahead: list[tuple[Family, Node, Pages]] | None = None  # to be sent before all stands still
        self._sent: set[Node] = set()
        self._num_bytes = 0

    def send_ahead(self) -> bool:
        """Send some of the pages that are never written again; whether there are more."""
        self._loading.check()
        executors = self._workers.executors
        if self._ahead is None:
            self._ahead = [
                (family, node, pages)
                for family in executors
                for node, pages in self._choose(family).nodes.items()
            ][::-1]
        chosen: dict[Family, list[Pages]] = defaultdict(list)
        left = _AHEAD_S
        while self._ahead and left > 0:
            family, node, pages = self._ahead.pop()
            if node.tree.nodes.get(node.key) is node:  # it may have been evicted
                chosen[family].append(pages)
                self._sent.add(node)
                left -= self._seconds(family, pages)
        for family, parts in chosen.items():
            self._send(family, joined(parts))
        return bool(self._ahead)

    def go_over(self, load_seconds: float) -> Moved:
        """Send what is left, and have all workers go over to the new homes."""
        self._loading.check()
        start, workers, mover = time.monotonic(), self._workers, self._mover
        mover.before()
        found = {family: self._choose(family) for family in workers.executors}
        for family, moves in found.items():
            self._send(family, moves.unsent(self._sent))
        workers.group.go_over(self._new_homes())
        pages = anew = dropped = 0
        for family, moves in found.items():
            going = moves.all_pages()
            workers.executors[family].go_over(*going)
            for seq in moves.anew:
                mover.scheduler.put_back(seq)
            dropped += forget(mover.zoo().caches[family], moves.dropped)
            pages, anew = pages + going[0].size, anew + len(moves.anew)
        still_seconds = time.monotonic() - start
        return Moved(dict(self._homes), load_seconds, still_seconds, pages, self._num_bytes, anew, dropped)

    def _new_homes(self) -> list[int]:
        homes = list(self._workers.group.plan.homes)
        for span, worker in self._homes.items():
            homes[span] = worker
        return homes

    def _choose(self, family: Family) -> KVMoves:
        """What becomes of a family's pages."""
        zoo, executor = self._mover.zoo(), self._workers.executors[family]
        moves: dict[int, LayerMoves] = {}
        for name, index in zoo.topology.chain_of_model.items():
            chain = zoo.topology.chains[index]
            before, after = executor.layer_homes(index), executor.layer_homes(index, self._new_homes())
            layers = np.flatnonzero(before != after)
            if chain.family == family and layers.size:
                link = np.array(self._workers.link_byte_s)[before[layers], after[layers]]
                token_s = self._mover.token_seconds(name)
                if token_s is None:
                    spans = self._workers.task.spans
                    first, originals = self._workers.leaders, zoo.topology.originals
                    token_s = sum(spans[str(first[originals[use.span]])].seconds for use in chain.uses)
                page_s = self._workers.page_bytes[family] * link
                moves[index] = LayerMoves(chain.segments, layers, after[layers], page_s, token_s)
        cache = zoo.caches[family]
        running = [seq for seq in self._mover.scheduler.running if seq.cache is cache]
        return choose_moves(cache.tree, running, moves, self._sent, cache.published.pins())

    def _seconds(self, family: Family, pages: Pages) -> float:
        """That pages are thought to be on the wire."""
        links = np.array(self._workers.link_byte_s)
        sources = self._workers.executors[family].owners(pages[0])
        return float(links[sources, pages[1]].sum()) * self._workers.page_bytes[family]

    def _send(self, family: Family, pages: Pages) -> None:
        """Send pages, and learn from that what a link costs."""
        ids, workers = pages
        if not ids.size:
            return
        executor, start = self._workers.executors[family], time.monotonic()
        sources = executor.owners(ids)
        executor.send_pages(ids, workers)
        num_bytes = ids.size * self._workers.page_bytes[family]
        self._num_bytes += num_bytes
        if num_bytes >= _LEAST_MEASURED:
            byte_s = (time.monotonic() - start) / num_bytes
            for source, target in set(zip(sources.tolist(), workers.tolist(), strict=True)):
                self._workers.link_byte_s[source][target] = byte_s


def check_owners(zoo: LoadedZoo, workers: Workers, sequences: Sequence[TokenSequence]) -> None:
    """Check that what running sequences and the prefix trees hold lies where its layers are.

    Raises IntegrityError: a bug of ours.
    """
    for family, executor in workers.executors.items():
        cache, homes = zoo.caches[family], _segment_homes(zoo, family, executor)
        held = [(node.pages, homes[t.segment]) for t in cache.tree.segments for node in t.nodes.values()]
        for seq in sequences:
            if seq.cache is cache:
                written = (seq.num_computed if not seq.copied_from else 0) // PAGE_TOKENS
                for column in range(seq.num_tree_pages, written):
                    held.append((seq.page_table[:, column], executor.layer_homes(seq.chain_index)))
        for pages, workers_of in held:
            found = executor.owners(pages)
            if not np.array_equal(found, workers_of):
                raise IntegrityError(
                    f"pages {pages.tolist()} are in {found.tolist()}, not {workers_of.tolist()}"
                )


def _segment_homes(
    zoo: LoadedZoo, family: Family, executor: DistributedExecutor
) -> dict[Segment, np.ndarray]:
    """The workers of the layers of each segment, which are the same for all chains that have it."""
    homes: dict[Segment, np.ndarray] = {}
    for index, chain in enumerate(zoo.topology.chains):
        if chain.family == family:
            own = executor.layer_homes(index)
            for segment in chain.segments:
                part = own[segment.first_layer : segment.end_layer]
                if not np.array_equal(homes.setdefault(segment, part), part):
                    raise IntegrityError(f"chains that share {segment} have it in different workers")
    return homes
