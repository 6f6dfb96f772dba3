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


def computed(cache: KVCache, prompt: Sequence[int], reuse: ReuseConfig | None = None) -> list[int]:
    """Positions that run, up to the end that no donor has, where nothing is looked at."""
    seq = sequence(cache, prompt, reuse)
    cache.begin(seq)
    assert cache.borrow(seq)
    assert seq.approx is not None
    assert seq.approx.first_pass is None
    found: list[int] = seq.approx.fresh(seq.num_cached, len(prompt) - len(NEW)).tolist()
    cache.take_borrowed(seq)
    cache.release(seq)
    cache.check_integrity([])
    return found


def test_the_head_of_what_stands_behind_other_words(cache: KVCache) -> None:
    assert fronts(cache, NEW + KNOWN[40:200] + NEW) == [70, 71, 72, 73]
    two = NEW + KNOWN[200:260] + NEW[:5] + KNOWN[40:100] + NEW  # in another order: no edit
    assert fronts(cache, two) == [70, 71, 72, 73, 135, 136, 137, 138]


def test_a_window_behind_an_edit() -> None:
    """Up to the end of a page: what is short of it would run token by token."""
    cache = KVCache(100, reuse=ReuseConfig(head=4, edit=40, recompute=0.5, edit_recompute=0.1))
    compute(cache, KNOWN)
    changed = KNOWN[:100] + NEW[:6] + KNOWN[104:300] + NEW  # behind an exact prefix of 96
    assert computed(cache, changed) == list(range(96, 128))  # a tenth of 196 is 20
    wide = ReuseConfig(edit_recompute=0.2)
    assert computed(cache, changed, wide) == list(range(96, 160))
    cut = KNOWN[:96] + KNOWN[110:300] + NEW
    assert computed(cache, cut) == list(range(96, 128))
    naive = ReuseConfig(recompute=0.0)
    assert computed(cache, changed, naive) == list(range(96, 106))


def test_edits_share_what_is_computed(cache: KVCache) -> None:
    twice = KNOWN[:96] + NEW[:6] + KNOWN[96:150] + NEW[:3] + KNOWN[150:300] + NEW
    assert computed(cache, twice, ReuseConfig(edit_recompute=0.1)) == [*range(96, 128), *range(156, 192)]
    # 21 of 204: 10 and 10, to the end of a page


def test_a_window_behind_an_edit_within_moved_words(cache: KVCache) -> None:
    moved = NEW + KNOWN[40:100] + NEW[:6] + KNOWN[104:300] + NEW
    assert fronts(cache, moved) == [*range(70, 74), *range(136, 192)]


def test_an_edit_among_the_first_words(cache: KVCache) -> None:
    """Of fewer tokens than a page, so that there is no exact prefix."""
    early = KNOWN[:9] + NEW[:6] + KNOWN[13:200] + NEW
    assert computed(cache, early, ReuseConfig(edit_recompute=0.1)) == list(range(64))
    assert fronts(cache, NEW[:6] + KNOWN[6:200] + NEW) == list(range(6, 10))  # another first token: no edit


def test_by_default_only_what_stands_behind_edits_is_taken_over(cache: KVCache) -> None:
    def taken(prompt: Sequence[int]) -> int:
        seq = sequence(cache, prompt, ReuseConfig(edit_recompute=0.0))
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
    compute(cache, KNOWN[:115] + list(range(2000, 2016)) + NEW)
    same = KNOWN[:115] + NEW[:6] + KNOWN[119:300] + NEW  # 96 to 115 stand behind what they stood behind
    assert computed(cache, same, ReuseConfig(edit_recompute=0.01)) == list(range(115, 128))


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
