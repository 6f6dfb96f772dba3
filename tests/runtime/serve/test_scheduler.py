"""What the scheduler chooses, step by step."""

import pytest

from blockzoo.runtime.api.errors import InvalidRequestError, OverloadedError
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import Segment, TokenSequence
from blockzoo.runtime.serve.admission_order import PROBES_PER_STEP
from blockzoo.runtime.serve.config import SchedulerConfig
from blockzoo.runtime.serve.scheduler import Scheduler

LAYERS = (Segment(0, 1, "low"), Segment(1, 2, "high"))  # 2 pages per 32 tokens


class Bench:
    """A scheduler, a clock that stands still, and an engine that takes no time."""

    def __init__(self, num_pages: int = 1000, **config) -> None:
        self.now = 0.0
        self.cache = KVCache(num_pages)
        self.scheduler = Scheduler(SchedulerConfig(**config), clock=lambda: self.now)
        self.num_added = 0

    def sequence(self, name: str, prompt: int | list[int], cache: KVCache | None = None) -> TokenSequence:
        """`prompt`: its tokens, or how many (tokens that no other prompt begins with)."""
        self.num_added += 1
        if isinstance(prompt, int):
            prompt = [1000 + self.num_added] * prompt
        return TokenSequence(name, "m", cache or self.cache, LAYERS, "s", prompt, self.now)

    def add(self, name: str, prompt: int | list[int], cache: KVCache | None = None) -> TokenSequence:
        seq = self.sequence(name, prompt, cache)
        self.scheduler.add(seq)
        return seq

    def step(self) -> dict[str, int]:
        """Schedule, compute, append a token where one was sampled."""
        scheduled = self.scheduler.schedule()
        self.scheduler.advance(scheduled)
        for seq, _ in scheduled:
            if seq.num_uncomputed == 0:
                seq.append_token(7)
        caches = {id(seq.cache): seq.cache for seq, _ in scheduled}
        for cache in caches.values():
            cache.check_integrity([seq for seq in self.scheduler.running if seq.cache is cache])
        return {seq.request_id: num_tokens for seq, num_tokens in scheduled}


# ---- steps


def test_prompt_then_one_token_a_step():
    bench = Bench()
    seq = bench.add("a", 40)
    assert [bench.step() for _ in range(3)] == [{"a": 40}, {"a": 1}, {"a": 1}]
    bench.scheduler.finish(seq)
    assert not bench.scheduler.has_unfinished()
    assert bench.scheduler.schedule() == []
    assert bench.cache.stats().pages_owned == 0


def test_decode_comes_before_prefill():
    bench = Bench(max_num_batched_tokens=64, max_num_seqs=4)
    bench.add("a", 10)
    bench.step()
    bench.add("b", 200)
    for _ in range(5):  # 63 tokens are left beside the decoding one: chunks end on page borders
        assert list(bench.step().items()) == [("a", 1), ("b", 32)]


def test_chunk_ends_on_a_page_border_after_an_odd_start():
    bench = Bench(max_num_batched_tokens=40, max_num_seqs=4)
    for name in "abc":
        bench.add(name, 3)
    bench.step()
    for name in "bc":
        bench.scheduler.abort(name)
    bench.add("d", 100)
    assert bench.step() == {"a": 1, "d": 32}
    bench.scheduler.abort("a")
    assert bench.step() == {"d": 32}
    assert bench.step() == {"d": 36}


def test_a_chunk_smaller_than_a_page_keeps_the_first_prefill_moving():
    bench = Bench(max_num_batched_tokens=20, max_num_seqs=4)
    bench.add("a", 100)
    bench.add("b", 100)
    # 20 reaches no border, 12 more do; never a scrap for b beside a
    assert [bench.step() for _ in range(4)] == [{"a": 20}, {"a": 12}, {"a": 20}, {"a": 12}]


def test_a_border_is_not_worth_half_the_chunk():
    bench = Bench(max_num_batched_tokens=31, max_num_seqs=4)
    bench.add("a", 100)
    assert [bench.step() for _ in range(4)] == [{"a": 31}, {"a": 31}, {"a": 31}, {"a": 7}]


def test_running_prefill_goes_on_before_new_ones():
    bench = Bench(max_num_batched_tokens=64, max_num_seqs=4)
    bench.add("a", 100)
    bench.add("b", 30)
    assert [bench.step() for _ in range(3)] == [{"a": 64}, {"a": 36}, {"a": 1, "b": 30}]


def test_bound_on_running_sequences():
    bench = Bench(max_num_seqs=2)
    seqs = [bench.add(name, 5) for name in "abc"]
    assert bench.step() == {"a": 5, "b": 5}
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (2, 1)
    bench.scheduler.finish(seqs[0])
    assert bench.step() == {"b": 1, "c": 5}


def test_cached_prefix_is_not_scheduled():
    bench = Bench()
    first = bench.add("a", list(range(100)))
    assert bench.step() == {"a": 100}
    second = bench.add("b", list(range(100)))
    assert bench.step() == {"a": 1, "b": 4}
    assert (first.num_cached, second.num_cached) == (0, 96)


def test_prefill_takes_up_what_another_cached_meanwhile():
    bench = Bench(max_num_batched_tokens=128)
    bench.add("a", list(range(193)))
    b = bench.add("b", list(range(193)))
    # b finds 128 tokens cached when it begins, and 32 more after its first chunk
    assert [bench.step() for _ in range(3)] == [{"a": 128}, {"a": 65, "b": 32}, {"a": 1, "b": 1}]
    assert b.num_cached == 128 + 32


def test_sequences_of_several_caches_share_a_step():
    bench = Bench()
    bench.add("a", 5)
    bench.add("b", 6, KVCache(10))
    assert bench.step() == {"a": 5, "b": 6}


# ---- order of waiting


def admission_order(bench: Bench) -> list[str]:
    order = []
    while bench.scheduler.num_waiting:
        order += bench.step()
        for seq in bench.scheduler.running:
            bench.scheduler.finish(seq)
    return order


def with_two_cached_pages(policy: str) -> Bench:
    bench = Bench(max_num_seqs=1, policy=policy, ageing_s=10.0)
    bench.add("warm", list(range(65)))
    bench.step()
    bench.scheduler.abort("warm")
    bench.add("cold", 70)
    bench.now = 1.0
    bench.add("one page", [*range(32), *[5] * 40])
    bench.add("two pages", [*range(64), 5])
    bench.add("two again", [*range(64), 6])
    bench.now = 2.0
    return bench


def test_most_cached_first_then_arrival():
    assert admission_order(with_two_cached_pages("hit-first")) == [
        "two pages",
        "two again",
        "one page",
        "cold",
    ]


def test_fair_is_by_arrival():
    bench = with_two_cached_pages("fair")
    assert admission_order(bench) == ["cold", "one page", "two pages", "two again"]


def test_who_waited_too_long_goes_first():
    bench = with_two_cached_pages("hit-first")
    bench.now = 10.5
    assert admission_order(bench) == ["cold", "two pages", "two again", "one page"]
    bench = with_two_cached_pages("hit-first")
    bench.now = 11.5
    assert admission_order(bench) == ["cold", "one page", "two pages", "two again"]


def test_expectations_follow_the_cache():
    """What was cached after a request came counts too."""
    bench = Bench(max_num_seqs=1)
    bench.add("first", list(range(65)))
    bench.add("cold", 70)
    bench.add("alike", list(range(65)))
    bench.step()
    bench.scheduler.abort("first")
    assert admission_order(bench) == ["alike", "cold"]


def test_probes_per_step_are_bounded(monkeypatch):
    bench = Bench(max_num_seqs=2)
    seqs = [bench.add(f"{i}", 40) for i in range(100)]
    probed: list[str] = []
    probe = KVCache.probe
    monkeypatch.setattr(KVCache, "probe", lambda self, seq: probed.append(seq.request_id) or probe(self, seq))
    bench.step()
    assert probed == []  # nothing has changed since they came
    for _ in range(8):
        for seq in bench.scheduler.running:
            bench.scheduler.finish(seq)
        before = len(probed)
        bench.step()
        assert len(probed) - before <= PROBES_PER_STEP
    waiting = {seq.request_id for seq in seqs if seq.num_computed == 0 and seq.num_tokens == 40}
    assert waiting <= set(probed)  # each had its turn


# ---- pages run out


def test_youngest_is_preempted_and_comes_back_first():
    bench = Bench(num_pages=8)  # 4 pages of tokens
    a = bench.add("a", 30)
    b = bench.add("b", 30)
    assert bench.step() == {"a": 30, "b": 30}
    c = bench.add("c", 30)
    for _ in range(2):
        bench.step()
    assert (a.num_computed, b.num_computed) == (32, 32)
    assert bench.step() == {"a": 1, "b": 1}  # each takes its second page: all are taken
    for _ in range(31):
        bench.step()
    assert (a.num_computed, b.num_computed, c.num_computed) == (64, 64, 0)
    assert bench.step() == {"a": 1}
    assert (bench.scheduler.num_preemptions, b.num_preemptions) == (1, 1)
    assert bench.scheduler.num_waiting == 2
    bench.scheduler.finish(a)
    scheduled = bench.step()
    assert list(scheduled) == ["b"]  # before c, which came later; what is still cached is not recomputed
    assert scheduled["b"] == 65 - b.num_cached


def test_preempted_sequence_loses_its_place_in_the_step():
    """An older prefill takes the pages of a younger decode that this step had chosen already."""
    bench = Bench(num_pages=10, max_num_batched_tokens=2, max_num_seqs=2)
    bench.now = 1.0
    young = bench.add("young", 10)
    while young.num_uncomputed > 1:
        bench.step()
    bench.now = 0.0
    old = bench.add("old", 96)
    while old.num_computed < 64:
        assert bench.step() == {"young": 1, "old": 1}
    assert young.num_pages + old.num_pages == 5
    assert bench.step() == {"old": 1}
    assert (young.num_preemptions, young.num_pages) == (1, 0)


def test_admission_leaves_room_for_those_who_run():
    bench = Bench(num_pages=8)
    bench.add("a", 60)
    bench.step()
    bench.add("b", 40)  # would fit now, and be preempted as soon as a crosses a page border
    assert bench.step() == {"a": 1}
    bench.add("c", 20)  # would fit, but must not overtake b
    assert bench.step() == {"a": 1}
    bench.scheduler.abort("b")
    assert bench.step() == {"a": 1, "c": 20}


def test_a_full_cache_does_not_hold_up_another():
    bench = Bench(num_pages=8)
    bench.add("a", 60)
    bench.step()
    bench.add("b", 60)
    bench.add("c", 60, KVCache(10))
    bench.add("d", 5)  # would fit, but must not overtake b
    assert bench.step() == {"a": 1, "c": 60}


def test_only_sequences_of_the_same_cache_are_preempted():
    bench = Bench(num_pages=8)
    a, b = bench.add("a", 31), bench.add("b", 31)
    other = bench.add("c", 31, KVCache(1000))
    while not b.num_preemptions:
        bench.step()
    assert (a.num_preemptions, other.num_preemptions) == (0, 0)


def test_preempted_come_back_oldest_first():
    bench = Bench(num_pages=12)
    seqs = [bench.add(name, 31) for name in "abc"]
    bench.step()
    while bench.scheduler.num_running > 1:
        bench.step()
    assert [seq.num_preemptions for seq in seqs] == [0, 1, 1]
    bench.scheduler.finish(seqs[0])
    assert list(bench.step()) == ["b"]


def test_cached_pages_give_way_to_running_sequences():
    bench = Bench(num_pages=8)
    for name in "abc":
        seq = bench.add(name, 100)
        assert bench.step() == {name: 100}
        bench.scheduler.finish(seq)
    assert bench.cache.stats().evictions > 0


def test_sequence_that_can_never_fit_fails_at_once():
    bench = Bench(num_pages=8)
    bench.add("a", 10)
    big = bench.add("big", 129)
    assert bench.scheduler.has_unfinished()
    assert bench.step() == {"a": 10}
    [failed] = bench.scheduler.take_failed()
    assert failed.seq is big
    assert "129 tokens (prompt 129) of model 'm' do not fit" in failed.message
    assert "its 8 pages hold 128 tokens" in failed.message
    assert bench.scheduler.take_failed() == []


def test_sequence_that_fits_only_without_published_pages_does_not_wait_for_ever():
    bench = Bench(num_pages=8)
    document = TokenSequence("p", "m", bench.cache, LAYERS, "", [5] * 64, 0.0, publishes=True)
    bench.cache.begin(document)
    bench.cache.reserve(document, 64)
    document.num_computed = 64
    bench.cache.commit(document)
    publication = bench.cache.publish(document, 64, lead=0)
    bench.cache.release(document)
    old = bench.add("old", 10)
    bench.step()
    bench.add("big", 65)
    behind = bench.add("behind the document", [5] * 64 + [6])
    assert bench.step() == {"old": 1}  # as long as others run they may leave room
    bench.scheduler.finish(old)
    assert bench.step() == {"behind the document": 1}
    bench.scheduler.finish(behind)
    assert bench.step() == {}
    [failed] = bench.scheduler.take_failed()
    assert "its 8 pages, less 4 of published documents, hold 64 tokens" in failed.message
    bench.cache.withdraw(publication)


def test_sequence_that_outgrows_the_pool_fails_alone():
    bench = Bench(num_pages=8)
    old = bench.add("old", 120)
    bench.step()
    while not bench.scheduler.failed:
        bench.step()
    [failed] = bench.scheduler.take_failed()
    assert failed.seq is old
    assert old.num_tokens == 129
    assert not bench.scheduler.has_unfinished()
    assert bench.cache.stats().pages_owned == 0
    bench.cache.check_integrity([])


def test_sequence_that_outgrows_the_pool_makes_way():
    bench = Bench(num_pages=8)
    seq = bench.add("a", 128)
    bench.add("b", 10)
    assert bench.step() == {"a": 128}
    assert bench.step() == {"b": 10}
    assert [failed.seq for failed in bench.scheduler.take_failed()] == [seq]


# ---- in and out


def test_full_queue_is_overloaded():
    bench = Bench(max_waiting=2)
    bench.add("a", 5)
    bench.add("b", 5)
    with pytest.raises(OverloadedError, match="2 requests are waiting already"):
        bench.add("c", 5)
    bench.step()
    bench.add("c", 5)


def test_request_id_in_use_is_refused():
    bench = Bench()
    bench.add("a", 5)
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        bench.add("a", 5)
    bench.step()
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        bench.add("a", 5)
    bench.scheduler.abort("a")
    bench.add("a", 5)


@pytest.mark.parametrize("steps", range(4))
def test_abort_in_any_state(steps):
    bench = Bench(max_num_batched_tokens=32, max_num_seqs=4)
    seq = bench.add("a", 70)  # waiting, two chunks, decoding
    for _ in range(steps):
        bench.step()
    assert bench.scheduler.abort("a") is seq
    assert bench.scheduler.abort("a") is None
    assert not bench.scheduler.has_unfinished()
    assert bench.cache.stats().pages_owned == 0
    assert bench.cache.stats().pages_evictable == bench.cache.stats().pages_cached


def test_abort_of_a_preempted_sequence():
    bench = Bench(num_pages=8)
    bench.add("a", 31)
    bench.add("b", 31)
    while not bench.scheduler.num_preemptions:
        bench.step()
    assert bench.scheduler.abort("b").request_id == "b"
    assert bench.scheduler.num_waiting == 0


def test_abort_while_the_step_runs():
    bench = Bench()
    seq = bench.add("a", 40)
    scheduled = bench.scheduler.schedule()
    bench.scheduler.abort("a")
    bench.scheduler.advance(scheduled)
    assert seq.num_computed == 0
    assert bench.cache.pool.num_free == 1000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_waiting": 0}, "max_waiting is 0"),
        ({"max_num_batched_tokens": 31}, "less than max_num_seqs"),
        ({"policy": "random"}, "'random'"),
        ({"ageing_s": float("nan")}, "ageing_s is nan"),
        ({"tenant_weights": {"m": 0}}, r"tenant_weights\['m'\] is 0, expected a number from 0.001 to 1000"),
        ({"tenant_weights": {"m": float("nan")}}, r"tenant_weights\['m'\] is nan"),
        ({"tenant_weights": {"m": True}}, r"tenant_weights\['m'\] is True"),
        ({"tenant_weights": [1]}, r"tenant_weights is \[1\], expected a weight by tenant"),
        ({"max_step_seconds": 0.0}, "max_step_seconds is 0.0, expected above 0, or None"),
    ],
)
def test_config_bounds(wrong, message):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**wrong)
