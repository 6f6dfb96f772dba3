"""Published pages: who finds them, what is made behind them, how long they stay."""

import numpy as np
import pytest

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.approx.matching import Donor, Run
from blockzoo.runtime.kv.pool import IntegrityError
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.published_donors import PublishedDonors, without_overlap
from blockzoo.runtime.kv.published_pages import Publication
from blockzoo.runtime.kv.sequence import Segment, TokenSequence

LOW = Segment(0, 2, "low")
MODEL_A = (LOW, Segment(2, 3, "low+a"))
MODEL_B = (LOW, Segment(2, 3, "low+b"))
DOCUMENT = list(range(100, 175))  # two pages and 11 tokens
FILLED = DOCUMENT + [0] * (96 - 75)


def sequence(cache, prompt, scope="red", segments=MODEL_A, documents=()) -> TokenSequence:
    return TokenSequence("r", "m", cache, segments, scope, prompt, 0.0, documents=documents)


def compute(seq: TokenSequence) -> TokenSequence:
    """Pretend that the engine wrote the KV of all tokens."""
    cache = seq.cache
    cache.copy_partial(seq)
    cache.take_copies(seq)
    assert cache.reserve(seq, seq.num_tokens)
    seq.num_computed = seq.num_tokens
    cache.commit(seq)
    return seq


def run(cache, prompt, scope="red", segments=MODEL_A) -> int:
    """Serve a prompt; the tokens it found."""
    seq = sequence(cache, prompt, scope, segments)
    cache.begin(seq)
    compute(seq)
    found = seq.num_cached
    cache.release(seq)
    cache.check_integrity([])
    return found


def publish(cache, tokens=FILLED, num_tokens=75, segments=MODEL_A) -> Publication:
    seq = TokenSequence("p", "m", cache, segments, "", tokens, 0.0, publishes=True)
    cache.begin(seq)
    assert cache.reserve(seq, seq.num_tokens)
    seq.num_computed = seq.num_tokens
    cache.commit(seq)
    publication = cache.publish(seq, num_tokens, lead=0)
    cache.release(seq)
    cache.check_integrity([])
    return publication


def test_every_scope_finds_a_document_and_its_last_part_of_a_page():
    cache = KVCache(60)
    publish(cache)
    for scope in ("red", "blue", ""):
        assert run(cache, [*DOCUMENT, 7, 8, 9], scope) == 75
    assert cache.stats().published_hit_tokens == 3 * 64
    assert run(cache, DOCUMENT[:64], "green") == 63  # all but the token whose logits are needed


def test_what_stands_behind_a_document_stays_in_its_scope():
    cache = KVCache(60)
    publish(cache)
    secret = DOCUMENT[:64] + list(range(500, 540))
    assert run(cache, secret, "red") == 64
    assert run(cache, secret, "blue") == 64
    assert run(cache, secret, "red") == 96  # its own page too
    assert run(cache, DOCUMENT[:64] + list(range(500, 520)), "green") == 64  # nor a part of one's page


def test_a_request_is_never_taken_for_a_document():
    """The same tokens before, while and after they are published."""
    cache = KVCache(60)
    run(cache, [*FILLED, 7], "red")
    assert run(cache, [*FILLED, 7], "blue") == 0
    publication = publish(cache)
    own = {int(page) for node in publication.nodes for page in node.pages}
    assert run(cache, [*FILLED, 7], "blue") == 96
    cache.withdraw(publication)
    assert run(cache, [*FILLED, 7], "green") == 0
    again = publish(cache)
    assert {int(page) for node in again.nodes for page in node.pages} == own  # what the operator left


def test_a_document_of_one_chain_is_none_of_another():
    cache = KVCache(60)
    publish(cache, segments=MODEL_A)
    prompt = [*FILLED, 7]
    assert run(cache, prompt, "red", MODEL_B) == 0
    assert run(cache, prompt, "blue", MODEL_B) == 0
    first = cache.tree.num_pages
    publish(cache, segments=MODEL_B)
    assert cache.tree.num_pages == first + 3  # the lower layers are there
    assert run(cache, prompt, "blue", MODEL_B) == 96


def test_documents_outlast_everything_else():
    cache = KVCache(12)
    publication = publish(cache)  # 9 pages
    for start in range(1000, 5000, 1000):
        assert run(cache, list(range(start, start + 33)), "red", (Segment(0, 1, "hog"),)) == 0
    assert cache.tree.evictions > 0
    assert run(cache, FILLED[:40], "blue") == 39
    assert cache.published.num_pages == 9
    cache.withdraw(publication)
    assert cache.published.num_pages == 0
    run(cache, list(range(32 * 12)), "red", (Segment(0, 1, "hog"),))
    assert cache.stats().pages_cached == 12
    assert run(cache, FILLED[:40], "blue") == 0


def test_a_withdrawn_document_is_not_made_anew_by_a_request():
    """A request that began on published pages and ends, all of them evicted, on one that is not any more."""
    cache = KVCache(30)
    publication = publish(cache, FILLED[:64], 64)
    seq = sequence(cache, FILLED[:64])
    assert cache.begin(seq) == 32
    cache.withdraw(publication)
    (last,) = (node for node in publication.nodes if node.token_ids[0] == 132 and node.tree.segment == LOW)
    hog = sequence(cache, list(range(32 * 27)), "blue", (Segment(0, 1, "hog"),))
    cache.begin(hog)
    assert cache.reserve(hog, hog.num_tokens)
    assert last.key not in last.tree.nodes
    cache.release(hog)
    compute(seq)
    assert last.key not in last.tree.nodes
    cache.check_integrity([seq])
    cache.release(seq)
    cache.check_integrity([])


def test_equal_documents_are_stored_once_and_kept_for_the_last():
    cache = KVCache(30)
    first, second = publish(cache), publish(cache)
    assert cache.published.num_pages == 9
    cache.withdraw(first)
    assert run(cache, [*FILLED, 7]) == 96
    cache.withdraw(second)
    assert run(cache, [*FILLED, 7], "blue") == 0
    assert cache.published.num_pages == 0


def test_waiting_requests_learn_what_is_published_meanwhile():
    cache = KVCache(60)
    seq = sequence(cache, [*FILLED, 7])
    assert cache.probe(seq) == 0
    publication = publish(cache)
    assert cache.probe(seq) == 96
    cache.withdraw(publication)
    assert cache.probe(seq) == 0


def test_a_lost_page_is_noticed():
    cache = KVCache(60)
    publication = publish(cache)
    leaf = publication.nodes[-1]
    leaf.tree.remove(leaf)
    cache.pool.free(leaf.pages)
    cache.tree.num_pages -= leaf.pages.size
    with pytest.raises(IntegrityError, match="published page has left"):
        cache.check_integrity([])


# ---- as donors of approximate reuse


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 2048, count).tolist()


def test_donors_of_another_scope_end_where_the_document_ends():
    config = ReuseConfig(recompute=0.0, head=0, window=8, min_share=0.1)
    cache = KVCache(200, reuse=config)
    document = words(1, 75)
    publish(cache, document + [0] * 21)
    secret = words(2, 60)
    run(cache, document + secret, "red")
    for scope, expected in (("blue", 75), ("red", 75 + 53)):  # whole pages of red's own
        seq = TokenSequence("r", "m", cache, MODEL_A, scope, words(3, 40) + document + secret, 0.0, "approx")
        cache.begin(seq)
        assert cache.borrow(seq) == expected
        cache.take_borrowed(seq)
        cache.release(seq)
        cache.check_integrity([])


def test_a_marked_document_is_found_whole_whatever_its_length():
    publication = Publication(MODEL_A, np.array([1, *range(50, 60)], np.int32), 1, (), ())
    donors = PublishedDonors(window=16)
    donors.add(publication)
    prompt = [1, 7, 7, *range(50, 60), 8]
    marked = sequence(KVCache(3), prompt, documents=[(3, 13)])
    assert [run for run, _ in donors.match(marked, 0, 13)] == [Run(3, 10, 0, 1)]
    assert donors.match(sequence(KVCache(3), prompt), 0, 13) == []
    assert donors.match(sequence(KVCache(3), prompt, segments=MODEL_B, documents=[(3, 13)]), 0, 13) == []
    assert donors.match(marked, 4, 13) == []  # its first token is not wanted
    donors.remove(publication)
    assert donors.match(marked, 0, 13) == []


def test_each_token_goes_with_the_longest_run():
    donor = Donor(np.empty(0, np.int32), ())
    found = [(Run(0, 30, 1, 100), donor), (Run(20, 50, 2, 0), donor), (Run(60, 14, 3, 5), donor)]
    kept = [run for run, _ in without_overlap(found, 10)]
    assert kept == [Run(0, 20, 1, 100), Run(20, 50, 2, 0)]
    assert without_overlap([], 10) == []


def test_pages_are_of_32_tokens():
    assert PAGE_TOKENS == 32  # FILLED counts on it
