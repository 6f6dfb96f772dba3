"""Which tokens of which sequences run in the next step: continuous batching with chunked prefill.

    add -> waiting --admit--> running --finish--> gone
              ^                  |
              +---- preempt -----+        (its pages are released; it recomputes what is not cached)

It touches ints only. It does not know models beyond their sequences' caches, nor sampling, nor engines.

Tenants share by weight what they all want; what one leaves is lent to the others, so nothing lies idle:

- **Waiting room**: `tenants.check_queue`.
- **Running sequences**, max-min fair. A free slot goes to the tenant with the fewest running by weight, whose
  latest admission is longest ago. Where slots or pages lack, the youngest of the tenant with the most gives
  way (its KV stays cached), as long as that leaves it no worse off than the one who comes. So a newcomer is
  in at the next step whatever others run, and no two tenants ever take from each other in turn.
- **Prefill rows**, by deficit round robin (Shreedhar and Varghese, 1996), a step being a round: each tenant
  that has prompts to compute gets its share of the step's rows and keeps what it has not used, up to a step's
  and a page (and owes no more); without work it keeps nothing. Who is owed a whole step comes first in it.
  What is left goes to whom most is owed, on account where others want it too.
- **First tokens.** A step in which a prompt of a tenant ends leaves out those that run more than it and have
  more waiting, so that it is short; but never two steps in a row.

Counting service at the end of each token for all time (VTC: Sheng et al., "Fairness in Serving LLMs", 2024)
would make a tenant wait for having used what nobody else wanted. Under "fair" nothing above looks at what is
cached: neither who comes next, nor who gives way.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import TokenSequence
from blockzoo.runtime.serve.admission_order import AdmissionOrder
from blockzoo.runtime.serve.config import MAX_PROMPT_LOGITS, SchedulerConfig
from blockzoo.runtime.serve.step_pace import StepPace
from blockzoo.runtime.serve.tenants import Entry, Tenant, check_queue


class Scheduled(NamedTuple):
    """Run the next `num_tokens` tokens of `seq`, from seq.num_computed on; its pages are reserved."""

    seq: TokenSequence
    num_tokens: int


class Failed(NamedTuple):
    """A sequence that can never run, and why; the scheduler has forgotten it."""

    seq: TokenSequence
    message: str


@dataclass(slots=True)
class _Step:
    """One schedule() in the making."""

    budget: int  # tokens
    logits: int = MAX_PROMPT_LOGITS  # rows of them for tokens of prompts
    seconds: float = math.inf  # for prefills, where others would wait for them
    decodes: dict[Entry, int] = field(default_factory=dict)  # tokens: 1
    prefills: dict[Entry, int] = field(default_factory=dict)  # tokens
    tenants: dict[Tenant, TokenSequence] = field(default_factory=dict)  # who has prefill, and one of it
    unfilled: dict[Tenant, list[Entry]] = field(default_factory=dict)  # by tenant, what runs and has prefill
    rows: Counter[Tenant] = field(default_factory=Counter)  # of prefill
    endings: list[tuple[Tenant, float]] = field(default_factory=list)  # of prompts: whose, and its `served`
    queues: dict[Tenant, Iterator[Entry]] = field(default_factory=dict)  # candidates not yet tried
    idle: set[Tenant] = field(default_factory=set)  # who can use no more in this step
    full: set[KVCache] = field(default_factory=set)  # caches that admit no one more in this step


class Scheduler:
    """Decode first, then chunked prefill within the token budget, running sequences before new ones."""

    def __init__(
        self,
        config: SchedulerConfig,
        clock: Callable[[], float] = time.monotonic,
        pace: StepPace | None = None,
        give_back: Callable[[KVCache], bool] = lambda cache: False,
    ) -> None:
        """`pace`: what max_step_seconds is measured by; None: steps are bounded in tokens alone. `give_back`:
        frees pages that can be done without, before anybody is preempted; False where it had none."""
        self.config = config
        self.failed: list[Failed] = []  # since the caller last took them (take_failed)
        self.num_preemptions = 0
        self.spare_rows = 0  # that the last schedule() left, with logits each
        self._pace, self._give_back = pace, give_back
        self._order = AdmissionOrder(config, clock)
        self._entries: dict[str, Entry] = {}  # by request id
        self._running: list[Entry] = []  # by age
        self._tenants: dict[str, Tenant] = {}  # those that have sequences
        self._num_added = 0
        self._num_admitted = 0
        self._left_out = False  # whether the step before was one without some tenants

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission, new or preempted."""
        return len(self._entries) - len(self._running)

    @property
    def running(self) -> list[TokenSequence]:
        """The sequences that hold pages, the oldest first."""
        return [entry.seq for entry in self._running]

    def by_model(self) -> tuple[dict[str, int], dict[str, int]]:
        """How many sequences of each model that has any run, and wait."""
        running, waiting = Counter[str](), Counter[str]()
        for entry in list(self._entries.values()):
            (running if entry.running else waiting)[entry.seq.model] += 1
        return dict(running), dict(waiting)

    def has_unfinished(self) -> bool:
        """Whether schedule() or take_failed() may still have something to give."""
        return bool(self._entries or self.failed)

    # ---- in and out

    def add(self, seq: TokenSequence) -> None:
        """Queue a new sequence. Raises OverloadedError when its tenant's share of the queue is full.

        One that could not fit even with all pages to itself goes to `failed`.
        """
        if seq.request_id in self._entries:
            raise InvalidRequestError(f"request id {seq.request_id!r} is in use: give each request its own")
        held = {name: tenant.num_waiting for name, tenant in self._tenants.items()}
        tenant = self._tenants.get(seq.tenant)
        weight = self._weight_of(seq, tenant)
        weights = {name: tenant.weight for name, tenant in self._tenants.items()} | {seq.tenant: weight}
        check_queue(seq.tenant, held, self.config.max_waiting, weights)
        if not seq.cache.can_ever_hold(seq):
            self._fail(seq)
            return
        if tenant is None:
            tenant = self._tenants[seq.tenant] = Tenant(seq.tenant, weight, self._num_admitted)
        tenant.weight = weight
        entry = Entry(seq, tenant, (seq.arrival, self._num_added))
        self._num_added += 1
        self._entries[seq.request_id] = entry
        tenant.waiting[entry] = None
        self._order.on_added(entry)

    def _weight_of(self, seq: TokenSequence, tenant: Tenant | None) -> float:
        """What came last with a request, else what the tenant has."""
        if seq.weight is not None:
            return seq.weight
        return self.config.tenant_weights.get(seq.tenant, 1.0) if tenant is None else tenant.weight

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

    def put_back(self, seq: TokenSequence) -> None:
        """Let a sequence that runs wait again, as if others had taken its pages; what is cached stays so."""
        entry = self._entries[seq.request_id]
        if entry.running:
            self._preempt(_Step(0), entry)

    # ---- a step

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's work and reserve its pages. Empty when nothing can run."""
        step = _Step(self.config.max_num_batched_tokens)
        self._order.begin_step()
        for entry in self._running.copy():
            seq = entry.seq
            if seq.num_uncomputed > 1:
                step.unfilled.setdefault(entry.tenant, []).append(entry)
            elif entry.running:  # not preempted for an older one just now
                assert seq.num_uncomputed == 1, f"{seq}: append a token or finish it before the step"
                if self._make_room(step, entry, seq.num_tokens):
                    step.decodes[entry] = 1
                    step.budget -= 1
        self._schedule_refresh(step)
        self._begin_round(step)
        budget = step.budget
        for tenant in sorted(step.tenants, key=lambda t: (t.deficit < budget, _slot_order(t))):
            if tenant.deficit >= min(PAGE_TOKENS, step.budget):  # less than a page is not worth a row
                self._take_turn(step, tenant, tenant.deficit)
        self._lend(step)
        left_out = {tenant for tenant in self._tenants.values() if self._is_left_out(step, tenant)}
        decodes = {entry: rows for entry, rows in step.decodes.items() if entry.tenant not in left_out}
        self._left_out = bool(left_out)
        self.spare_rows = min(step.budget, step.logits)
        chosen = decodes | step.prefills
        return [Scheduled(entry.seq, num_tokens) for entry, num_tokens in chosen.items()]

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

    # ---- drafts

    def draft(self, seq: TokenSequence, token_ids: Sequence[int]) -> None:
        """Have the step that was scheduled run tokens too that may follow the last one of `seq`, as long as
        pages can be had without taking anybody's."""
        assert seq.num_uncomputed == 1, f"{seq} has others to compute"
        if len(token_ids) <= self.spare_rows and seq.cache.reserve(seq, seq.num_tokens + len(token_ids)):
            seq.drafted = tuple(token_ids)
            self.spare_rows -= len(token_ids)

    @staticmethod
    def keep_drafted(seq: TokenSequence) -> None:
        """The last token of `seq` was drafted, and is right: its KV is written."""
        seq.num_computed += 1
        seq.cache.commit(seq)

    @staticmethod
    def end_draft(seq: TokenSequence) -> None:
        """Whatever else was drafted is not what follows: take back its pages."""
        seq.drafted = ()
        seq.cache.give_back(seq)

    def _schedule_refresh(self, step: _Step) -> None:
        """Beside their new tokens, sequences with approximate KV compute some of it anew."""
        for entry in self._running:
            approx = entry.seq.approx
            if approx is not None:
                room = max(0, step.budget) if entry in step.decodes else 0
                approx.num_refreshing = min(approx.stale.size, approx.config.refresh, room)
                step.budget -= approx.num_refreshing

    # ---- prefill: a round over the tenants

    def _begin_round(self, step: _Step) -> None:
        """See who has prefill to do, and let their deficits grow by their shares of the step."""
        for tenant in self._tenants.values():
            some = next(chain(step.unfilled.get(tenant, ()), tenant.preempted, tenant.waiting), None)
            if some is None:
                tenant.deficit = 0.0
            else:
                step.tenants[tenant] = some.seq
        if step.decodes or len(step.tenants) > 1:
            step.seconds = self.config.max_step_seconds or math.inf
        weights = sum(tenant.weight for tenant in step.tenants)
        for tenant, seq in step.tenants.items():
            rows = min(step.budget, self._rows_within(step, seq))
            deficit, bound = tenant.deficit + rows * tenant.weight / weights, rows + PAGE_TOKENS
            tenant.deficit = max(-bound, min(deficit, bound))

    def _lend(self, step: _Step) -> None:
        """Give out what is left of the step, first to whom most is owed."""
        left, goes_on = list(step.tenants), True
        while left and goes_on:
            goes_on = False
            for tenant in sorted(left, key=lambda tenant: (-tenant.deficit / tenant.weight, tenant.served)):
                weights = sum(each.weight for each in left if each not in step.idle)
                share = step.budget * tenant.weight / weights
                goes_on |= self._take_turn(step, tenant, max(PAGE_TOKENS, share, tenant.deficit), last=True)
            left = [tenant for tenant in left if tenant not in step.idle]

    def _take_turn(self, step: _Step, tenant: Tenant, limit: float, last: bool = False) -> bool:
        """Let a tenant have so many rows of prefill more: for what it runs, then for who waits.

        Where it uses none, and not because others are to be admitted first, it is idle if the limit was the
        `last` it could hope for. Returns whether anything has changed.
        """
        before = step.rows[tenant]
        in_time = self._rows_within(step, step.tenants[tenant])
        goal = before + min(int(limit), step.budget, in_time)
        if self._is_left_out(step, tenant):
            goal = before
        for entry in step.unfilled.get(tenant, ()):
            if entry.running and step.rows[tenant] < goal:
                if entry not in step.prefills:
                    entry.seq.cache.extend(entry.seq)
                self._schedule_prefill(step, entry, goal - step.rows[tenant])
        while (
            self._is_worth_a_row(step, goal - step.rows[tenant])
            and tenant.num_waiting
            and self._may_have_a_slot(tenant)
        ):
            if self._comes_later(step, tenant):
                last = False
                break
            if not self._admit_one(step, tenant, goal):
                break
        used = step.rows[tenant] - before
        rivals = (t for t in step.tenants if t is not tenant)
        is_wanted = any(t not in step.idle or self._is_left_out(step, t) for t in rivals)
        floor = -math.inf if is_wanted else min(0.0, tenant.deficit)  # what nobody else wants is free
        tenant.deficit = max(floor, tenant.deficit - used)
        if last and used <= 0:
            step.idle.add(tenant)
        return used > 0 or tenant in step.idle

    def _is_left_out(self, step: _Step, tenant: Tenant) -> bool:
        """Whether the step goes without a tenant, for the first token of one that runs less."""
        if self._left_out or not tenant.num_waiting:
            return False
        return any(other is not tenant and served < tenant.served for other, served in step.endings)

    def _rows_within(self, step: _Step, seq: TokenSequence) -> int:
        """Rows of `seq` that the step still has time for: never less than a page of progress."""
        if self._pace is None or step.seconds == math.inf:
            return step.budget
        rows = self._pace.tokens_within(seq.model, step.seconds)
        return rows if step.prefills else max(PAGE_TOKENS, rows)

    def _schedule_prefill(self, step: _Step, entry: Entry, limit: int) -> None:
        """Run up to `limit` rows of a prompt, on top of what the step runs of it already."""
        seq, before = entry.seq, step.prefills.get(entry, 0)
        most = before + min(limit, step.budget, self._rows_within(step, seq))
        logits_before = seq.num_prompt_logits(seq.num_computed + before)
        if seq.lacks_prompt_logits:
            most = min(most, max(0, seq.logits_from - seq.num_computed) + logits_before + step.logits)
        rows, end = seq.num_uncomputed, seq.num_tokens
        if rows > most:
            rows, end = most, seq.end_after(most)
            border = end - end % PAGE_TOKENS
            # not at the price of half the step
            if seq.approx is None and 2 * (border - seq.num_computed) >= most:
                rows, end = border - seq.num_computed, border
        if rows <= before or not self._make_room(step, entry, end):
            return
        if step.seconds != math.inf and self._pace is not None:
            step.seconds -= (rows - before) * (self._pace.seconds_per_token(seq.model) or step.seconds)
        step.prefills[entry] = rows
        step.logits -= seq.num_prompt_logits(seq.num_computed + rows) - logits_before
        step.budget -= rows - before
        step.rows[entry.tenant] += rows - before
        if end == seq.num_tokens:
            step.endings.append((entry.tenant, entry.tenant.served))

    # ---- pages

    def _make_room(self, step: _Step, entry: Entry, num_tokens: int) -> bool:
        """Reserve pages, preempting others; False when `entry` itself had to go.

        Of the tenant that has most sequences in the cache by weight, the youngest goes; where none has more
        than one, the youngest of all. So the oldest of all is never preempted, and comes to its end.
        """
        cache = entry.seq.cache
        while not cache.reserve(entry.seq, num_tokens):
            if self._give_back(cache):
                continue
            same_cache = [other for other in self._running if other.seq.cache is cache]
            if len(same_cache) == 1:  # all other pages are free or evictable, and still it does not fit
                step.prefills.pop(entry, None)
                self._forget(entry)
                self._fail(entry.seq)
                return False
            counts = Counter(other.tenant for other in same_cache)
            shares = {t: count / t.weight if count > 1 else 0.0 for t, count in counts.items()}
            self._preempt(step, max(same_cache, key=lambda other: (shares[other.tenant], other.age)))
            if not entry.running:
                return False
        return True

    def _preempt(self, step: _Step, entry: Entry) -> None:
        step.decodes.pop(entry, None)
        rows = step.prefills.pop(entry, 0)
        step.budget += rows
        step.logits += entry.seq.num_prompt_logits(entry.seq.num_computed + rows)
        step.rows[entry.tenant] -= rows
        entry.seq.cache.release(entry.seq)
        entry.seq.num_preemptions += 1
        entry.running = False
        self._running.remove(entry)
        entry.tenant.running.remove(entry)
        insort(entry.tenant.preempted, entry)
        self.num_preemptions += 1

    # ---- admission

    @staticmethod
    def _is_worth_a_row(step: _Step, rows: int) -> bool:
        # Beside other prefills a scrap of a page is not worth a row in the batch.
        return rows >= (PAGE_TOKENS if step.prefills else 1)

    def _may_have_a_slot(self, tenant: Tenant) -> bool:
        if len(self._running) < self.config.max_num_seqs:
            return True
        return any(tenant.may_take_from(other) for other in self._tenants.values() if other is not tenant)

    def _comes_later(self, step: _Step, tenant: Tenant) -> bool:
        """Whether others, which may still get something in this step, come before it for what there is."""
        others = (t for t in self._tenants.values() if t.num_waiting and t not in step.idle)
        before = [other for other in others if _slot_order(other) < _slot_order(tenant)]
        free = self.config.max_num_seqs - len(self._running)
        return len(before) >= max(1, free) or any(other.lacks_pages for other in before)

    def _admit_one(self, step: _Step, tenant: Tenant, goal: int) -> bool:
        """Admit the tenant's next sequence that can be, and run some of it; False where none can be."""
        if step.full and {e.seq.cache for e in (*tenant.preempted, *tenant.waiting)} <= step.full:
            return False
        if tenant not in step.queues:
            step.queues[tenant] = self._order.of(tenant)
        for entry in step.queues[tenant]:
            if self._try_admit(step, entry):
                step.unfilled.setdefault(tenant, []).append(entry)
                self._schedule_prefill(step, entry, goal - step.rows[tenant])
                return True
        return False

    def _try_admit(self, step: _Step, entry: Entry) -> bool:
        seq, cache, tenant = entry.seq, entry.seq.cache, entry.tenant
        if cache in step.full:
            return False
        while not cache.can_begin(seq, spare_pages := self._spare_pages(cache)):
            if self._give_back(cache):
                continue
            other = self._who_gives_way(tenant, cache)
            if other is not None:
                self._preempt(step, other)
            elif any(each.seq.cache is cache for each in self._running):
                step.full.add(cache)  # who comes later must not overtake it
                tenant.lacks_pages = True
                return False
            else:
                self._forget(entry)  # what is not free now is published and will not be
                self._fail(seq)
                return False
        if len(self._running) >= self.config.max_num_seqs:
            other = self._who_gives_way(tenant, None)
            if other is None:
                return False
            self._preempt(step, other)
        if entry in tenant.waiting:
            del tenant.waiting[entry]
        else:
            tenant.preempted.remove(entry)
        entry.running = True
        insort(self._running, entry)
        insort(tenant.running, entry)
        self._num_admitted += 1
        tenant.last_admitted = self._num_admitted
        tenant.lacks_pages = False
        cache.begin(seq)
        if not cache.borrow(seq, spare_pages):
            cache.copy_partial(seq, spare_pages)
        return True

    def _who_gives_way(self, tenant: Tenant, cache: KVCache | None) -> Entry | None:
        """The youngest of the tenant that has most, of those that a newcomer may take from; None: nobody.

        `cache`: only sequences that hold pages of it. KV that is not exact is not cached, so that goes last.
        """
        best: tuple[float, bool, Entry] | None = None
        for other in self._tenants.values():
            if other is tenant or not tenant.may_take_from(other):
                continue
            for entry in other.running:
                if cache is None or entry.seq.cache is cache:
                    found = (other.served, entry.seq.approx is None, entry)
                    best = found if best is None else max(best, found)
        return None if best is None else best[-1]

    def _spare_pages(self, cache: KVCache) -> int:
        """Pages that running sequences will soon need: the rest of their prompts, and one page ahead."""
        running = [entry.seq for entry in self._running if entry.seq.cache is cache]
        return sum(cache.missing_pages(seq, seq.num_tokens + PAGE_TOKENS) for seq in running)

    # ---- leaving

    def _forget(self, entry: Entry) -> None:
        tenant = entry.tenant
        del self._entries[entry.seq.request_id]
        if entry.running:
            entry.running = False
            self._running.remove(entry)
            tenant.running.remove(entry)
            entry.seq.cache.release(entry.seq)
        elif entry in tenant.waiting:
            del tenant.waiting[entry]
        else:
            tenant.preempted.remove(entry)
        if not tenant.running and not tenant.num_waiting:
            del self._tenants[tenant.name]

    def _fail(self, seq: TokenSequence) -> None:
        total, published = seq.cache.pool.num_pages, seq.cache.published.num_pages
        most = (total - published) // seq.num_layers * PAGE_TOKENS
        pages = f"{total} pages" + (f", less {published} of published documents," if published else "")
        message = (
            f"{seq.num_tokens} tokens (prompt {seq.prompt_len}) of model {seq.model!r} do not fit in the KV "
            f"cache: its {pages} hold {most} tokens of one sequence of {seq.num_layers} layers; "
            "shorten the prompt, lower max_tokens or raise kv_cache_bytes"
        )
        self.failed.append(Failed(seq, message))


def _slot_order(tenant: Tenant) -> tuple[float, int]:
    """Who comes first for a slot: unequal for any two that have been admitted."""
    return tenant.served, tenant.last_admitted
