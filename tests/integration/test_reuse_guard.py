"""The guard of approximate reuse: what it holds back is a full prefill before its first token is chosen."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quiet
from quiet import words
from test_approximate import DOCUMENT, DONOR, EDITED, PROMPT, SELECTORS, composed, kv_of, serve, some_of

from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.api.request import GuidedDecoding
from blockzoo.runtime.approx.config import ReuseConfig, Selector, Unit
from blockzoo.runtime.kv.sequence import TokenSequence

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=1)
SHARED = ReuseConfig(recompute=0.2, edit_recompute=0.1, min_share=0.0, refresh=2)


def ask(engine: LLMEngine, prompt: list[int], how: str = "exact", params: SamplingParams = GREEDY) -> Any:
    """Tokens, their log-probabilities, and how many prompt tokens came from the exact cache."""
    return quiet.ask(engine, "base", prompt, params, kv_reuse=how)


def counts(engine: LLMEngine) -> tuple[int, int]:
    """How often the guard looked, and held something back."""
    found = engine.metrics()
    return found.approximate_guarded_total, found.approximate_guard_fallbacks_total


@pytest.fixture(scope="module")
def exact(demo_zoo: Path) -> LLMEngine:
    return serve(demo_zoo, None, prefix_caching=False)


@pytest.fixture(scope="module")
def small_steps(demo_zoo: Path) -> LLMEngine:
    return serve(
        demo_zoo, ReuseConfig(selector="importance*deviation"), max_num_batched_tokens=48, speculate="auto"
    )


@pytest.mark.parametrize("selector", some_of(SELECTORS, "query", "deviation", "head-of-run"))
def test_a_guard_of_infinity_holds_all_back_and_one_of_nothing_none(
    demo_zoo: Path, exact: LLMEngine, selector: Selector
) -> None:
    engine = serve(demo_zoo, replace(SHARED, selector=selector, max_deviation=1e9))
    ask(engine, DONOR)
    tokens, logprobs, _ = ask(engine, PROMPT, "approx")
    assert counts(engine) == (0, 0)
    engine.configure_reuse(replace(SHARED, selector=selector, max_deviation=1e9, guard=1e-9))
    kept, kept_logprobs, _ = ask(engine, PROMPT, "approx")
    assert counts(engine) == (1, 0)
    assert kept == tokens
    assert kept_logprobs == pytest.approx(logprobs, abs=1e-4)
    engine.configure_reuse(replace(SHARED, selector=selector, max_deviation=1e9, guard=math.inf))
    found, found_logprobs, _ = ask(engine, PROMPT, "approx")
    assert counts(engine) == (2, 1)
    expected, expected_logprobs, _ = ask(exact, PROMPT)
    assert found == expected
    assert found_logprobs == pytest.approx(expected_logprobs, abs=1e-4)
    assert np.abs(np.subtract(logprobs, expected_logprobs)).max() > 1e-3  # without, it would have told
    assert ask(engine, PROMPT)[2] == len(PROMPT) // 32 * 32  # what is exact is kept for others


@pytest.mark.parametrize("prompt", [PROMPT, EDITED], ids=["behind another text", "behind an edit"])
def test_it_goes_by_how_far_the_likeliest_token_leads(demo_zoo: Path, prompt: list[int]) -> None:
    engine = serve(demo_zoo, SHARED)
    ask(engine, DONOR)
    engine.add_request("r", "base", prompt, replace(GREEDY, max_tokens=1, logprobs=2), kv_reuse="approx")
    told = [output for _ in range(2) for output in engine.step() if output.logprobs]
    (_, first), (_, second) = told[0].logprobs[0].top
    for share, held_back in ((0.9, 0), (1.1, 1)):
        engine.configure_reuse(replace(SHARED, guard=share * (first - second)))
        ask(engine, prompt, "approx")
        assert counts(engine)[1] == held_back


def begun(engine: LLMEngine, prompt: list[int]) -> TokenSequence:
    """Run a request up to its first token; it then goes on."""
    engine.add_request("r", "base", prompt, replace(GREEDY, max_tokens=200), kv_reuse="approx")
    while not any(output.token_ids for output in engine.step()):
        pass
    (seq,) = engine._scheduler.running
    return seq


def test_what_is_held_back_has_the_kv_of_a_full_prefill(small_steps: LLMEngine, exact: LLMEngine) -> None:
    small_steps.configure_reuse(replace(SHARED, guard=math.inf))
    ask(small_steps, DONOR)
    prompt = [*PROMPT, 7]
    seq = begun(small_steps, prompt)
    assert (seq.approx, seq.reuse) == (None, "exact")
    found = kv_of(small_steps, seq, len(prompt))
    exact.add_request("r", "base", prompt, GREEDY)
    while not any(output.token_ids for output in exact.step()):
        pass
    (full,) = exact._scheduler.running
    np.testing.assert_allclose(found, kv_of(exact, full, len(prompt)), atol=2e-4)
    for engine in (small_steps, exact):
        engine.abort("r")
        engine.check_integrity()


@pytest.mark.parametrize("selector", some_of(SELECTORS, "query"))
def test_whatever_is_composed_what_is_held_back_is_a_full_prefill(
    small_steps: LLMEngine, exact: LLMEngine, selector: Selector
) -> None:
    """Greedy, sampled and guided; and what is not held back is what it is without a guard."""
    rng = random.Random(selector)
    kinds = [
        GREEDY,
        replace(GREEDY, temperature=0.8, seed=5),
        replace(GREEDY, ignore_eos=False, guided=GuidedDecoding("regex", "[a-z ]{3,30}")),
    ]
    units: list[Unit] = ["token", "page", "line"]
    for number in range(3):
        config = replace(
            SHARED,
            selector=selector,
            recompute=rng.choice([0.1, 0.4]),
            head=rng.choice([0, 8]),
            rounds=rng.choice([1, 2]),
            unit=rng.choice(units),
            refresh=rng.choice([0, 3]),
        )
        known, prompt = composed(rng)
        params = kinds[number % 3]
        answers, held_back = {}, {}
        for guard in (0.0, math.inf, rng.choice([0.1, 0.5, 2.0])):
            small_steps.configure_reuse(replace(config, guard=guard))
            for cache in small_steps._zoo.caches.values():
                cache.forget_all()
            for donor in known:
                ask(small_steps, donor)
            before = counts(small_steps)
            answers[guard] = ask(small_steps, prompt, "approx", params)
            looked, back = np.subtract(counts(small_steps), before)
            held_back[guard] = bool(back)
            assert looked == (guard > 0)
        assert held_back[math.inf]
        full = ask(exact, prompt, "off", params)
        for guard, (tokens, logprobs, _) in answers.items():
            expected = full if held_back[guard] else answers[0.0]
            assert tokens == expected[0]
            assert logprobs == pytest.approx(expected[1], abs=2e-4)


@pytest.mark.slow
def test_under_pressure_all_that_is_held_back_is_exact(demo_zoo: Path, exact: LLMEngine) -> None:
    """Beside others, preempted, cancelled."""
    reuse = replace(SHARED, guard=math.inf)
    engine = serve(demo_zoo, reuse, kv_cache_bytes=3 << 20, max_num_batched_tokens=96)
    ask(engine, DONOR)
    rng = np.random.default_rng(0)
    prompts = {}
    for i in range(12):
        cut = int(rng.integers(0, 60))
        prompts[str(i)] = [*words(5 + i, 10 + i), *DOCUMENT[cut:], *words(9, 50 + i)]
        engine.add_request(str(i), "base", prompts[str(i)], replace(GREEDY, max_tokens=40), kv_reuse="approx")
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    steps = 0
    while engine.has_unfinished():
        steps += 1
        for output in engine.step():
            assert output.error is None
            answers[output.request_id] += output.token_ids
        if steps in (2, 5):
            name = str(steps)
            engine.abort(name)
            del answers[name], prompts[name]
        engine.check_integrity()
    looked, back = counts(engine)
    assert looked == back > 0
    assert engine.metrics().preemptions_total > 0
    assert engine.metrics().pages_used == 0
    for name, prompt in prompts.items():
        assert answers[name] == ask(exact, prompt, "off", replace(GREEDY, max_tokens=40))[0]


def test_settings_that_make_no_guard_are_refused() -> None:
    for guard in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"guard is {guard}; expected at least 0"):
            replace(SHARED, guard=guard)
    with pytest.raises(InvalidRequestError, match="approximate: guard is -1"):
        EngineConfig(approximate={"guard": -1})  # type: ignore[arg-type]
