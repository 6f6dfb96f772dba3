"""Spans that go from worker to worker while requests run.

    the new worker reads and compiles them, beside the steps -> between two steps: K and V are sent over or
    given up -> all workers go over to the new homes

Until the last step nothing has changed: where something goes wrong before, spans stay where they are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.exec.interface import KVLostError
from blockzoo.runtime.exec.topology import Family
from blockzoo.runtime.kv.pool import IntegrityError
from blockzoo.runtime.kv.sequence import Segment, TokenSequence
from blockzoo.runtime.serve.between_steps import BetweenSteps
from blockzoo.runtime.serve.kv_moves import KVMoves, LayerMoves, choose_moves, forget
from blockzoo.runtime.serve.loaded import LoadedZoo
from blockzoo.runtime.serve.over_workers import Workers
from blockzoo.runtime.serve.scheduler import Scheduler
from blockzoo.runtime.workers.distributed import DistributedExecutor
from blockzoo.runtime.workers.group import UnloadableError

_LOOK_EVERY_S = 0.05
_MOST_LOADING_S = 600.0
_LEAST_MEASURED = 1 << 20  # bytes over a link that tell how fast it is


class MoveError(RuntimeError):
    """Spans stay where they are; why."""


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


class SpanMover:
    """Moves spans of an engine's workers; from any thread, one at a time.

    Args:
        between: where its state may be changed.
        zoo: what is loaded now.
        scheduler: of the requests.
        token_seconds: that a token of a model's prompt takes; None: not known.
        before: is called before K and V move, of what is not among the scheduler's sequences.
    """

    def __init__(
        self,
        between: BetweenSteps,
        zoo: Callable[[], LoadedZoo],
        scheduler: Scheduler,
        token_seconds: Callable[[str], float | None],
        before: Callable[[], None],
    ) -> None:
        self._between, self._zoo, self._scheduler = between, zoo, scheduler
        self._token_seconds, self._before = token_seconds, before
        self.stop = Event()

    def move(self, homes: Mapping[int, int]) -> Moved:
        """Move spans, by index, to workers.

        Raises:
            MoveError: they stay where they are.
        """
        workers = self._workers_now()
        targets: dict[int, list[int]] = defaultdict(list)
        for span, worker in homes.items():
            targets[worker].append(span)
        start, restarts = time.monotonic(), workers.group.num_restarts

        def check() -> None:
            if self._zoo().workers is not workers:
                raise MoveError("the zoo has changed meanwhile, and other workers serve it")
            if workers.group.num_restarts != restarts:
                raise MoveError("a worker was lost meanwhile, and started again")
            if self.stop.is_set():
                raise MoveError("the engine is closed")

        def begin() -> None:
            check()
            for worker, spans in targets.items():
                workers.group.load(worker, spans)

        def has_loaded() -> bool:
            check()
            return workers.group.has_loaded(targets)

        def finish() -> Moved:
            check()
            return self._go_over(workers, homes, time.monotonic() - start)

        try:
            self._between.run(begin)
            while not self._between.run(has_loaded):
                if time.monotonic() - start > _MOST_LOADING_S:
                    raise MoveError(f"a worker had not compiled its spans after {_MOST_LOADING_S:g} s")
                self.stop.wait(_LOOK_EVERY_S)
            return self._between.run(finish)
        except UnloadableError as error:
            raise MoveError(f"spans {error.problems} cannot be loaded") from error
        except KVLostError as error:  # who steps next starts it again
            raise MoveError(f"{error}") from error

    def _workers_now(self) -> Workers:
        workers = self._zoo().workers
        if workers is None:
            raise MoveError("the engines are in this process")
        return workers

    def _go_over(self, workers: Workers, homes: Mapping[int, int], load_seconds: float) -> Moved:
        start, zoo = time.monotonic(), self._zoo()
        now = list(workers.group.plan.homes)
        for span, worker in homes.items():
            now[span] = worker
        self._before()
        found = {
            family: self._choose(workers, zoo, family, executor, now)
            for family, executor in workers.executors.items()
        }
        num_bytes = sum(
            self._send(workers, executor, found[family], workers.page_bytes[family])
            for family, executor in workers.executors.items()
        )
        workers.group.go_over(now)
        dropped = 0
        for family, executor in workers.executors.items():
            executor.go_over(found[family].pages, found[family].workers)
            for seq in found[family].anew:
                self._scheduler.put_back(seq)
            dropped += forget(zoo.caches[family], found[family].dropped)
        return Moved(
            dict(homes),
            load_seconds,
            time.monotonic() - start,
            sum(each.pages.size for each in found.values()),
            num_bytes,
            sum(len(each.anew) for each in found.values()),
            dropped,
        )

    def _choose(
        self,
        workers: Workers,
        zoo: LoadedZoo,
        family: Family,
        executor: DistributedExecutor,
        homes: Sequence[int],
    ) -> KVMoves:
        """What becomes of a family's pages."""
        token_s: dict[int, float] = {}
        for name, index in zoo.topology.chain_of_model.items():
            known = self._token_seconds(name)
            spans = workers.task.spans
            guess = sum(spans[str(use.span)].seconds for use in zoo.topology.chains[index].uses)
            token_s[index] = guess if known is None else known
        moves: dict[int, LayerMoves] = {}
        for index, chain in enumerate(zoo.topology.chains):
            if chain.family == family:
                before, after = executor.layer_homes(index), executor.layer_homes(index, homes)
                layers = np.flatnonzero(before != after)
                if layers.size:
                    link = np.array(workers.link_byte_s)
                    page_s = workers.page_bytes[family] * link[before[layers], after[layers]]
                    moves[index] = LayerMoves(chain.segments, layers, after[layers], page_s, token_s[index])
        cache = zoo.caches[family]
        running = [seq for seq in self._scheduler.running if seq.cache is cache]
        found = choose_moves(cache.tree, running, moves)
        owners = executor.owners(found.pages)
        there = (owners >= 0) & (owners != found.workers)  # others are not written yet
        found.pages, found.workers = found.pages[there], found.workers[there]
        return found

    def _send(self, workers: Workers, executor: DistributedExecutor, found: KVMoves, page_bytes: int) -> int:
        """Send pages; how many bytes they have. From that is learnt what a link costs."""
        if not found.pages.size:
            return 0
        start, num_bytes = time.monotonic(), found.pages.size * page_bytes
        sources = executor.owners(found.pages)
        executor.send_pages(found.pages, found.workers)
        if num_bytes >= _LEAST_MEASURED:
            byte_s = (time.monotonic() - start) / num_bytes
            for source, target in set(zip(sources.tolist(), found.workers.tolist(), strict=True)):
                workers.link_byte_s[source][target] = byte_s
        return num_bytes


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
