"""Several tenants in one scheduler: who gets slots, pages, prefill and a place in the queue. Ints only."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.api.errors import OverloadedError
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import Segment, TokenSequence
from blockzoo.runtime.serve.config import SchedulerConfig
from blockzoo.runtime.serve.scheduler import Scheduler
from blockzoo.runtime.serve.step_pace import StepPace
from blockzoo.runtime.serve.tenants import check_queue

LAYERS = (Segment(0, 1, "low"), Segment(1, 2, "high"))  # 2 pages per 32 tokens


class Bench:
    """A scheduler, and an engine whose steps take `cost` seconds a token where a pace is learnt."""

    def __init__(
        self, num_pages: int = 4000, cost: float | None = None, caching: bool = True, **config
    ) -> None:
        self.now = 0.0
        self.cache = KVCache(num_pages, caching)
        self.pace = None if cost is None else StepPace()
        self.cost = cost
        self.scheduler = Scheduler(SchedulerConfig(**config), clock=lambda: self.now, pace=self.pace)
        self.numbers = itertools.count()
        self.left: dict[str, int] = {}
        self.seqs: dict[str, TokenSequence] = {}
        self.rows: Counter[str] = Counter()  # by tenant
        self.firsts: list[str] = []  # ids, in the order of their first tokens

    def add(
        self,
        tenant: str,
        prompt: int | list[int],
        max_tokens: int = 1000,
        name: str = "",
        weight: float | None = None,
    ) -> str:
        number = next(self.numbers)
        self.now += 0.001
        tokens = [1000 + number] * prompt if isinstance(prompt, int) else prompt
        name = name or f"{tenant}{number}"
        seq = TokenSequence(name, tenant, self.cache, LAYERS, "s", tokens, self.now, weight=weight)
        self.scheduler.add(seq)
        self.left[name], self.seqs[name] = max_tokens, seq
        return name

    def step(self) -> dict[str, int]:
        config = self.scheduler.config
        scheduled = self.scheduler.schedule()
        rows = {seq.request_id: count for seq, count in scheduled}
        assert scheduled or not self.scheduler.has_unfinished(), "an empty step with work to do"
        assert len(rows) == len(scheduled) <= config.max_num_seqs
        assert sum(rows.values()) <= config.max_num_batched_tokens
        self.scheduler.advance(scheduled)
        if self.pace is not None and self.cost is not None:
            prefill = Counter[str]()
            for seq, count in scheduled:
                if count > 1:
                    prefill[seq.model] += count
            self.pace.observe(prefill, self.cost * sum(rows.values()))
        for seq, count in scheduled:
            self.rows[seq.model] += count
            if seq.num_uncomputed == 0:
                if seq.num_tokens == seq.prompt_len:
                    self.firsts.append(seq.request_id)
                seq.append_token(len(seq.token_ids) % 7)
                self.left[seq.request_id] -= 1
                if not self.left[seq.request_id]:
                    self.scheduler.finish(seq)
        self.cache.check_integrity(self.scheduler.running)
        return rows

    def running(self) -> Counter[str]:
        return Counter(seq.model for seq in self.scheduler.running)

    def steps_to_first(self, name: str, limit: int = 200) -> int:
        for count in range(1, limit):
            self.step()
            if name in self.firsts:
                return count
        raise AssertionError(f"{name} has no token after {limit} steps")


# ---- slots


def test_a_newcomer_is_in_at_the_next_step_and_who_gave_way_loses_nothing() -> None:
    bench = Bench(max_num_seqs=8)
    for _ in range(100):
        bench.add("flood", 40, 64)
    for _ in range(40):
        bench.step()
    youngest = bench.scheduler.running[-1]
    known = youngest.num_tokens
    polite = bench.add("polite", 40, 3)
    assert bench.step()[polite] == 40
    assert bench.running() == {"flood": 7, "polite": 1}
    assert (youngest.num_preemptions, bench.scheduler.num_preemptions) == (1, 1)
    for _ in range(2):
        bench.step()
    rows = bench.step()[youngest.request_id]  # the polite one has ended: before any other of the flood
    assert (youngest.num_tokens, youngest.num_cached) == (known + 1, known - known % PAGE_TOKENS)
    assert rows == known - youngest.num_cached
    assert bench.scheduler.num_preemptions == 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, {"a": 6, "b": 6}),
        ({"a": 3}, {"a": 9, "b": 3}),
        ({"a": 0.5}, {"a": 4, "b": 8}),
        ({"b": 0.001}, {"a": 12}),  # b takes from nobody; its turn is when a slot gets free
    ],
)
def test_slots_are_shared_by_weight(weights: dict[str, float], expected: dict[str, int]) -> None:
    bench = Bench(max_num_seqs=12, tenant_weights=weights)
    for tenant in "ab":
        for _ in range(20):
            bench.add(tenant, 5)
        for _ in range(5):
            bench.step()
    assert bench.running() == expected
    preempted = bench.scheduler.num_preemptions
    for _ in range(50):
        bench.step()
    assert bench.scheduler.num_preemptions == preempted, "they take from each other in turn"


@pytest.mark.parametrize(("prompt", "max_tokens"), [(8, 30), (200, 2)])
def test_weights_that_come_with_requests_share_the_steps(prompt: int, max_tokens: int) -> None:
    """Decodes, then prefills: rows by weight while both tenants have more than may run."""
    bench = Bench(max_num_seqs=8, max_num_batched_tokens=256, tenant_weights={"heavy": 0.5})
    for _ in range(400):
        for tenant, weight in (("light", 1.0), ("heavy", 3.0)):
            while sum(left > 0 and name.startswith(tenant) for name, left in bench.left.items()) < 20:
                bench.add(tenant, prompt, max_tokens, weight=weight)
        bench.step()
    assert bench.rows["heavy"] / bench.rows["light"] == pytest.approx(3, rel=0.1)


def test_the_latest_weight_counts_and_one_that_is_not_said_stays() -> None:
    bench = Bench(max_num_seqs=8)
    for weight in (1.0, None):
        for tenant in "ab":
            for _ in range(10):
                bench.add(tenant, 5, weight=weight)
            bench.step()
    assert bench.running() == {"a": 4, "b": 4}
    bench.add("b", 5, weight=3.0)
    bench.add("b", 5)
    for _ in range(4):
        bench.step()
    assert bench.running() == {"a": 2, "b": 6}


def test_weights_that_come_with_requests_share_the_queue() -> None:
    bench = Bench(max_waiting=4, max_num_seqs=1)
    for tenant, count, weight in (("a", 4, 1.0), ("b", 3, 3.0)):
        for _ in range(count):
            bench.add(tenant, 5, weight=weight)
    with pytest.raises(OverloadedError, match=r"'b', whose share of the 4 that may be is 3 "):
        bench.add("b", 5, weight=3.0)


def test_a_free_slot_goes_to_whom_has_fewest() -> None:
    bench = Bench(max_num_seqs=4, tenant_weights={"b": 0.001})
    for _ in range(10):
        bench.add("a", 5, 20)
    bench.step()
    b = bench.add("b", 5, 100)
    assert bench.steps_to_first(b) == 20


def test_more_tenants_than_slots_take_turns() -> None:
    bench = Bench(max_num_seqs=3)
    for _ in range(4):
        for tenant in "abcdefgh":
            bench.add(tenant, 5, 4)
    while bench.scheduler.has_unfinished():
        bench.step()
    turns = ["".join(name[0] for name in bench.firsts[i : i + 8]) for i in range(0, 32, 8)]
    assert [sorted(turn) for turn in turns] == [list("abcdefgh")] * 4


def test_tenants_may_be_told_apart_by_another_key_than_the_model() -> None:
    bench = Bench(max_num_seqs=2)
    for key in ("k1", "k1", "k1", "k2"):
        seq = TokenSequence(
            f"{key}{next(bench.numbers)}", "m", bench.cache, LAYERS, "s", [5], 0.0, tenant=key
        )
        bench.scheduler.add(seq)
    assert [seq.request_id for seq, _ in bench.scheduler.schedule()] == ["k10", "k23"]
    assert bench.scheduler.by_model() == ({"m": 2}, {"m": 2})


# ---- pages


def test_a_newcomer_gets_pages_that_others_hold() -> None:
    bench = Bench(num_pages=40, max_num_seqs=8)  # 20 pages of tokens
    for _ in range(8):
        bench.add("flood", 60)
    bench.step()
    waiting = bench.scheduler.num_waiting
    assert waiting > 0, "the pool is full"
    polite = bench.add("polite", 100)
    assert polite in bench.step()
    assert bench.running()["flood"] < 8 - waiting
    assert bench.running()["polite"] == 1


def test_growing_sequences_of_a_flood_take_pages_from_each_other() -> None:
    bench = Bench(num_pages=40, max_num_seqs=8)
    for _ in range(6):
        bench.add("flood", 31)
    bench.step()
    polite = bench.seqs[bench.add("polite", 31)]
    bench.step()
    while not bench.scheduler.num_preemptions:
        bench.step()
    for _ in range(30):
        bench.step()
    assert polite.num_preemptions == 0, "the youngest of all, but not of those who have most"


def test_a_large_prompt_is_not_overtaken_for_ever() -> None:
    bench = Bench(num_pages=40, max_num_seqs=8)
    for _ in range(3):
        bench.add("small", 60, 30)
    bench.step()
    large = bench.add("large", 500, 2)
    steps = 0
    while large not in bench.firsts:
        bench.add("small", 60, 30)
        bench.step()
        steps += 1
        assert steps < 100


# ---- prefill


def test_prompts_of_two_tenants_share_a_step() -> None:
    bench = Bench(max_num_batched_tokens=256, max_num_seqs=8)
    a, b = bench.add("a", 2000), bench.add("b", 2000)
    assert [bench.step() for _ in range(3)] == [{a: 128, b: 128}] * 3


def test_what_a_tenant_leaves_is_lent() -> None:
    bench = Bench(max_num_batched_tokens=256, max_num_seqs=8)
    long = [bench.add("a", 2000), bench.add("b", 2000)]
    short = bench.add("c", 10, 1)
    # c runs no less than they do, so they need not wait for it; on page borders
    assert bench.step() == {short: 10, long[0]: 128, long[1]: 96}
    assert sum(bench.step().values()) == 256


def test_a_flood_does_not_make_the_step_long_in_which_another_has_its_first_token() -> None:
    bench = Bench(max_num_batched_tokens=512, max_num_seqs=8)
    for _ in range(20):
        bench.add("flood", 1000)
    while bench.running()["flood"] < 4:
        bench.step()
    polite = bench.add("polite", 48, 2)
    assert bench.step() == {polite: 48}
    assert sum(bench.step().values()) > 400, "and all is as before"


def test_first_tokens_of_others_hold_up_a_flood_every_other_step_at_most() -> None:
    bench = Bench(max_num_seqs=8)
    for _ in range(20):
        bench.add("flood", 5)
    bench.step()
    generated = sum(seq.num_tokens for seq in bench.seqs.values())
    for number in range(20):
        polite = bench.add("polite", 10, 1)
        rows = bench.step()
        assert rows.pop(polite) == 10
        assert len(rows) == (0 if number % 2 == 0 else 7)
    del bench.left[polite]
    assert sum(seq.num_tokens for seq in bench.seqs.values() if seq.model == "flood") == generated + 70


def test_a_tenant_that_has_nothing_waiting_is_not_held_up() -> None:
    bench = Bench(max_num_seqs=8)
    busy = [bench.add("busy", 5) for _ in range(6)]
    bench.step()
    polite = bench.add("polite", 10)
    assert bench.step() == dict.fromkeys(busy, 1) | {polite: 10}


def test_many_tenants_take_turns_with_pages() -> None:
    """20 tenants in steps of 64 rows: two of them a step, and all of them in ten."""
    bench = Bench(max_num_batched_tokens=64, max_num_seqs=32)
    names = [bench.add(f"t{i:02}", 320) for i in range(20)]
    for _ in range(3):
        rows = Counter[str]()
        for _ in range(10):
            rows.update(bench.step())
        assert max(rows.values()) - min(rows[name] for name in names) <= 2 * PAGE_TOKENS


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.sampled_from([0.5, 1, 1, 2, 4]), min_size=2, max_size=5),
    lengths=st.lists(st.integers(64, 700), min_size=1, max_size=6),
    budget=st.sampled_from([64, 96, 200, 512]),
)
def test_prefill_is_by_weight_in_the_long_run(weights: list[float], lengths: list[int], budget: int) -> None:
    """Tenants that always have prompts, short or long, get rows by weight, but for some steps' worth."""
    by_tenant = {f"t{i}": weight for i, weight in enumerate(weights)}
    bench = Bench(max_num_batched_tokens=budget, max_num_seqs=32, tenant_weights=by_tenant)
    sizes = itertools.cycle(lengths)
    for count in range(60):
        waiting = bench.scheduler.by_model()[1]
        for tenant in by_tenant:
            for _ in range(10 - waiting.get(tenant, 0)):
                bench.add(tenant, next(sizes), 1)
        assert sum(bench.step().values()) >= budget // 2, f"step {count} is not filled"
    total = sum(bench.rows.values())
    for tenant, weight in by_tenant.items():
        share = total * weight / sum(weights)
        assert abs(bench.rows[tenant] - share) <= 4 * budget + 2 * PAGE_TOKENS, dict(bench.rows)


# ---- order


def test_cached_prompts_go_first_among_those_of_their_tenant_only() -> None:
    bench = Bench(max_num_seqs=2, policy="hit-first", ageing_s=1e9)
    warm = bench.add("a", list(range(65)), 1)
    bench.step()
    assert bench.firsts == [warm]
    cold = [bench.add("a", 70, 1), bench.add("b", 70, 1), bench.add("b", 70, 1)]
    cached = [bench.add("a", [*range(64), 5 + i], 1) for i in range(2)]
    while bench.scheduler.has_unfinished():
        bench.step()
    assert bench.firsts[1:] == [cached[0], cold[1], cached[1], cold[2], cold[0]]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    load=st.lists(
        st.tuples(st.sampled_from("aabc"), st.integers(0, 3), st.integers(1, 40), st.integers(0, 3)),
        max_size=30,
    )
)
def test_fair_is_the_same_whatever_is_cached(load: list[tuple[str, int, int, int]]) -> None:
    """Who is admitted and gives way, and when, does not tell what the cache holds.

    Prompts of a page, of which 31 tokens are known or not: what they take of a step is in nobody's way.
    """

    def course(known: bool) -> list[object]:
        bench = Bench(max_num_seqs=4, max_num_batched_tokens=2048, policy="fair")
        for prefix in range(4):
            if known:
                bench.add("a", [prefix] * 32, 1)
                bench.step()
        bench.firsts.clear()
        seen: list[object] = []
        for number, (tenant, prefix, max_tokens, steps) in enumerate(load):
            bench.add(tenant, [prefix] * 31 + [100 + number], max_tokens, f"{tenant}{number} in {steps}")
            for _ in range(steps):
                bench.step()
                seen.append([seq.request_id for seq in bench.scheduler.running])
        while bench.scheduler.has_unfinished():
            bench.step()
            seen.append([seq.request_id for seq in bench.scheduler.running])
        return [*seen, bench.firsts, [bench.seqs[n].num_preemptions for n in bench.firsts]]

    assert course(known=False) == course(known=True)


# ---- any load


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    load=st.lists(
        st.tuples(st.sampled_from("aaabbcd"), st.integers(1, 300), st.integers(1, 60), st.integers(0, 3)),
        max_size=40,
    ),
    budget=st.sampled_from([16, 64, 200]),
    num_pages=st.sampled_from([60, 200, 4000]),
    weights=st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.1, 0.5, 2, 5])),
    cost=st.sampled_from([None, 0.001, 0.02]),
    caching=st.booleans(),
)
def test_nothing_starves_and_nothing_lies_idle(load, budget, num_pages, weights, cost, caching) -> None:
    bench = Bench(
        num_pages,
        cost,
        caching,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        tenant_weights=weights,
        max_step_seconds=0.5,
    )
    work = iter(load)
    pause, steps = 0, 0
    while True:
        while pause == 0 and (request := next(work, None)) is not None:
            *request, pause = request
            bench.add(*request)
        if not bench.scheduler.has_unfinished():
            break
        pause = max(0, pause - 1)
        rows = bench.step()
        free = bench.scheduler.config.max_num_batched_tokens - sum(rows.values())
        roomy = num_pages == 4000 and cost is None and free >= budget / 2 + PAGE_TOKENS
        if roomy and len(rows) < 4 and len({seq.model for seq in bench.scheduler.running}) == 1:
            assert bench.scheduler.num_waiting == 0, "slots, pages and rows are free"
        steps += 1
        assert steps < 40 * 400, "no end"
    assert not any(bench.left.values())
    assert bench.cache.stats().pages_owned == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    floods=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 100)), min_size=1, max_size=3),
    prompt=st.integers(1, 300),
    warm_up=st.integers(0, 40),
    policy=st.sampled_from(["hit-first", "fair"]),
    caching=st.booleans(),
)
def test_a_polite_tenant_waits_a_bounded_number_of_steps(floods, prompt, warm_up, policy, caching) -> None:
    """Its first token comes within the steps that its share of each takes, and one."""
    bench = Bench(caching=caching, max_num_seqs=8, max_num_batched_tokens=256, max_waiting=60, policy=policy)
    for number, (length, max_tokens) in enumerate(floods):
        for _ in range(60):
            try:
                bench.add(f"flood {number}", length, max_tokens)
            except OverloadedError:
                break
    for _ in range(warm_up):
        bench.step()
    for _ in range(3):
        polite = bench.add("polite", prompt, 5)
        share = (256 - 8) // (len(floods) + 1)
        pages_a_step = max(1, share // PAGE_TOKENS)
        assert bench.steps_to_first(polite) <= math.ceil(prompt / (pages_a_step * PAGE_TOKENS)) + 1
        while bench.left[polite]:
            bench.step()


# ---- the queue


def test_a_flood_fills_the_queue_and_is_refused_and_others_are_not() -> None:
    bench = Bench(max_waiting=1056)
    for _ in range(1056):
        bench.add("flood", 5)
    with pytest.raises(OverloadedError, match=r"1056 of them of 'flood', whose share of the 1056 .* is 1056"):
        bench.add("flood", 5)
    for _ in range(528):  # half of it is its own
        bench.add("other", 5)
    with pytest.raises(OverloadedError, match="528 of them of 'other'"):
        bench.add("other", 5)
    bench.add("third", 5)
    with pytest.raises(OverloadedError, match=r"'flood', whose share of the 1056 .* is 352"):
        bench.add("flood", 5)


def test_shares_of_the_queue_are_by_weight() -> None:
    held = {"a": 90, "b": 10}
    check_queue("b", held, 100, {"b": 0.25})
    with pytest.raises(OverloadedError, match="is 20"):
        check_queue("b", held | {"b": 20}, 100, {"b": 0.25})
    with pytest.raises(OverloadedError, match="is 80"):
        check_queue("a", held, 100, {"b": 0.25})


@given(
    held=st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 2000)),
    limit=st.integers(1, 1000),
    weights=st.dictionaries(st.sampled_from("abcdefg"), st.floats(0.001, 1000)),
)
def test_who_has_nothing_waiting_is_never_refused(held, limit, weights) -> None:
    check_queue("g", held, limit, weights)


# ---- time


def test_a_chunk_beside_others_is_bounded_in_time() -> None:
    """0.01 s a token: 512 tokens take 5 s alone; beside one that decodes 0.5 s, so about 50."""
    bench = Bench(cost=0.01, max_step_seconds=0.5)
    long = bench.add("a", 2000)
    assert bench.step()[long] == 512
    short = bench.add("a", 5)
    while short not in bench.firsts:
        bench.step()
    assert all(bench.step() for _ in range(3))
    bench.add("a", 2000)
    for _ in range(6):
        rows = bench.step()
        assert rows[short] == 1
        assert PAGE_TOKENS <= sum(rows.values()) - 1 <= 50


def test_a_slow_model_makes_a_page_of_progress() -> None:
    bench = Bench(cost=1.0, max_step_seconds=0.5)
    a = bench.add("a", 5)
    bench.step()
    long = bench.add("a", 320)
    assert [bench.step() for _ in range(10)] == [{a: 1, long: 32}] * 10


def test_slow_prompts_of_two_tenants_take_turns() -> None:
    bench = Bench(cost=1.0, max_step_seconds=0.5)
    a, b = bench.add("a", 320), bench.add("b", 320)
    rows = Counter[str]()
    for _ in range(10):
        step = bench.step()
        assert sum(step.values()) == 32
        rows.update(step)
    assert rows == {a: 160, b: 160}


def test_pace_is_learnt_and_settles_where_the_step_is_at_its_bound() -> None:
    pace = StepPace(lambda model: 0.001)
    assert pace.tokens_within("m", 0.5) == 500
    tokens = 500
    for _ in range(40):  # 0.3 s of decoding besides, and 0.001 s a token
        pace.observe({"m": tokens}, 0.3 + 0.001 * tokens)
        tokens = pace.tokens_within("m", 0.5)
    assert tokens == pytest.approx(200, abs=10)


def test_a_step_of_two_models_is_split_by_what_they_cost() -> None:
    pace = StepPace({"small": 0.001, "large": 0.1}.get)
    for _ in range(50):  # a machine twice as fast as the seeds'
        pace.observe({"small": 100, "large": 10}, 0.55)
    assert pace.seconds_per_token("small") == pytest.approx(0.0005, rel=0.01)
    assert pace.seconds_per_token("large") == pytest.approx(0.05, rel=0.01)


def test_scraps_teach_nothing() -> None:
    pace = StepPace()
    pace.observe({"m": 5}, 1.0)
    assert pace.seconds_per_token("m") is None
    assert pace.tokens_within("m", 0.5) == PAGE_TOKENS
