"""What is chosen to be computed anew, without an engine."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.approx.config import ReuseConfig, Selector, Unit
from blockzoo.runtime.approx.first_pass import FirstPass, relative_deviation
from blockzoo.runtime.approx.selection import highest, lines_of_highest, within_budget


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.booleans())
def test_the_highest_scores_up_to_the_share(seed: int, share: float, aligned: bool) -> None:
    rng = np.random.default_rng(seed)
    matched = rng.random(200) < 0.7
    scores = rng.random(200)
    chosen = highest(scores, matched, share, aligned)
    unit = PAGE_TOKENS if aligned else 1
    assert not (chosen & ~matched).any()
    wanted = share * matched.sum()
    assert wanted <= chosen.sum() < wanted + unit or chosen.sum() == matched.sum()
    pages = np.arange(200) // unit
    for page in np.unique(pages[chosen]):  # whole pages
        assert (chosen == matched)[pages == page].all()
    sums = np.bincount(pages, np.where(matched, scores, 0))
    worst = sums[np.unique(pages[chosen])].min()
    assert (np.delete(sums, np.unique(pages[chosen])) <= worst).all()


def test_what_has_no_score_is_not_chosen() -> None:
    scores = np.zeros(100)
    scores[40:43] = 1
    chosen = highest(scores, np.ones(100, bool), 0.5, False)
    assert np.flatnonzero(chosen).tolist() == [40, 41, 42]


def test_lines_around_what_is_pointed_at() -> None:
    matched = np.ones(200, bool)
    matched[:20] = False
    line_ends = np.zeros(200, bool)
    line_ends[[15, 29, 38, 90]] = True
    scores = np.zeros(200)
    scores[[34, 10, 36, 25, 150, 60]] = [9, 8, 7, 6, 5, 4]  # 10 is not matched, 36 is in the line of 34

    def chosen(share: float) -> list[int]:
        return np.flatnonzero(lines_of_highest(scores, matched, share, line_ends)).tolist()

    line, part, long = [*range(30, 39)], [*range(20, 30)], [*range(134, 167)]
    assert chosen(9 / 180) == line
    assert chosen(10 / 180) == sorted(line + part)  # of the second line what is matched
    assert chosen(20 / 180) == sorted(line + part + long)  # at most 16 to either side
    assert chosen(1.0) == sorted(line + part + long + [*range(44, 77)])  # nothing that has no score


def made(config: ReuseConfig, matched: np.ndarray, start: int) -> FirstPass:
    budget = ceil(config.recompute * matched.sum())
    return FirstPass(config, matched, np.zeros_like(matched), start, np.zeros_like(matched), budget)


def first_pass(selector: Selector, rounds: int = 1, recompute: float = 0.1) -> FirstPass:
    """Of 320 tokens: 10 of an exact prefix, unmatched ones, matched from 20 to 300, a question."""
    matched = np.zeros(320, bool)
    matched[20:300] = True
    config = ReuseConfig(selector=selector, rounds=rounds, recompute=recompute, pointed=1.0, unit="token")
    return made(config, matched, 10)


def test_the_question_looks_and_nothing_else() -> None:
    found = first_pass("query", rounds=2)
    assert [found.window(*rows) for rows in ((10, 20), (280, 310), (300, 320), (315, 320))] == [0, 10, 20, 5]
    scores = np.zeros(320, np.float32)
    scores[100:114] = 40.0
    scores[310] = 1000.0  # itself
    found.add_scores(scores, 20)
    assert found.importance[100] == 2.0
    first = found.conclude(lambda: np.empty(0))
    assert np.flatnonzero(first).tolist() == list(range(100, 114))
    assert not found.done
    assert found.window(100, 114) == 14  # what it chose looks too
    more = np.zeros(114, np.float32)
    more[50:64] = 100.0
    found.add_scores(more, 14)
    second = found.conclude(lambda: np.empty(0))
    assert np.flatnonzero(second).tolist() == [*range(50, 64), *range(100, 114)]
    assert found.done
    assert found.window(300, 320) == 0


def test_what_is_looked_at_sharply_comes_before_what_is_near_or_spread() -> None:
    matched = np.ones(320, bool)
    matched[300:] = False
    config = ReuseConfig(recompute=0.1, head=0, pointed=1.0, unit="page")
    found = made(config, matched, 0)
    scores = np.zeros(320, np.float32)
    scores[70] = 2.0  # pointed at
    scores[128:160] = 0.2  # more in all, on no token in particular
    scores[292:300] = 5.0  # near
    found.add_scores(scores, 1)
    chosen = found.conclude(lambda: np.empty(0))
    assert np.flatnonzero(chosen).tolist() == list(range(64, 96))
    everything = made(replace(config, recompute=0.99), matched, 0)
    everything.add_scores(scores + 0.01, 1)
    assert everything.conclude(lambda: np.empty(0)).sum() == 300


def test_deviations_are_weighed_by_importance() -> None:
    old = np.ones((280, 2, 4), np.float32)
    new = old.copy()
    new[5] += 3.0
    new[200:228] += 1.0
    assert relative_deviation(old, new)[[4, 5, 200]].tolist() == [0.0, 0.75, 0.5]
    for selector, expected in (
        ("deviation", [25, *range(220, 247)]),
        ("importance*deviation", [*range(220, 248)]),
    ):
        found = first_pass(selector)  # type: ignore[arg-type]
        found.old_values = old
        scores = np.zeros(320, np.float32)
        scores[220:248] = 1.0
        found.add_scores(scores, 1)
        assert np.flatnonzero(found.conclude(lambda: new)).tolist() == expected
    calm = first_pass("deviation")
    calm.old_values = old
    assert not calm.conclude(lambda: old).any()


@pytest.mark.parametrize("selector", ["query", "deviation"])
def test_what_runs_first(selector: Selector) -> None:
    found = first_pass(selector)
    assert int(found.first_reused().sum()) == (280 if selector == "query" else 0)
    assert found.exits == (selector == "deviation")
    assert found.restart == (319 if selector == "query" else 10)


@pytest.mark.parametrize(
    ("wanted", "budget", "expected"),
    [
        ([8, 8, 8], 36, [8, 8, 8]),
        ([8, 32, 8], 36, [8, 20, 8]),
        ([8, 8, 8], 12, [4, 4, 4]),
        ([8, 0, 8], 0, [0, 0, 0]),
    ],
)
def test_fronts_keep_to_the_budget(wanted: list[int], budget: int, expected: list[int]) -> None:
    assert within_budget(wanted, budget) == expected


def test_what_is_computed_in_any_case_is_of_the_share() -> None:
    matched = np.ones(300, bool)
    anew = np.zeros(300, bool)
    anew[:20] = True
    for pointed, expected in ((1.0, 30), (0.02, 26)):
        config = ReuseConfig(recompute=0.1, pointed=pointed, unit="token")
        found = FirstPass(config, matched, anew, 0, np.zeros(300, bool), 30)
        found.add_scores(np.arange(300, dtype=np.float32), 1)
        chosen = found.conclude(lambda: np.empty(0))
        assert chosen[:20].all()
        assert chosen.sum() == expected


@pytest.mark.parametrize("unit", ["line", "page", "token"])
def test_what_is_computed_in_any_case_is_counted_once(unit: Unit) -> None:
    matched = np.ones(300, bool)
    anew = np.zeros(300, bool)
    anew[:20] = True
    config = ReuseConfig(recompute=0.999, pointed=1.0, unit=unit)
    found = FirstPass(config, matched, anew, 0, np.zeros(300, bool), 300)
    found.add_scores(np.ones(300, np.float32), 1)
    assert found.conclude(lambda: np.empty(0)).all()
