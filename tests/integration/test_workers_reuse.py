"""Approximate reuse over workers: what one process takes over, looks at and refreshes, two do as well."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from over_workers import SETTINGS, group_of
from quiet import words
from test_approximate import approximated, composed, some_of

from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.approx.config import ReuseConfig, Selector
from blockzoo.runtime.workers import distributed

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
LONG = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=0)
SELECTORS: list[Selector] = ["query", "head-of-run", "deviation", "importance*deviation", "random"]
REUSE = ReuseConfig(selector="importance*deviation", recompute=0.3)
DOCUMENT = words(150, 1)
DONOR = words(20, 2) + DOCUMENT + words(30, 3)
PROMPT = words(37, 4) + DOCUMENT + words(25, 5)


@pytest.fixture(scope="module")
def local(demo_zoo: Path) -> LLMEngine:
    return LLMEngine(demo_zoo, EngineConfig(approximate=REUSE, **SETTINGS))


@pytest.fixture(scope="module")
def spread(demo_zoo: Path) -> Iterator[LLMEngine]:
    engine = LLMEngine(demo_zoo, EngineConfig(workers=2, approximate=REUSE, **SETTINGS))
    yield engine
    engine.close()


Answer = tuple[list[int], list[float]]


def answers(engine: LLMEngine, jobs: list[tuple[str, list[int], str]], scope: str = "") -> list[Answer]:
    """Tokens and their log-probabilities, of requests that run side by side."""
    for index, (model, prompt, how) in enumerate(jobs):
        engine.add_request(str(index), model, prompt, GREEDY, scope, kv_reuse=how)
    found: list[Answer] = [([], []) for _ in jobs]
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None, output.error
            tokens, logprobs = found[int(output.request_id)]
            tokens += output.token_ids
            logprobs += [entry.logprob for entry in output.logprobs or ()]
    engine.check_integrity()
    return found


def check_alike(found: list[Answer], expected: list[Answer]) -> None:
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens == wanted
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-3)


@pytest.mark.parametrize("least_rows", [128, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize("selector", some_of(SELECTORS, "query", "importance*deviation"))
def test_every_selector_answers_as_in_one_process(
    local: LLMEngine,
    spread: LLMEngine,
    selector: Selector,
    least_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "LEAST_ROWS", least_rows)
    rng = random.Random(selector)
    for number in range(2):
        reuse = ReuseConfig(
            selector=selector,
            recompute=rng.choice([0.1, 0.4]),
            edit_recompute=rng.choice([0.03, 0.4]),
            rounds=rng.choice([1, 2]),
            unit=rng.choice(["token", "page", "line"]),
            refresh=3,
            refresh_order=("importance", "position")[number],
            negligible=(1e-3, 0.0)[number],
            min_share=0.0,
            guard=(0.5, 0.0)[number],
        )
        known, prompt = composed(rng)
        found = []
        for engine in (local, spread):
            engine.configure_reuse(reuse)
            scope = f"{selector} {number} {least_rows}"
            answers(engine, [("base", donor, "exact") for donor in known], scope)
            before = approximated(engine)
            jobs = [("base", prompt, "approx"), ("notes", words(40, number), "exact")]
            found.append(answers(engine, jobs, scope))
            taken = approximated(engine) - before
            fallbacks = sum(cache.approximate_guard_fallbacks for cache in engine._zoo.caches.values())
            found[-1].append(([taken, fallbacks], []))
            assert taken > 0
        check_alike(found[1], found[0])


def test_a_guard_holds_back_as_in_one_process(local: LLMEngine, spread: LLMEngine) -> None:
    expected = answers(local, [("base", PROMPT, "off")])
    for engine in (local, spread):
        engine.configure_reuse(ReuseConfig(recompute=0.3, guard=math.inf))
        answers(engine, [("base", DONOR, "exact")], "guard")
        before = engine.metrics().approximate_guard_fallbacks_total
        check_alike(answers(engine, [("base", PROMPT, "approx")], "guard"), expected)
        assert engine.metrics().approximate_guard_fallbacks_total == before + 1


def test_a_killed_worker_takes_donors_along(local: LLMEngine, spread: LLMEngine) -> None:
    """What took KV over is computed anew, in full; then there are donors again."""
    for engine in (local, spread):
        engine.configure_reuse(ReuseConfig(recompute=0.3, refresh=2))
        answers(engine, [("base", DONOR, "exact")], "kill")
    (expected,) = answers(local, [("base", PROMPT, "off")])
    spread.add_request("r", "base", PROMPT, GREEDY, "kill", kv_reuse="approx")
    tokens: list[int] = []
    before, steps = approximated(spread), 0
    while spread.has_unfinished():
        if (steps := steps + 1) == 2:
            assert approximated(spread) > before
            os.kill(group_of(spread).pids[1], signal.SIGKILL)
            os.waitid(os.P_PID, group_of(spread).pids[1], os.WEXITED | os.WNOWAIT)
        for output in spread.step():
            assert output.error is None
            tokens += output.token_ids
        if steps == 2:
            assert not tokens, "the first pass had not ended"
            before = approximated(spread)
    assert tokens == expected[0]
    assert approximated(spread) == before
    spread.check_integrity()
    for engine in (local, spread):
        answers(engine, [("base", DONOR, "exact")], "again")
    found, wanted = (answers(engine, [("base", PROMPT, "approx")], "again") for engine in (spread, local))
    assert approximated(spread) > before
    check_alike(found, wanted)


def test_donors_move_along(local: LLMEngine, spread: LLMEngine) -> None:
    """Spans move while a request refreshes what it has taken over; then its donor serves others."""
    for engine in (local, spread):
        engine.configure_reuse(ReuseConfig(recompute=0.3, refresh=2))
        answers(engine, [("base", DONOR, "exact")], "move")
    found = []
    other = words(51, 14) + DOCUMENT + words(20, 15)
    for engine in (local, spread):
        engine.add_request("r", "base", PROMPT, LONG, "move", kv_reuse="approx")
        answer: Answer = [], []
        for step in range(1000):
            if step == 20 and engine is spread:
                assert engine.placement is not None
                homes = group_of(engine).plan.homes
                moved = engine.placement.move({span: 1 - home for span, home in enumerate(homes)})
                engine.check_integrity()
                assert not moved.anew
                assert moved.pages
            for output in engine.step():
                assert output.error is None
                answer[0].extend(output.token_ids)
                answer[1].extend(entry.logprob for entry in output.logprobs or ())
            if not engine.has_unfinished():
                break
        before = approximated(engine)
        found.append([answer, *answers(engine, [("base", other, "approx")], "move")])
        assert approximated(engine) - before == len(DOCUMENT)
    check_alike(found[1], found[0])


@pytest.mark.slow
def test_what_takes_over_as_spans_move_is_computed_anew(local: LLMEngine, spread: LLMEngine) -> None:
    spread.configure_reuse(ReuseConfig(recompute=0.3, refresh=2))
    answers(spread, [("base", DONOR, "exact")], "early")
    spread.add_request("r", "base", PROMPT, GREEDY, "early", kv_reuse="approx")
    spread.step()
    (seq,) = spread._scheduler.running
    assert seq.approx is not None
    assert seq.approx.first_pass is not None
    assert spread.placement is not None
    homes = group_of(spread).plan.homes
    moved = spread.placement.move({span: 1 - home for span, home in enumerate(homes)})
    assert moved.anew == 1
    tokens: list[int] = []
    while spread.has_unfinished():
        for output in spread.step():
            assert output.error is None
            tokens += output.token_ids
        spread.check_integrity()
    assert len(tokens) == 12


@pytest.mark.parametrize("how", [pytest.param("exact", marks=pytest.mark.slow), "approx"])
def test_prompts_begin_where_models_part(local: LLMEngine, spread: LLMEngine, how: str) -> None:
    """What another model has run enters above; what stands behind may be taken over approximately."""
    head = words(70, 50)
    prompt = head + DOCUMENT + words(9, 51)
    found = []
    for engine in (local, spread):
        engine.configure_reuse(ReuseConfig(selector="importance*deviation", recompute=0.999, refresh=0))
        answers(engine, [("solver", DONOR, "exact")], f"part {how}")
        answers(engine, [("base", head + words(40, 52), "exact")], f"part {how}")
        assert len(engine._zoo.boundaries)
        before = sum(engine.metrics().prefix_hit_tokens.values())
        found.append(answers(engine, [("solver", prompt, how)], f"part {how}"))
        assert sum(engine.metrics().prefix_hit_tokens.values()) - before == 64
    check_alike(found[1], found[0])


@pytest.mark.slow
def test_values_come_from_the_workers(local: LLMEngine, spread: LLMEngine) -> None:
    """V of tokens in all layers, as both have them."""
    found = []
    for engine in (local, spread):
        engine.add_request("r", "base", PROMPT, LONG, "values")
        while not any(output.token_ids for output in engine.step()):
            pass
        (seq,) = engine._scheduler.running
        (executor,) = engine._zoo.executors.values()
        found.append(executor.kv.values(seq.page_table, np.array([0, 40, 35, 211])))
        engine.abort("r")
        engine.check_integrity()
    np.testing.assert_allclose(*found, atol=1e-4)
