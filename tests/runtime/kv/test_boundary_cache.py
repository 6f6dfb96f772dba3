"""Hidden states by page: budget, order of eviction, pages in pieces; and prefills that start late."""

import numpy as np
import pytest

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.kv.boundary import BoundaryCache
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import Part, Segment, TokenSequence

LOW = Segment(0, 2, "low")
MODEL_A = (LOW, Segment(2, 3, "low+a", "out"))
MODEL_B = (LOW, Segment(2, 3, "low+b", "out"))
ROW_BYTES = 8


def rows(start: int, end: int) -> np.ndarray:
    return np.arange(start, end, dtype=np.int64)[:, None]


def sequence(cache: KVCache, length: int, segments=MODEL_A, scope="team") -> TokenSequence:
    return TokenSequence("r", "m", cache, segments, scope, np.arange(length), arrival=0.0)


def run(cache: KVCache, seq: TokenSequence, upto: int | None = None) -> TokenSequence:
    """Pretend that an engine computed the tokens up to `upto` (all), keeping what leaves the lower layers."""
    upto = seq.num_tokens if upto is None else upto
    if seq.num_pages == 0:
        cache.begin(seq)
    assert cache.reserve(seq, upto)
    start, seq.num_computed = seq.num_computed, upto
    cache.commit(seq)
    cache.boundaries.record(seq, "out", start, rows(start, upto))
    return seq


def caches(pages: int = 100) -> KVCache:
    return KVCache(60, boundaries=BoundaryCache(pages * PAGE_TOKENS * ROW_BYTES))


def test_another_model_starts_at_the_boundary():
    cache = caches()
    first = run(cache, sequence(cache, 96))
    seq = sequence(cache, 96, MODEL_B)
    assert cache.probe(seq) == 64  # two of three layers
    assert cache.begin(seq) == 0
    assert [len(path) for path in seq.nodes] == [3, 0]
    assert seq.parts(96) == [Part(0, 96, 1)]  # the last token too: its hidden state is known
    assert seq.parts(40) == [Part(0, 40, 1)]
    assert cache.boundaries.entering(seq, Part(0, 40, 1)).tolist() == rows(0, 40).tolist()
    assert cache.reserve(seq, 96)
    assert seq.page_table[:2, :3].tolist() == first.page_table[:2, :3].tolist()
    assert not set(seq.page_table[2, :3]) & set(first.page_table.ravel())
    cache.check_integrity([first, seq])
    assert cache.stats().hit_tokens == {"low": 96, "low+a": 0, "low+b": 0}
    seq.num_computed = 96
    cache.commit(seq)
    assert seq.entering == {}
    for each in (first, seq):
        cache.release(each)
    cache.check_integrity([])


def test_behind_the_known_part_the_prompt_enters_at_the_bottom():
    cache = caches()
    run(cache, sequence(cache, 70))
    seq = sequence(cache, 100, MODEL_B)
    cache.begin(seq)
    assert seq.parts(100) == [Part(0, 64, 1), Part(64, 100, 0)]


def test_own_pages_come_first_and_then_those_of_others():
    cache = caches()
    run(cache, sequence(cache, 40, MODEL_B))
    run(cache, sequence(cache, 100, MODEL_A))
    seq = sequence(cache, 128, MODEL_B)
    assert cache.begin(seq) == 32
    assert seq.parts(128) == [Part(32, 96, 1), Part(96, 128, 0)]


def test_without_hidden_states_the_lower_pages_are_of_no_use():
    cache = caches(pages=0)
    run(cache, sequence(cache, 96))
    seq = sequence(cache, 96, MODEL_B)
    cache.begin(seq)
    assert [len(path) for path in seq.nodes] == [0, 0]


def test_what_a_sequence_took_outlives_its_eviction():
    cache = caches(pages=3)
    first = run(cache, sequence(cache, 96))
    seq = sequence(cache, 96, MODEL_B)
    cache.begin(seq)
    other = run(cache, sequence(cache, 96, scope="other"))  # pushes all three out
    assert not cache.boundaries.has("out", seq.page_keys(1)[0])
    assert cache.extend(seq) == 0
    assert cache.boundaries.entering(seq, Part(0, 96, 1)).tolist() == rows(0, 96).tolist()
    cache.check_integrity([first, seq, other])


@pytest.mark.parametrize("cuts", [(96,), (32, 96), (10, 20, 40, 96), (31, 33, 64, 95, 96)])
def test_pages_may_come_in_pieces(cuts):
    cache = caches()
    seq = sequence(cache, 100)
    for cut in cuts:
        run(cache, seq, cut)
    for page, key in enumerate(seq.page_keys(3)[:3]):
        kept = cache.boundaries.get("out", key)
        assert kept.tolist() == rows(32 * page, 32 * page + 32).tolist()


def test_a_page_whose_beginning_is_missing_is_not_kept():
    cache = caches()
    seq = sequence(cache, 64)
    cache.begin(seq)
    assert cache.reserve(seq, 64)
    seq.num_computed = 64
    cache.commit(seq)
    cache.boundaries.record(seq, "out", 10, rows(10, 64))
    assert not cache.boundaries.has("out", seq.page_keys(2)[0])
    assert cache.boundaries.has("out", seq.page_keys(2)[1])


def test_the_budget_holds_and_leading_pages_stay_longest():
    cache = caches(pages=4)
    seq = run(cache, sequence(cache, 96))
    cache.release(seq)
    other = run(cache, sequence(cache, 64, scope="other"))
    boundaries = cache.boundaries
    assert boundaries.num_bytes == boundaries.max_bytes
    assert boundaries.evictions == 1
    assert [boundaries.has("out", key) for key in seq.page_keys(3)[:3]] == [True, True, False]
    assert [boundaries.has("out", key) for key in other.page_keys(2)[:2]] == [True, True]


def test_hidden_states_go_with_their_kv():
    cache = caches()
    for i in range(10):  # 9 pages each, of a pool of 60
        cache.release(run(cache, sequence(cache, 96, scope=f"{i}")))
    kept = {key for i in range(10) for key in sequence(cache, 96, scope=f"{i}").page_keys(3)}
    in_tree = {key for key in kept if key in cache.tree.find(LOW).nodes}
    assert len(in_tree) < len(kept)
    assert {key for key in kept if cache.boundaries.has("out", key)} == in_tree
    assert len(cache.boundaries) * PAGE_TOKENS * ROW_BYTES == cache.boundaries.num_bytes
    assert cache.boundaries.evictions == 0
    cache.resize(1)
    assert (len(cache.boundaries), cache.boundaries.num_bytes) == (0, 0)


def test_hidden_states_go_where_segments_change_and_their_kv_cannot_stay():
    cache = caches()
    cache.release(run(cache, sequence(cache, 96)))
    whole = Segment(0, 2, "other")
    cache.reshape({whole: []}, {}, [])
    assert len(cache.boundaries) == 0
    cache.check_integrity([])


def test_of_a_sequence_that_is_gone_nothing_is_kept():
    cache = caches()
    seq = sequence(cache, 96)
    cache.begin(seq)
    assert cache.reserve(seq, 96)
    cache.release(seq)  # while the engine works
    cache.boundaries.record(seq, "out", 0, rows(0, 96))
    assert len(cache.boundaries) == 0


def test_a_page_that_begins_alike_is_copied_and_goes_on():
    cache = caches()
    first = run(cache, sequence(cache, 64, MODEL_A))
    prompt = np.arange(100)
    prompt[50:] = 7
    seq = TokenSequence("s", "m", cache, MODEL_A, "team", prompt, arrival=0.0)
    assert cache.begin(seq) == 32
    assert cache.copy_partial(seq) == 18
    assert cache.reserve(seq, 100)
    cache.check_integrity([first, seq])
    copies = cache.take_copies(seq)
    assert copies is not None
    assert copies[0].tolist() == first.page_table[:, 1].tolist()
    assert copies[1].tolist() == seq.page_table[:, 1].tolist()
    assert cache.take_copies(seq) is None
    cache.check_integrity([first, seq])
    run(cache, seq, 100)
    kept = cache.boundaries.get("out", seq.page_keys(2)[1])
    assert kept.tolist() == rows(32, 64).tolist()
