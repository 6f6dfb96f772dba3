"""Page ids, references and eviction order of the KV cache, exactly."""

import numpy as np
import pytest

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.kv.boundary import BoundaryCache
from blockzoo.runtime.kv.pool import IntegrityError
from blockzoo.runtime.kv.prefix_cache import KVCache, path_lengths
from blockzoo.runtime.kv.sequence import Segment, TokenSequence

LOW = Segment(0, 2, "low")
MODEL_A = (LOW, Segment(2, 3, "low+a"))
MODEL_B = (LOW, Segment(2, 3, "low+b"))
ONE_LAYER = (Segment(0, 1, "hog"),)


def tokens(*pages: int, extra: int = 0) -> list[int]:
    """Whole pages, each of one repeated token, and `extra` tokens more."""
    return [token for token in pages for _ in range(PAGE_TOKENS)] + [99] * extra


def sequence(cache, prompt, segments=MODEL_A, scope="team") -> TokenSequence:
    return TokenSequence("r", "m", cache, segments, scope, prompt, arrival=0.0)


def compute(seq: TokenSequence, upto: int | None = None) -> TokenSequence:
    """Pretend that the engine wrote the KV of the tokens up to `upto` (all)."""
    upto = seq.num_tokens if upto is None else upto
    assert seq.cache.reserve(seq, upto)
    seq.num_computed = upto
    seq.cache.commit(seq)
    return seq


def run(cache, prompt, segments=MODEL_A, scope="team") -> TokenSequence:
    seq = sequence(cache, prompt, segments, scope)
    cache.begin(seq)
    return compute(seq)


def table(seq: TokenSequence) -> list[list[int]]:
    return seq.page_table[:, : seq.num_pages].tolist()


def evicted_one_by_one(cache: KVCache) -> list[tuple[str, int]]:
    """Grow a sequence of one layer page by page; (segment, first token) of each node it pushes out."""
    label = {}
    for tree in cache.tree._segments.values():
        for node in tree.nodes.values():
            label[node] = (tree.segment.key, int(node.pages[0]))
    hog = sequence(cache, tokens(*range(cache.pool.num_pages)), ONE_LAYER)
    order, before = [], set(label)
    while before and cache.reserve(hog, (hog.num_pages + 1) * PAGE_TOKENS):
        now = {node for tree in cache.tree._segments.values() for node in tree.nodes.values()}
        order += [label[node] for node in before - now]
        assert len(before - now) <= 1
        before = now
        cache.check_integrity([hog])
    return order


# ---- reserve


def test_reserve_fills_columns_of_all_layers():
    cache = KVCache(12)
    seq = sequence(cache, tokens(1, 2, extra=1))
    assert cache.begin(seq) == 0
    assert cache.reserve(seq, 33)
    assert table(seq) == [[0, 3], [1, 4], [2, 5]]
    assert (seq.page_table[:, 2:] == -1).all()


def test_reserve_within_the_last_page_changes_nothing():
    cache = KVCache(12)
    seq = sequence(cache, [1])
    cache.begin(seq)
    cache.reserve(seq, 1)
    page_table = seq.page_table
    assert cache.reserve(seq, 32)
    assert seq.page_table is page_table
    assert cache.pool.num_free == 9


def test_reserve_that_cannot_be_met_changes_nothing():
    cache = KVCache(7)
    done = run(cache, tokens(1))
    cache.release(done)
    seq = sequence(cache, tokens(2, 3, 4))
    cache.begin(seq)
    version = cache.version
    assert not cache.reserve(seq, 96)
    assert seq.num_pages == 0
    assert cache.version == version
    assert cache.stats().pages_evictable == 3
    assert cache.reserve(seq, 64)


def test_page_table_grows_and_keeps_its_entries():
    cache = KVCache(300)
    seq = sequence(cache, [1])
    cache.begin(seq)
    seen = []
    for page in range(1, 100):
        assert cache.reserve(seq, page * PAGE_TOKENS)
        seen.append(seq.page_table[:, page - 1].tolist())
    assert np.array(seen).T.tolist() == table(seq)
    assert seq.page_table.dtype == np.int32


# ---- commit and begin


def test_only_full_pages_enter_the_tree():
    cache = KVCache(12)
    seq = sequence(cache, tokens(1, 2, extra=5))
    cache.begin(seq)
    compute(seq, 63)
    assert seq.num_tree_pages == 1
    assert cache.stats().pages_cached == 3
    compute(seq)
    assert seq.num_tree_pages == 2
    assert (cache.stats().pages_cached, cache.stats().pages_owned) == (6, 3)
    cache.check_integrity([seq])


def test_second_sequence_takes_the_pages_of_the_first():
    cache = KVCache(12)
    first = run(cache, tokens(1, 2, extra=3))
    second = sequence(cache, tokens(1, 2, extra=9))
    assert cache.probe(second) == 64
    assert cache.begin(second) == 64
    assert (second.num_computed, second.num_cached) == (64, 64)
    assert table(second) == [row[:2] for row in table(first)]
    assert [[node.refs for node in path] for path in second.nodes] == [[2, 2], [2, 2]]
    assert cache.stats().hit_tokens == {"low": 64, "low+a": 64}
    cache.check_integrity([first, second])


def test_probe_touches_nothing():
    cache = KVCache(12)
    cache.release(run(cache, tokens(1, extra=1)))
    lru, before = list(cache.tree._lru), cache.stats()
    assert cache.probe(sequence(cache, tokens(1, extra=2))) == 32
    assert (list(cache.tree._lru), cache.stats()) == (lru, before)


@pytest.mark.parametrize(("extra", "cached"), [(0, 32), (1, 64)])
def test_at_least_one_token_is_left_to_compute(extra, cached):
    cache = KVCache(30)
    run(cache, tokens(1, 2, 3))
    assert cache.begin(sequence(cache, tokens(1, 2, extra=extra))) == cached


def test_recomputed_last_page_is_deduped():
    """A prompt of whole pages computes its last page again and then points at the cached one."""
    cache = KVCache(12)
    first = run(cache, tokens(1, 2))
    second = run(cache, tokens(1, 2))
    assert second.num_cached == 32
    assert table(second) == table(first)
    assert cache.stats().deduped_tokens == {"low": 32, "low+a": 32}
    assert cache.pool.num_free == 6


def test_models_share_the_pages_of_their_shared_layers():
    cache = KVCache(20)
    a = run(cache, tokens(1, 2, extra=1), MODEL_A)
    b = sequence(cache, tokens(1, 2, extra=1), MODEL_B)
    assert cache.begin(b) == 0  # its upper layers are not cached: nothing is saved but memory
    compute(b)
    assert table(b)[:2] == [row[:2] + own[2:] for row, own in zip(table(a), table(b), strict=False)][:2]
    assert not set(table(b)[2]) & set(table(a)[2])
    assert cache.stats().deduped_tokens == {"low": 64, "low+a": 0, "low+b": 0}
    assert cache.stats().pages_cached == 2 * (2 + 1 + 1)
    cache.check_integrity([a, b])
    assert cache.probe(sequence(cache, tokens(1, 2, extra=1), MODEL_B)) == 64


def test_one_key_over_other_layers_is_another_segment():
    cache = KVCache(20)
    run(cache, tokens(1, extra=1), (Segment(0, 3, "k"),))
    assert cache.probe(sequence(cache, tokens(1, extra=1), (Segment(0, 2, "k"),))) == 0


def test_scopes_share_nothing():
    cache = KVCache(20)
    a = run(cache, tokens(1, 2), scope="a")
    b = run(cache, tokens(1, 2), scope="b")
    assert b.num_cached == 0
    assert not set(np.ravel(table(a))) & set(np.ravel(table(b)))
    assert sum(cache.stats().deduped_tokens.values()) == 0


def test_same_tokens_after_other_tokens_are_other_pages():
    cache = KVCache(20)
    run(cache, tokens(1, 2))
    assert cache.probe(sequence(cache, tokens(2, 2, extra=1))) == 0
    assert cache.probe(sequence(cache, tokens(1, 3, extra=1))) == 32


def test_generated_tokens_enter_the_tree():
    cache = KVCache(20)
    seq = run(cache, tokens(1, extra=31))
    seq.append_token(7)
    compute(seq)
    assert seq.num_tree_pages == 2
    longer = sequence(cache, [*tokens(1, extra=31), 7, 7])
    assert cache.begin(longer) == 64


def test_resumed_sequence_finds_prompt_and_generated_tokens():
    cache = KVCache(20)
    seq = run(cache, tokens(1, extra=31))
    for token in (7, 8):
        seq.append_token(token)
        compute(seq)
    before = table(seq)
    cache.release(seq)
    assert (seq.num_pages, seq.num_computed) == (0, 0)
    assert (seq.page_table == -1).all()
    seq.num_preemptions = 1
    assert cache.begin(seq) == 64
    assert table(seq) == [row[:2] for row in before]
    assert cache.stats().resumed_tokens == 64
    assert sum(cache.stats().hit_tokens.values()) == 0  # its own pages: no sharing to be proud of


def test_extend_skips_what_others_computed_meanwhile():
    cache = KVCache(40)
    prompt = tokens(1, 2, 3, 4, extra=1)
    slow = sequence(cache, prompt)
    cache.begin(slow)
    compute(slow, 32)
    fast = run(cache, prompt)
    assert cache.extend(slow) == 96
    assert (slow.num_computed, slow.num_cached) == (128, 96)
    assert table(slow) == [row[:4] for row in table(fast)]
    cache.check_integrity([slow, fast])


def test_extend_leaves_a_sequence_in_the_middle_of_a_page_alone():
    cache = KVCache(40)
    slow = sequence(cache, tokens(1, 2, extra=1))
    cache.begin(slow)
    compute(slow, 33)
    fast = run(cache, tokens(1, 2, extra=1))
    assert cache.extend(slow) == 0
    cache.check_integrity([slow, fast])


def test_extend_leaves_reserved_pages_alone():
    """They are there when the step that was to fill them failed."""
    cache = KVCache(40)
    slow = sequence(cache, tokens(1, 2, extra=1))
    cache.begin(slow)
    cache.reserve(slow, 32)
    fast = run(cache, tokens(1, 2, extra=1))
    assert cache.extend(slow) == 0
    compute(slow)
    assert table(slow)[0][:2] == table(fast)[0][:2]
    cache.check_integrity([slow, fast])


def test_without_prefix_caching_all_pages_are_own():
    cache = KVCache(12, prefix_caching=False)
    first = run(cache, tokens(1, 2))
    second = run(cache, tokens(1, 2))
    assert second.num_cached == 0
    assert cache.stats().pages_owned == 12
    cache.check_integrity([first, second])
    cache.release(first)
    cache.release(second)
    assert cache.pool.num_free == 12


# ---- release and eviction


def test_release_keeps_full_pages_cached_and_frees_the_rest():
    cache = KVCache(12)
    seq = run(cache, tokens(1, 2, extra=4))
    cache.release(seq)
    cache.release(seq)  # harmless
    stats = cache.stats()
    assert (stats.pages_free, stats.pages_cached, stats.pages_evictable) == (6, 6, 6)
    cache.check_integrity([])


def test_eviction_goes_from_the_last_page_and_the_top_segment():
    cache = KVCache(6)
    cache.release(run(cache, tokens(1, 2)))
    assert evicted_one_by_one(cache) == [("low+a", 5), ("low", 3), ("low+a", 2), ("low", 0)]


def test_eviction_order_is_least_recent_use_over_leaves():
    cache = KVCache(15)
    one = run(cache, tokens(1, 2))  # pages 0-2 (shared), 3-5
    two = run(cache, tokens(1, 3))  # 6-8
    three = run(cache, tokens(4))  # 9-11
    cache.release(two)
    cache.release(three)
    cache.release(one)  # the shared page 1 is as young as its youngest child
    expected = [("low+a", 8), ("low", 6), ("low+a", 11), ("low", 9)]
    expected += [("low+a", 5), ("low", 3), ("low+a", 2), ("low", 0)]
    assert evicted_one_by_one(cache) == expected


def test_use_makes_a_path_young_again():
    cache = KVCache(12)
    cache.release(run(cache, tokens(1)))
    cache.release(run(cache, tokens(2)))
    cache.release(run(cache, tokens(1, extra=1)))
    assert evicted_one_by_one(cache) == [("low+a", 5), ("low", 3), ("low+a", 2), ("low", 0)]


def test_layers_shared_by_models_outlive_those_of_one_model():
    cache = KVCache(8)
    a = run(cache, tokens(1), MODEL_A)
    b = run(cache, tokens(1), MODEL_B)
    cache.release(a)
    cache.release(b)
    assert [key for key, _ in evicted_one_by_one(cache)] == ["low+a", "low+b", "low"]


def test_pages_in_use_are_not_evicted():
    cache = KVCache(9)
    kept = run(cache, tokens(1, 2))
    cache.release(run(cache, tokens(1, 3)))
    assert cache.stats().pages_evictable == 3
    hog = sequence(cache, tokens(5, 6, 7, 8), ONE_LAYER)
    assert not cache.reserve(hog, 128)
    assert cache.reserve(hog, 96)
    assert cache.stats().evictions == 2
    cache.check_integrity([kept, hog])


def test_evicted_path_misses_from_the_evicted_page_on():
    cache = KVCache(9)
    cache.release(run(cache, tokens(1, 2, 3)))
    hog = run(cache, tokens(9)[:1], ONE_LAYER)
    again = sequence(cache, tokens(1, 2, 3, extra=1))
    assert cache.probe(again) == 64
    cache.release(hog)


def test_can_begin_does_not_count_its_own_hits_as_evictable():
    cache = KVCache(9)
    cache.release(run(cache, tokens(1, 2, 3)))
    assert cache.can_begin(sequence(cache, tokens(1, 2, 3)))
    assert not cache.can_begin(sequence(cache, tokens(1, 2, 3)), spare_pages=1)
    assert not cache.can_begin(sequence(cache, tokens(1, 2, 3, extra=1)))
    assert not cache.can_ever_hold(sequence(cache, tokens(1, 2, 3, extra=1)))
    assert cache.can_ever_hold(sequence(cache, tokens(1, 2, 3)))


def test_version_changes_when_the_tree_does():
    cache = KVCache(9)
    seen = [cache.version]
    seq = run(cache, tokens(1, 2))
    seen.append(cache.version)
    cache.release(seq)
    assert cache.version == seen[-1]
    assert cache.reserve(sequence(cache, tokens(5, 6)), 64)  # evicts
    seen.append(cache.version)
    assert len(set(seen)) == 3


# ---- keys and sequences


def test_page_keys_depend_on_scope_parent_and_tokens_only():
    cache = KVCache(9)
    keys = sequence(cache, tokens(1, 2)).page_keys(2)
    assert sequence(cache, tokens(1, 2, 3), MODEL_B).page_keys(2) == keys
    assert len(set(keys)) == 2
    assert {len(key) for key in keys} == {16}
    assert sequence(cache, tokens(1, 2), scope="x").page_keys(2)[0] != keys[0]
    assert sequence(cache, tokens(2, 2)).page_keys(2)[1] != keys[1]


def test_page_keys_grow_with_the_tokens():
    cache = KVCache(9)
    seq = sequence(cache, tokens(1, extra=1))
    assert len(seq.page_keys(1)) == 1
    for _ in range(31):
        seq.append_token(99)
    assert seq.page_keys(2) == sequence(cache, tokens(1, 99)).page_keys(2)
    assert seq.token_ids.tolist() == tokens(1, 99)


@pytest.mark.parametrize(
    "segments",
    [(), (Segment(1, 2, "k"),), (LOW, Segment(3, 4, "k")), (LOW, Segment(1, 4, "k")), (Segment(0, 0, "k"),)],
)
def test_segments_must_cover_the_layers(segments):
    with pytest.raises(ValueError, match="segment"):
        sequence(KVCache(9), [1], segments)


@pytest.mark.parametrize("prompt", [[], [[1, 2]]])
def test_prompt_must_be_a_list_of_ids(prompt):
    with pytest.raises(ValueError, match="shape"):
        sequence(KVCache(9), prompt)


# ---- check_integrity finds what is wrong


def _lose_a_page(cache, seq):
    cache.pool.num_free -= 1


def _own_a_page_twice(cache, seq):
    seq.page_table[0, 2] = seq.page_table[1, 2]


def _leave_the_tree(cache, seq):
    seq.page_table[0, 0] = seq.page_table[0, 2]


def _count_a_reference_too_many(cache, seq):
    seq.nodes[0][0].refs += 1


def _be_evictable_in_use(cache, seq):
    cache.tree._lru[seq.nodes[0][0]] = None


def _lose_an_evictable_node(cache, seq):
    cache.tree._lru.popitem()


def _evict_a_parent_first(cache, seq):
    cache.tree._lru.move_to_end(next(iter(cache.tree._lru)))


def _write_into_the_tree(cache, seq):
    seq.num_computed = 63


def _compute_beyond_the_pages(cache, seq):
    seq.num_computed = 97


def _miscount_cached(cache, seq):
    cache.tree.num_pages += 1


def _miscount_evictable(cache, seq):
    cache.tree.num_evictable_pages += 1


def _drop_a_parent(cache, seq):
    del cache.tree._segments[LOW].nodes[seq._page_keys[0]]


def _corrupt_an_id(cache, seq):
    seq.page_table[0, 2] = -1


@pytest.mark.parametrize(
    "damage",
    [
        _lose_a_page,
        _own_a_page_twice,
        _leave_the_tree,
        _count_a_reference_too_many,
        _be_evictable_in_use,
        _lose_an_evictable_node,
        _evict_a_parent_first,
        _write_into_the_tree,
        _compute_beyond_the_pages,
        _miscount_cached,
        _miscount_evictable,
        _drop_a_parent,
        _corrupt_an_id,
    ],
)
def test_check_integrity_finds(damage):
    cache = KVCache(30)
    seq = run(cache, tokens(1, 2, extra=1))
    cache.release(run(cache, tokens(5, 6)))
    cache.check_integrity([seq])
    damage(cache, seq)
    with pytest.raises(IntegrityError):
        cache.check_integrity([seq])


# ---- segments that change


def test_a_segment_that_splits_keeps_pages_references_and_order():
    cache = KVCache(60)
    whole, low, high = Segment(0, 3, "a"), Segment(0, 2, "low"), Segment(2, 3, "a", "out")
    held = run(cache, tokens(1, 2), (whole,))
    for pages in ((3, 4), (5,)):
        cache.release(run(cache, tokens(*pages), (whole,)))
    before = table(held)
    cache.reshape(
        {low: [(whole, slice(0, 2))], high: [(whole, slice(2, 3))]}, {(whole,): (low, high)}, [held]
    )
    cache.check_integrity([held])
    assert (table(held), held.segments, [len(path) for path in held.nodes]) == (before, (low, high), [2, 2])
    assert cache.probe(sequence(cache, tokens(3, 4, extra=1), (low, high))) == 64
    other = Segment(2, 3, "b", "out")
    assert cache.probe(sequence(cache, tokens(3, 4, extra=1), (low, other))) == 0  # no hidden states
    cache.release(held)
    cache.check_integrity([])
    order = [key for key, _ in evicted_one_by_one(cache)]
    # who came last goes last, and of a page the upper layers first
    assert order == ["a", "low"] * 5


def test_segments_that_merge_keep_what_both_have():
    cache = KVCache(60)
    low, high, other = Segment(0, 2, "low"), Segment(2, 3, "a"), Segment(2, 3, "b")
    whole = Segment(0, 3, "a")
    held = run(cache, tokens(1, 2), (low, high))
    cache.release(run(cache, tokens(1, 2, 3), (low, other)))  # shares two pages of the lower layers
    cache.release(run(cache, tokens(7), (low, high)))
    before, free = table(held), cache.pool.num_free
    cache.reshape({whole: [(low, slice(0, 2)), (high, slice(0, 1))]}, {(low, high): (whole,)}, [held])
    cache.check_integrity([held])
    assert (table(held), held.segments) == (before, (whole,))
    assert cache.pool.num_free == free + 3 + 2  # the upper layer of b, and the third page below it
    assert cache.probe(sequence(cache, tokens(7, extra=1), (whole,))) == 32
    assert cache.probe(sequence(cache, tokens(1, 2, 3, extra=1), (whole,))) == 64
    assert cache.stats().hit_tokens == cache.stats().deduped_tokens == {whole.key: 0}
    assert cache.stats().layer_hit_tokens["0-1"] == 0


def test_a_sequence_that_enters_late_cannot_go_over_to_a_merged_segment():
    cache = KVCache(60, boundaries=BoundaryCache(1 << 20))
    low, high, other = Segment(0, 2, "low"), Segment(2, 3, "a", "out"), Segment(2, 3, "b", "out")
    first = run(cache, tokens(1, 2, extra=1), (low, high))
    cache.boundaries.record(first, "out", 0, np.zeros((64, 4), np.float32))
    late = sequence(cache, tokens(1, 2, extra=1), (low, other))
    cache.begin(late)
    assert [len(path) for path in late.nodes] == [2, 0]
    split = {low: [(low, slice(0, 2))], other: [(other, slice(0, 1))]}
    merged = {Segment(0, 3, "b"): [(low, slice(0, 2)), (other, slice(0, 1))]}
    assert path_lengths(late, (low, other), split) is None  # its hidden states are still to enter
    assert path_lengths(late, tuple(merged), merged) is None
    assert cache.reserve(late, late.num_tokens)
    late.num_computed = late.num_tokens
    assert path_lengths(late, (low, other), split) == [2, 0]  # it has run: as where KV is approximate
    assert path_lengths(late, tuple(merged), merged) is None
    assert path_lengths(first, (low, high), {low: split[low], high: [(high, slice(0, 1))]}) == [2, 2]


def test_documents_and_their_pages_go_over_to_other_segments():
    cache = KVCache(60)
    whole, low, high = Segment(0, 3, "a"), Segment(0, 2, "low"), Segment(2, 3, "a")
    seq = TokenSequence("d", "m", cache, (whole,), "", tokens(1, 2), 0.0, publishes=True)
    cache.begin(seq)
    publication = cache.publish(compute(seq), 64, 0)
    cache.release(seq)
    cache.reshape({low: [(whole, slice(0, 2))], high: [(whole, slice(2, 3))]}, {(whole,): (low, high)}, [])
    cache.check_integrity([])
    assert cache.stats().published_pages == 6
    assert cache.begin(sequence(cache, tokens(1, 2, extra=1), (low, high), scope="any")) == 64
    cache.withdraw(publication)
    assert cache.stats().published_pages == 0


def test_a_cache_shrinks_by_what_nobody_uses():
    cache = KVCache(12, capacity=20)
    held = run(cache, tokens(1, 2))  # 6 pages
    cache.release(run(cache, tokens(5)))
    assert cache.resize(2).size == 6
    cache.check_integrity([held])
    assert (cache.pool.num_pages, cache.stats().pages_cached) == (6, 6)
    assert cache.resize(20).size == 0
    cache.check_integrity([held])
    assert cache.pool.num_free == 14
