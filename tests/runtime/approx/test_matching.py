"""Matching, selection, pieces and rotation of approximate reuse, without an engine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.approx.matching import Donor, DonorIndex, Donors, Run, window_hashes
from blockzoo.runtime.approx.selection import pieces, reused_positions


def everything(donor):
    return donor.token_ids.size


RNG = np.random.default_rng(0)


def tokens(count: int, seed: int = 0, vocab: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count, dtype=np.int32)


def test_equal_windows_hash_alike_wherever_they_are():
    a, b = tokens(100), np.concatenate([tokens(7, 1), tokens(100)])
    assert (window_hashes(a, 16) == window_hashes(b, 16)[7:]).all()
    assert np.unique(window_hashes(tokens(5000, vocab=4), 16)).size > 4900
    assert window_hashes(a[:15], 16).size == 0


def test_a_shifted_document_is_found_whole():
    donor, prompt = tokens(320), np.concatenate([tokens(50, 1), tokens(320)[40:300], tokens(30, 2)])
    index = DonorIndex(16)
    index.add(1, Donor(donor, ()))
    assert index.match(prompt, 0, prompt.size - 1) == [Run(50, 260, 1, 40)]
    assert index.match(prompt, 100, 200) == [Run(100, 100, 1, 90)]
    assert index.remove(1)
    assert index.match(prompt, 0, prompt.size) == []


def test_each_token_goes_with_its_longest_run():
    words = tokens(256)
    index = DonorIndex(16)
    index.add(1, Donor(words[:128], ()))
    index.add(2, Donor(words[64:], ()))
    assert index.match(words, 0, 256) == [Run(0, 64, 1, 0), Run(64, 192, 2, 0)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 8))
def test_runs_are_what_they_say(seed, vocab, window):
    rng = np.random.default_rng(seed)
    index = DonorIndex(window)
    donors = [rng.integers(0, vocab, int(rng.integers(1, 5)) * 32, dtype=np.int32) for _ in range(3)]
    for number, donor in enumerate(donors):
        index.add(number, Donor(donor, ()))
    piece = donors[0][5 : 5 + 2 * window - 1]  # always found
    prompt = np.concatenate([rng.integers(0, vocab, 20, dtype=np.int32), piece])
    runs = index.match(prompt, 3, prompt.size)
    covered = np.zeros(prompt.size, int)
    for run in runs:
        assert run.length >= window
        theirs = donors[run.donor][run.donor_start : run.donor_start + run.length]
        assert (prompt[run.start : run.start + run.length] == theirs).all()
        covered[run.start : run.start + run.length] += 1
    assert covered.max() <= 1
    assert covered[:3].sum() == 0
    assert covered.any()


def test_donors_are_bounded_kept_apart_and_known_once():
    donors = Donors(ReuseConfig(max_donors=2))
    for number in range(3):
        words = tokens(64, number)
        for _ in range(2):
            donors.add("red", words, [b"first", bytes([number])])
    assert len(donors) == 2
    assert donors.match("red", tokens(64, 0), 0, 64, everything) == []
    assert [run for run, _ in donors.match("red", tokens(64, 2), 0, 64, everything)] == [Run(0, 64, 3, 0)]
    assert donors.match("blue", tokens(64, 2), 0, 64, everything) == []


@pytest.mark.parametrize("selector", ["head-of-run", "random"])
@pytest.mark.parametrize("unit", ["line", "page", "token"])
def test_the_share_of_recomputed_tokens(selector, unit):
    runs = [(10, 600), (700, 300)]
    for share in (0.0, 0.1, 0.5, 1.0):
        config = ReuseConfig(recompute=share, selector=selector, unit=unit)
        reused = reused_positions(runs, [share, share], 1024, config)
        assert reused[:10].sum() == reused[610:700].sum() == reused[1000:].sum() == 0
        assert abs(int(reused.sum()) - (1 - share) * 900) <= (2 if unit == "token" else 3 * PAGE_TOKENS)
        if share in (0.0, 1.0):
            assert int(reused.sum()) == round((1 - share) * 900)


def test_each_run_has_a_share_of_its_own():
    config = ReuseConfig(selector="head-of-run", unit="token")
    reused = reused_positions([(10, 600), (700, 300)], [0.1, 0.5], 1024, config)
    assert np.flatnonzero(reused).tolist() == [*range(70, 610), *range(850, 1000)]


@given(st.sets(st.integers(0, 199), min_size=1))
def test_pieces_cover_every_position_and_harm_no_page(chosen):
    positions = np.array(sorted(chosen))
    cut = pieces(positions, 200)
    assert [p for start, end in cut for p in range(start, end)] == positions.tolist()
    for start, end in cut:
        assert end - start == 1 or end % PAGE_TOKENS == 0 or end == 200


@pytest.mark.parametrize(
    "setting", [{"recompute": 1.1}, {"refresh": -1}, {"window": 1}, {"selector": "best"}, {"min_share": -0.1}]
)
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ReuseConfig(**setting)
