"""What of the runs that a prompt takes over is computed anew before anything is looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.sequence import Segment, TokenSequence

CHAIN = (Segment(0, 2, "all"),)
KNOWN = list(range(1000, 1320))
NEW = list(range(70))


def sequence(cache: KVCache, prompt: Sequence[int], reuse: ReuseConfig | None = None) -> TokenSequence:
    return TokenSequence("r", "m", cache, CHAIN, "s", prompt, 0.0, "approx", approximate=reuse)


def compute(cache: KVCache, prompt: Sequence[int]) -> None:
    """Make a donor."""
    donor = sequence(cache, prompt)
    cache.begin(donor)
    assert cache.reserve(donor, donor.num_tokens)
    donor.num_computed = donor.num_tokens
    cache.commit(donor)
    cache.release(donor)


@pytest.fixture
def cache() -> KVCache:
    """With a donor."""
    cache = KVCache(100, reuse=ReuseConfig(head=4, edit=40, recompute=0.5, edit_recompute=0.5))
    compute(cache, KNOWN)
    return cache


def fronts(cache: KVCache, prompt: Sequence[int], reuse: ReuseConfig | None = None) -> list[int]:
    """Positions that are computed anew whatever is seen."""
    seq = sequence(cache, prompt, reuse)
    cache.begin(seq)
    assert cache.borrow(seq)
    assert seq.approx is not None
    assert seq.approx.first_pass is not None
    found: list[int] = np.flatnonzero(seq.approx.first_pass.anew).tolist()
    cache.take_borrowed(seq)
    cache.release(seq)
    cache.check_integrity([])
    return found


def test_the_head_of_what_stands_behind_other_words(cache: KVCache) -> None:
    assert fronts(cache, NEW + KNOWN[40:200] + NEW) == [70, 71, 72, 73]
    two = NEW + KNOWN[200:260] + NEW[:5] + KNOWN[40:100] + NEW  # in another order: no edit
    assert fronts(cache, two) == [70, 71, 72, 73, 135, 136, 137, 138]


def test_a_window_behind_an_edit(cache: KVCache) -> None:
    changed = KNOWN[:100] + NEW[:6] + KNOWN[104:300] + NEW  # behind an exact prefix of 96
    assert fronts(cache, changed) == list(range(106, 146))
    moved = NEW + KNOWN[40:100] + NEW[:6] + KNOWN[104:300] + NEW
    assert fronts(cache, moved) == [*range(70, 74), *range(136, 176)]
    cut = KNOWN[:96] + KNOWN[110:300] + NEW
    assert fronts(cache, cut) == list(range(96, 136))


def test_an_edit_among_the_first_words(cache: KVCache) -> None:
    """Of fewer tokens than a page, so that there is no exact prefix."""
    assert fronts(cache, KNOWN[:9] + NEW[:6] + KNOWN[13:200] + NEW) == list(range(15, 55))
    assert fronts(cache, NEW[:6] + KNOWN[6:200] + NEW) == list(range(6, 10))  # another first token: no edit


def test_by_default_only_what_stands_behind_edits_is_taken_over(cache: KVCache) -> None:
    def taken(prompt: Sequence[int]) -> int:
        seq = sequence(cache, prompt, ReuseConfig(edit=8))
        cache.begin(seq)
        count: int = cache.borrow(seq)
        cache.release(seq)
        return count

    assert taken(KNOWN[:100] + NEW[:6] + KNOWN[104:300] + NEW) == 196
    assert taken(KNOWN[:40] + NEW[:6] + KNOWN[44:150] + NEW[:3] + KNOWN[150:300] + NEW) == 106 + 150
    assert taken(NEW + KNOWN[40:300] + NEW) == 0
    assert taken(NEW + KNOWN[40:200] + NEW[:6] + KNOWN[204:300] + NEW) == 0  # an edit behind other words
    assert taken(KNOWN[:40] + KNOWN[150:300] + KNOWN[50:150] + NEW) == 0  # in another order


def test_no_front_where_all_words_before_are_the_same(cache: KVCache) -> None:
    assert fronts(cache, KNOWN[:115] + NEW[:6] + KNOWN[119:300] + NEW) == list(range(121, 161))


def test_less_is_computed_behind_an_edit(cache: KVCache) -> None:
    reuse = ReuseConfig(head=4, edit=40, recompute=0.5, edit_recompute=0.1)
    assert len(fronts(cache, KNOWN[:100] + NEW[:6] + KNOWN[104:300] + NEW, reuse)) == 20  # of 196
    assert fronts(cache, NEW + KNOWN[40:200] + NEW, reuse) == [70, 71, 72, 73]


def test_donors_that_are_gone_hide_none_that_are_there(cache: KVCache) -> None:
    """The longer a cache lives, the more of the prompts that it remembers have lost their pages."""
    for number in range(5):
        compute(cache, list(range(2000 + 1500 * number, 3500 + 1500 * number)))  # takes nearly all pages
        compute(cache, list(range(100 * number + 100, 100 * number + 140)) + KNOWN[:200])
    seq = sequence(cache, NEW[::-1] + KNOWN[20:140] + NEW)
    cache.begin(seq)
    assert cache.borrow(seq) >= 120
    cache.take_borrowed(seq)
    cache.release(seq)


def test_a_sequence_may_have_settings_of_its_own(cache: KVCache) -> None:
    own = ReuseConfig(head=7, recompute=0.5)
    assert fronts(cache, NEW + KNOWN[40:200] + NEW, own) == list(range(70, 77))
    assert fronts(cache, NEW + KNOWN[40:200] + NEW) == [70, 71, 72, 73]
