"""The executor whose engines are in workers: the same steps as `Executor`, with the same answers.

    batch -> micro-batches -> rows to all workers that they go through -> logits from those that have heads

Page ids mean the same in all pools: a page belongs to the worker whose layers have written it last. Before
another one's use it, its memory is given back there, so that all pools together take what one would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from blockzoo.engines.arrays import Arrays
from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.exec.adapters import AdapterUnavailableError
from blockzoo.runtime.exec.executor import StepResult
from blockzoo.runtime.exec.kv_tensors import KVTensors
from blockzoo.runtime.exec.rows import RowChecks, Rows
from blockzoo.runtime.exec.topology import ChainPlan, Family
from blockzoo.runtime.workers.group import WorkerGroup
from blockzoo.runtime.workers.micro_batches import MicroBatch, micro_batches
from blockzoo.runtime.workers.remote_pages import RemotePages
from blockzoo.runtime.workers.seen import Seen
from blockzoo.runtime.workers.settings import MOST_MICRO_BATCHES, WorkerPlan
from blockzoo.runtime.workers.wire import STEP, pack_hidden, pack_rows

LEAST_ROWS = 128
"""Of a micro-batch: the weights that it reads are read anew for each."""


MOVED_PAGES = 64
"""At a time, from worker to worker: as many again wait where they come from."""


class PartError(RuntimeError):
    """A worker failed in a step; it runs on."""


class DistributedExecutor:
    """Runs steps of the models of one family over workers. See `Executor`, whose place it takes.

    Args:
        family: of the models.
        chains: of the whole topology.
        group: the workers.
        check: of rows.
        arrays: of a maker of engines like theirs.
        cuts: whether large steps are cut, so that workers compute at the same time: where each has cores of
            its own. Else each has all of them in its turn.
    """

    def __init__(
        self,
        family: Family,
        chains: Sequence[ChainPlan],
        group: WorkerGroup,
        check: RowChecks,
        arrays: Arrays,
        cuts: bool = True,
    ) -> None:
        self.chains = tuple(chains)
        self._family, self._group, self._check = family, group, check
        self._number = group.plan.families.index(family)
        self._num_pages = group.plan.num_pages[family]
        self._mine = [index for index, chain in enumerate(chains) if chain.family == family]
        self._follow_homes()
        self._cuts = cuts and len(group.logits) > 1
        self._owners = np.full(self._num_pages, -1, np.int8)
        self._dtype = arrays.zeros((0,), "activation").dtype
        self.kv: KVTensors = RemotePages(
            family,
            self._num_pages,
            self._number,
            arrays,
            group,
            self._owners,
            self._take,
            lambda: self._layer_homes,
        )
        self._most_rows = 0

    def run(self, batch: Sequence[Rows]) -> StepResult:
        """Run a batch; K and V of all its rows are written when it returns.

        Raises: as `Executor.run`; KVLostError; PartError.
        """
        self._check(batch)
        step = self._group.next_step()
        self._give_pages(step, batch)
        least = LEAST_ROWS if self._cuts else 1 << 30
        return self._run(step, micro_batches(batch, least, MOST_MICRO_BATCHES))

    def is_sound(self, chain: int) -> bool:
        """Run one token through a chain, in no page of a sequence: whether its logits are finite."""
        table = np.full((self.chains[chain].num_layers, 1), self._num_pages, np.int32)
        rows = Rows(chain, np.zeros(1, np.int32), 0, table, 1)
        result = self._run(self._group.next_step(), [MicroBatch([rows], [0])])
        return all(bool(np.isfinite(logits).all()) for logits, _ in result.logits)

    def release_memory(self) -> None:
        """Have workers give back scratch, if a step was large enough for that to be worth it."""
        if self._most_rows > LEAST_ROWS:
            self._group.release_memory()
            self._most_rows = 0

    def forget_pages(self) -> None:
        """No page holds anything any more: workers give back the memory of all."""
        step, pages = self._group.next_step(), np.arange(self._num_pages, dtype=np.int32)
        for worker in range(len(self._group.logits)):
            self._group.send(worker, b"discard", STEP.pack(step, 0, self._number), pages.tobytes())
        self._owners[...] = -1

    # ---- spans that move

    def layer_homes(self, chain: int, homes: Sequence[int] | None = None) -> np.ndarray:
        """The worker of each layer of a chain, int8 [num_layers], of a surrogate those of its model: now, or
        with other homes of spans."""
        surrogates = self._group.plan.topology.models_of_surrogates()
        return _layer_homes(self.chains[surrogates.get(chain, chain)], self._group.plan, homes)

    def owners(self, pages: np.ndarray) -> np.ndarray:
        """The workers in which pages have been written last, int8; -1: in none."""
        return self._owners[pages]

    def send_pages(self, pages: np.ndarray, workers: np.ndarray) -> None:
        """Have pages, int32 [n], whole in other workers, int8 [n], too; between two steps.

        Raises KVLostError: some worker cannot answer any more.
        """
        step, sources = self._group.next_step(), self._owners[pages]
        involved = sorted({*sources.tolist(), *workers.tolist()})
        answers = self._group.answers(involved)
        targets = np.unique(workers).tolist()
        for worker in targets:  # once it answers, it has done all that it was told about these pages
            self._group.send(worker, b"expect", STEP.pack(step, 0, self._number))
        self._await_pages(step, answers, len(targets), 0)
        under_way = 0
        for source, target in sorted(set(zip(sources.tolist(), workers.tolist(), strict=True))):
            chosen = np.ascontiguousarray(pages[(sources == source) & (workers == target)], np.int32)
            for begin in range(0, chosen.size, MOVED_PAGES):
                piece = chosen[begin : begin + MOVED_PAGES]
                self._group.send(source, b"give", STEP.pack(step, target, self._number), piece.tobytes())
                under_way += piece.size
                under_way = self._await_pages(step, answers, under_way, MOVED_PAGES)
        self._await_pages(step, answers, under_way, 0)

    def _await_pages(
        self, step: int, answers: Iterator[tuple[int, str, Any]], under_way: int, most: int
    ) -> int:
        """Wait until at most so many pages are under way; how many are. No pages count as one."""
        while under_way > most:
            _, kind, what = next(answers)
            if kind == "took" and what["step"] == step:
                under_way -= what["pages"] or 1
        return under_way

    def go_over(self, pages: np.ndarray, workers: np.ndarray) -> None:
        """The group has gone over to other homes (`WorkerGroup.go_over`): routes are as those are, and pages
        belong to the workers that they were sent to (`send_pages`)."""
        self._follow_homes()
        self._take(self._group.next_step(), pages, workers)

    def follow(self, chains: Sequence[ChainPlan]) -> None:
        """The group has gone over to other copies of spans: chains are as they go now."""
        self.chains = self._check.chains = tuple(chains)
        self._follow_homes()

    def _follow_homes(self) -> None:
        self._routes: dict[tuple[int, int, int | None], frozenset[int]] = {}
        self._layer_homes = {index: self.layer_homes(index) for index in self._mine}

    # ---- pages

    def _give_pages(self, step: int, batch: Sequence[Rows]) -> None:
        """Note whose the pages are that the rows begin."""
        for rows in batch:
            first = -(-rows.past_len // PAGE_TOKENS)
            if first < rows.num_pages:
                pages = rows.page_table[:, first : rows.num_pages]
                owners = np.broadcast_to(self._layer_homes[rows.chain][:, None], pages.shape)
                self._take(step, pages.ravel(), owners.ravel())

    def _take(self, step: int, pages: np.ndarray, owners: np.ndarray) -> None:
        """Give pages to workers; those that had them give back the memory."""
        before = self._owners[pages]
        self._owners[pages] = owners
        moved = (before >= 0) & (before != owners)
        if not moved.any():
            return
        for worker in np.unique(before[moved]).tolist():
            gone = np.ascontiguousarray(pages[moved & (before == worker)], np.int32)
            self._group.send(worker, b"discard", STEP.pack(step, 0, self._number), gone.tobytes())

    # ---- steps

    def _run(self, step: int, parts: Sequence[MicroBatch]) -> StepResult:
        self._group.check()
        open_parts: dict[int, set[int]] = {}  # by micro-batch, the workers that have not done it
        for micro, part in enumerate(parts):
            route = frozenset().union(*(self._route(rows.chain, rows.entry, rows.exit) for rows in part.rows))
            which, data = STEP.pack(step, micro, self._number), pack_rows(part.rows)
            for worker in sorted(route):
                hidden = pack_hidden(part.rows, partial(self._begins_in, worker))
                self._group.send(worker, b"step", which, data, *hidden)
            open_parts[micro] = set(route)
            self._most_rows = max(self._most_rows, sum(len(rows.token_ids) for rows in part.rows))
        logits: dict[int, list[tuple[np.ndarray, list[int]]]] = defaultdict(list)
        seen = Seen(self._dtype, self._family.hidden_size)
        num_calls = num_rows = 0
        for worker, kind, what in self._group.answers(set().union(*open_parts.values())):
            if kind not in ("done", "error") or what["step"] != step:
                continue
            if kind == "error":
                raise self._error(worker, what)
            micro, members = what["micro"], parts[what["micro"]].members
            for begin, vocab, places in what["logits"]:
                rows = self._group.logits[worker][begin : begin + len(places) * vocab]
                logits[micro].append((rows.reshape(-1, vocab), [members[place] for place in places]))
            seen.note(what, members)
            num_calls, num_rows = num_calls + what["calls"], num_rows + what["rows"]
            open_parts[micro].discard(worker)
            if not any(open_parts.values()):
                break
        found = [item for micro in sorted(logits) for item in logits[micro]]
        return StepResult(found, num_calls, num_rows, seen.hidden(), seen.scores)

    def _route(self, chain: int, entry: int, leaves: int | None) -> frozenset[int]:
        """The workers of the spans through which rows go."""
        key = chain, entry, leaves
        if key not in self._routes:
            homes, uses = self._group.plan.homes, self.chains[chain].uses[entry:leaves]
            self._routes[key] = frozenset(homes[use.span] for use in uses)
        return self._routes[key]

    def _begins_in(self, worker: int, rows: Rows) -> bool:
        """Whether a worker has the first span through which rows go."""
        return self._group.plan.homes[self.chains[rows.chain].uses[rows.entry].span] == worker

    @staticmethod
    def _error(worker: int, what: Mapping[str, object]) -> Exception:
        if isinstance(what["chain"], int):
            return AdapterUnavailableError(what["chain"], str(what["message"]))
        return PartError(f"worker {worker}: {what['message']}")


def _layer_homes(chain: ChainPlan, plan: WorkerPlan, homes: Sequence[int] | None) -> np.ndarray:
    homes, spans = plan.homes if homes is None else homes, plan.topology.spans
    return np.array(
        [homes[use.span] for use in chain.uses for _ in range(spans[use.span].num_layers)], np.int8
    )
