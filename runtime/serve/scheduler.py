"""Which tokens of which sequences run in the next step: continuous batching with chunked prefill.

    add -> waiting --admit--> running --finish--> gone
              ^                  |
              +---- preempt -----+        (its pages are released; it recomputes what is not cached)

It touches ints only. It does not know models beyond their sequences' caches, nor sampling, nor engines.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.api.errors import InvalidRequestError, OverloadedError
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import TokenSequence
from blockzoo.runtime.serve.config import SchedulerConfig

PROBES_PER_STEP = 16  # waiting sequences whose expected cache hits are looked up again in one step


class Scheduled(NamedTuple):
    """Run the next `num_tokens` tokens of `seq`, from seq.num_computed on; its pages are reserved."""

    seq: TokenSequence
    num_tokens: int


class Failed(NamedTuple):
    """A sequence that can never run, and why; the scheduler has forgotten it."""

    seq: TokenSequence
    message: str


@dataclass(slots=True, eq=False)
class _Entry:
    """A sequence in the scheduler. Ordered by age: the older is admitted first, the youngest preempted."""

    seq: TokenSequence
    age: tuple[float, int]  # arrival, then order of add
    running: bool = False
    expected: int = 0  # tokens the cache would give, as of cache version `probed`
    probed: int = -1

    def __lt__(self, other: _Entry) -> bool:
        return self.age < other.age


@dataclass(slots=True)
class _Step:
    """One schedule() in the making."""

    budget: int  # tokens
    prefills: int = 0
    chosen: dict[_Entry, int] = field(default_factory=dict)  # tokens; decode before prefill
    full: set[KVCache] = field(default_factory=set)  # caches that admit no one more in this step


class Scheduler:
    """Decode first, then chunked prefill within the token budget, running sequences before new ones."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.failed: list[Failed] = []  # since the caller last took them (take_failed)
        self.num_preemptions = 0
        self._clock = clock
        self._entries: dict[str, _Entry] = {}  # by request id
        self._running: list[_Entry] = []  # by age
        self._preempted: list[_Entry] = []  # by age; admitted before any of _waiting
        self._waiting: OrderedDict[_Entry, None] = OrderedDict()  # whose probe is oldest first
        self._num_added = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission, new or preempted."""
        return len(self._preempted) + len(self._waiting)

    @property
    def running(self) -> list[TokenSequence]:
        """The sequences that hold pages, the oldest first."""
        return [entry.seq for entry in self._running]

    def has_unfinished(self) -> bool:
        """Whether schedule() or take_failed() may still have something to give."""
        return bool(self._entries or self.failed)

    # ---- in and out

    def add(self, seq: TokenSequence) -> None:
        """Queue a new sequence. Raises OverloadedError when the waiting queue is full.

        One that could not fit even with all pages to itself goes to `failed`.
        """
        if seq.request_id in self._entries:
            raise InvalidRequestError(f"request id {seq.request_id!r} is in use: give each request its own")
        if self.num_waiting >= self.config.max_waiting:
            raise OverloadedError(
                f"{self.num_waiting} requests are waiting already, the most allowed (max_waiting): "
                "send the request again later"
            )
        entry = _Entry(seq, (seq.arrival, self._num_added))
        self._num_added += 1
        if not seq.cache.can_ever_hold(seq):
            self._fail(entry)
            return
        self._entries[seq.request_id] = entry
        self._waiting[entry] = None
        if self.config.policy == "hit-first":
            self._probe(entry)

    def finish(self, seq: TokenSequence) -> None:
        """Forget a sequence and give back its pages."""
        found = self.abort(seq.request_id)
        assert found is seq, f"{seq} is not in the scheduler"

    def abort(self, request_id: str) -> TokenSequence | None:
        """Forget a sequence in whatever state and give back its pages; None when there is none."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        self._forget(entry)
        return entry.seq

    def take_failed(self) -> list[Failed]:
        """The sequences that failed since the last call."""
        failed, self.failed = self.failed, []
        return failed

    # ---- a step

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's work and reserve its pages. Empty when nothing can run."""
        step = _Step(self.config.max_num_batched_tokens)
        prefills = []
        for entry in self._running.copy():
            seq = entry.seq
            if seq.num_uncomputed > 1:
                prefills.append(entry)
            elif entry.running:  # not preempted for an older one just now
                assert seq.num_uncomputed == 1, f"{seq}: append a token or finish it before the step"
                if self._make_room(step, entry, seq.num_tokens):
                    step.chosen[entry] = 1
                    step.budget -= 1
        self._schedule_refresh(step)
        for entry in prefills:
            if entry.running and step.budget > 0:
                entry.seq.cache.extend(entry.seq)
                self._schedule_prefill(step, entry)
        self._admit(step)
        return [Scheduled(entry.seq, num_tokens) for entry, num_tokens in step.chosen.items()]

    def advance(self, scheduled: Iterable[Scheduled]) -> None:
        """Record that the engine has written the KV of `scheduled`, and cache the pages it filled."""
        for seq, num_tokens in scheduled:
            entry = self._entries.get(seq.request_id)
            if entry is None or entry.seq is not seq:
                continue  # aborted while the step ran
            seq.num_computed = seq.end_after(num_tokens)
            if seq.approx is not None:
                seq.approx.advance()
            seq.cache.commit(seq)

    def _schedule_refresh(self, step: _Step) -> None:
        """Beside their new tokens, sequences with approximate KV compute some of it anew."""
        for entry in self._running:
            approx = entry.seq.approx
            if approx is not None:
                room = max(0, step.budget) if entry in step.chosen else 0
                approx.num_refreshing = min(approx.stale.size, approx.config.refresh, room)
                step.budget -= approx.num_refreshing

    def _schedule_prefill(self, step: _Step, entry: _Entry) -> None:
        seq = entry.seq
        rows, end = seq.num_uncomputed, seq.num_tokens
        if rows > step.budget:
            rows = step.budget
            end = seq.end_after(rows)
            border = end - end % PAGE_TOKENS
            # not at the price of half the step
            if seq.approx is None and 2 * (border - seq.num_computed) >= step.budget:
                rows, end = border - seq.num_computed, border
        if self._make_room(step, entry, end):
            step.chosen[entry] = rows
            step.budget -= rows
            step.prefills += 1

    def _make_room(self, step: _Step, entry: _Entry, num_tokens: int) -> bool:
        """Reserve pages, preempting younger sequences; False when `entry` itself had to go."""
        cache = entry.seq.cache
        while not cache.reserve(entry.seq, num_tokens):
            same_cache = [other for other in self._running if other.seq.cache is cache]
            if len(same_cache) == 1:  # all other pages are free or evictable, and still it does not fit
                self._forget(entry)
                self._fail(entry)
                return False
            self._preempt(step, same_cache[-1])
            if not entry.running:
                return False
        return True

    def _preempt(self, step: _Step, entry: _Entry) -> None:
        step.chosen.pop(entry, None)
        entry.seq.cache.release(entry.seq)
        entry.seq.num_preemptions += 1
        entry.running = False
        self._running.remove(entry)
        insort(self._preempted, entry)
        self.num_preemptions += 1

    # ---- admission

    def _admit(self, step: _Step) -> None:
        if not self._may_admit(step):
            return
        for entry in self._preempted.copy():
            if self._may_admit(step):
                self._try_admit(step, entry)
        if not self._waiting or not self._may_admit(step):
            return
        queue = self._ordered_waiting()
        caches = {entry.seq.cache for entry in self._waiting}
        while queue and self._may_admit(step) and not caches <= step.full:
            self._try_admit(step, heapq.heappop(queue)[-1])

    def _may_admit(self, step: _Step) -> bool:
        # Beside other prefills a scrap of a page is not worth a row in the batch.
        budget_needed = PAGE_TOKENS if step.prefills else 1
        return step.budget >= budget_needed and len(self._running) < self.config.max_num_seqs

    def _try_admit(self, step: _Step, entry: _Entry) -> None:
        seq, cache = entry.seq, entry.seq.cache
        if cache in step.full:
            return
        spare_pages = self._spare_pages(cache)
        if not cache.can_begin(seq, spare_pages):
            if not any(other.seq.cache is cache for other in self._running):
                self._forget(entry)  # what is not free now is published and will not be
                self._fail(entry)
                return
            step.full.add(cache)  # who comes later must not overtake it
            return
        if entry in self._waiting:
            del self._waiting[entry]
        else:
            self._preempted.remove(entry)
        entry.running = True
        insort(self._running, entry)
        cache.begin(seq)
        if not cache.borrow(seq, spare_pages):
            cache.copy_partial(seq, spare_pages)
        self._schedule_prefill(step, entry)

    def _spare_pages(self, cache: KVCache) -> int:
        """Pages that running sequences will soon need: the rest of their prompts, and one page ahead."""
        running = [entry.seq for entry in self._running if entry.seq.cache is cache]
        return sum(cache.missing_pages(seq, seq.num_tokens + PAGE_TOKENS) for seq in running)

    def _ordered_waiting(self) -> list[tuple[float, float, int, _Entry]]:
        """A heap of the waiting: (rank, arrival, order of add, entry)."""
        if self.config.policy == "fair":
            queue = [(0.0, *entry.age, entry) for entry in self._waiting]
        else:
            self._refresh_probes()
            aged = self._clock() - self.config.ageing_s
            queue = [
                (float("-inf") if entry.age[0] < aged else -entry.expected, *entry.age, entry)
                for entry in self._waiting
            ]
        heapq.heapify(queue)
        return queue

    def _refresh_probes(self) -> None:
        """Look some outdated expectations up again, in turn: cheap with hundreds waiting, never far off."""
        for entry in list(islice(self._waiting, PROBES_PER_STEP)):
            self._probe(entry)
            self._waiting.move_to_end(entry)

    def _probe(self, entry: _Entry) -> None:
        cache = entry.seq.cache
        if entry.probed != cache.version:
            entry.expected = cache.probe(entry.seq)
            entry.probed = cache.version

    # ---- leaving

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.seq.request_id]
        if entry.running:
            entry.running = False
            self._running.remove(entry)
            entry.seq.cache.release(entry.seq)
        elif entry in self._waiting:
            del self._waiting[entry]
        else:
            self._preempted.remove(entry)

    def _fail(self, entry: _Entry) -> None:
        seq = entry.seq
        total, published = seq.cache.pool.num_pages, seq.cache.published.num_pages
        most = (total - published) // seq.num_layers * PAGE_TOKENS
        pages = f"{total} pages" + (f", less {published} of published documents," if published else "")
        message = (
            f"{seq.num_tokens} tokens (prompt {seq.prompt_len}) of model {seq.model!r} do not fit in the KV "
            f"cache: its {pages} hold {most} tokens of one sequence of {seq.num_layers} layers; "
            "shorten the prompt, lower max_tokens or raise kv_cache_bytes"
        )
        self.failed.append(Failed(seq, message))
