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
from test_approximate import DOCUMENT, DONOR, EDITED, PROMPT, composed, kv_of, serve, some_of

from blockzoo.build.calibrate.follower import Follower, Run, divergence
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.api.request import GuidedDecoding, KVReuse
from blockzoo.runtime.approx.config import ReuseConfig, Selector, Unit
from blockzoo.runtime.kv.sequence import TokenSequence

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=1)
SHARED = ReuseConfig(recompute=0.2, edit_recompute=0.1, min_share=0.0, refresh=2)
LOOKING: list[Selector] = ["query", "head-of-run", "random"]


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
    return serve(demo_zoo, ReuseConfig(), max_num_batched_tokens=48, speculate="auto")


@pytest.mark.parametrize("selector", LOOKING)
def test_a_guard_of_nothing_holds_all_back_and_one_of_infinity_none(
    demo_zoo: Path, exact: LLMEngine, selector: Selector
) -> None:
    engine = serve(demo_zoo, replace(SHARED, selector=selector))
    ask(engine, DONOR)
    tokens, logprobs, _ = ask(engine, PROMPT, "approx")
    assert counts(engine) == (0, 0)
    engine.configure_reuse(replace(SHARED, selector=selector, guard=math.inf))
    kept, kept_logprobs, _ = ask(engine, PROMPT, "approx")
    assert counts(engine) == (1, 0)
    assert kept == tokens
    assert kept_logprobs == pytest.approx(logprobs, abs=1e-4)
    engine.configure_reuse(replace(SHARED, selector=selector, guard=0.0))
    found, found_logprobs, _ = ask(engine, PROMPT, "approx")
    assert counts(engine) == (2, 1)
    expected, expected_logprobs, _ = ask(exact, PROMPT)
    assert found == expected
    assert found_logprobs == pytest.approx(expected_logprobs, abs=1e-4)
    assert np.abs(np.subtract(logprobs, expected_logprobs)).max() > 1e-3  # without, it would have told
    assert ask(engine, PROMPT)[2] == len(PROMPT) // 32 * 32  # what is exact is kept for others


def test_it_goes_by_how_far_the_next_token_moves(demo_zoo: Path) -> None:
    """Between the distributions of naive reuse and of what is computed anew."""
    naive, anew = (replace(SHARED, recompute=share, head=40) for share in (0.0, 0.5))
    follower = Follower(serve(demo_zoo, naive))
    text = "\n".join(f"line {i} says {i * i % 97}" for i in range(40))
    prompt = "other words\n" + text + "\nline"

    def run(how: KVReuse, config: ReuseConfig | None) -> Run:
        asked = Run(prompt if config else "first words\n" + text + "\nand the last", how, config)
        follower.run("base", [asked], 1, "s")
        return asked

    run("exact", None)
    before, after = run("approx", naive), run("approx", replace(anew, guard=math.inf))
    assert before.moved is None
    assert after.moved is not None
    (told,) = divergence(after.logits, before.logits)
    assert after.moved == pytest.approx(told, rel=0.02)
    assert told > 1e-4
    assert run("approx", replace(anew, guard=1.1 * told)).moved is not None
    assert counts(follower.engine) == (2, 0)
    run("approx", replace(anew, guard=0.9 * told))
    assert counts(follower.engine) == (3, 1)


def begun(engine: LLMEngine, prompt: list[int]) -> TokenSequence:
    """Run a request up to its first token; it then goes on."""
    engine.add_request("r", "base", prompt, replace(GREEDY, max_tokens=200), kv_reuse="approx")
    while not any(output.token_ids for output in engine.step()):
        pass
    (seq,) = engine._scheduler.running
    return seq


def test_what_is_held_back_has_the_kv_of_a_full_prefill(small_steps: LLMEngine, exact: LLMEngine) -> None:
    small_steps.configure_reuse(replace(SHARED, guard=0.0))
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


@pytest.mark.parametrize("selector", some_of(LOOKING, "query"))
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
        prompt = [5 + number, *prompt]  # behind another beginning, so behind other texts
        params = kinds[number % 3]
        answers, held_back = {}, {}
        for guard in (None, 0.0, rng.choice([0.001, 0.01, 0.1])):
            small_steps.configure_reuse(replace(config, guard=guard))
            for cache in small_steps._zoo.caches.values():
                cache.forget_all()
            for donor in known:
                ask(small_steps, donor)
            before = counts(small_steps)
            answers[guard] = ask(small_steps, prompt, "approx", params)
            looked, back = np.subtract(counts(small_steps), before)
            held_back[guard] = bool(back)
            assert looked == (guard is not None)
        assert held_back[0.0]
        full = ask(exact, prompt, "off", params)
        for guard, (tokens, logprobs, _) in answers.items():
            expected = full if held_back[guard] else answers[None]
            assert tokens == expected[0]
            assert logprobs == pytest.approx(expected[1], abs=2e-4)


def test_under_pressure_all_that_is_held_back_is_exact(demo_zoo: Path, exact: LLMEngine) -> None:
    """Beside others, preempted, cancelled."""
    reuse = replace(SHARED, guard=0.0)
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


def test_behind_edits_alone_nothing_is_looked_at(demo_zoo: Path) -> None:
    engine = serve(demo_zoo, replace(SHARED, guard=0.0))
    ask(engine, DONOR)
    seq = begun(engine, EDITED)
    assert seq.approx is not None
    assert seq.approx.reused.any()
    assert counts(engine) == (0, 0)
    engine.abort("r")


def test_settings_that_make_no_guard_are_refused() -> None:
    for settings, message in (
        ({"guard": -0.1}, "guard is -0.1; expected nats, at least 0"),
        ({"guard": math.nan}, "guard is nan"),
        ({"guard": 0.1, "recompute": 1.0}, "recompute between 0 and 1"),
        ({"guard": 0.1, "recompute": 0.0}, "recompute between 0 and 1"),
        ({"guard": 0.1, "selector": "deviation"}, "'deviation' does not have: use max_deviation"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SHARED, **settings)
    with pytest.raises(InvalidRequestError, match="approximate: guard is 0"):
        EngineConfig(approximate={"guard": 0.1})  # type: ignore[arg-type]
