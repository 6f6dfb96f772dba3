"""Prompts that another model has run start where the two models part, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockzoo.runtime import LLM, SamplingParams
from blockzoo.runtime.llm import Completion

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=3)


def prompt_of(length: int, seed: int = 5) -> list[int]:
    return np.random.default_rng(seed).integers(2, 2048, length).tolist()


def serve(zoo: Path, **settings: object) -> LLM:
    return LLM(zoo, **({"precision": "f32", "kv_cache_bytes": 32 << 20} | settings))


def ask(llm: LLM, model: str, prompt: list[int]) -> Completion:
    return llm.generate(model, [prompt], GREEDY, progress=False)[0]


def assert_same(found: Completion, expected: Completion) -> None:
    """Equal tokens, and log-probabilities equal within float32 rounding."""
    assert found.token_ids == expected.token_ids
    assert found.logprobs is not None
    assert expected.logprobs is not None
    for a, b in zip(found.logprobs, expected.logprobs, strict=True):
        assert [token for token, _ in a.top] == [token for token, _ in b.top]
        assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-4)


def hits(llm: LLM) -> dict[str, int]:
    return dict(llm.engine.metrics().prefix_hit_tokens)


@pytest.fixture(scope="module")
def cold(demo_zoo: Path) -> LLM:
    return serve(demo_zoo, prefix_caching=False)


@pytest.mark.parametrize("budget", [pytest.param(512, marks=pytest.mark.slow), 48])
def test_a_prompt_another_model_has_run(demo_zoo: Path, cold: LLM, budget: int) -> None:
    llm = serve(demo_zoo, max_num_batched_tokens=budget)
    for length in (32, 33, 96, 200, 256):
        prompt = prompt_of(length, seed=length)
        assert_same(ask(llm, "base", prompt), ask(cold, "base", prompt))
        before = hits(llm)
        low, own = before
        found = ask(llm, "solver", prompt)
        assert_same(found, ask(cold, "solver", prompt))
        assert found.num_cached_tokens == 0  # nothing is skipped in all layers
        assert hits(llm)[low] - before[low] == length // 32 * 32
        assert hits(llm)[own] == before[own]


def test_longer_and_diverging_prompts_enter_in_two_parts(demo_zoo: Path, cold: LLM) -> None:
    llm = serve(demo_zoo)
    known = prompt_of(160)
    ask(llm, "base", known)
    for prompt in (known + prompt_of(70, 6), known[:100] + prompt_of(100, 7), known[:140]):
        assert_same(ask(llm, "solver", prompt), ask(cold, "solver", prompt))
        assert_same(ask(llm, "base", prompt), ask(cold, "base", prompt))


def test_late_rows_batch_with_others(demo_zoo: Path, cold: LLM) -> None:
    llm = serve(demo_zoo)
    known = prompt_of(128)
    ask(llm, "base", known)
    models = ["solver", "base", "notes", "solver", "base", "solver"]
    prompts = [known + prompt_of(9, i) if i % 2 else prompt_of(70, i) for i in range(6)]
    prompts[0] = known
    together = llm.generate(models, prompts, GREEDY, progress=False)
    for model, prompt, found in zip(models, prompts, together, strict=True):
        assert_same(found, ask(cold, model, prompt))


def test_another_scope_starts_at_the_bottom(demo_zoo: Path) -> None:
    llm = serve(demo_zoo)
    prompt = prompt_of(128)
    llm.generate("base", [prompt], GREEDY, scope="one", progress=False)
    before = hits(llm)
    llm.generate("solver", [prompt], GREEDY, scope="two", progress=False)
    assert hits(llm) == before


def test_no_budget_keeps_nothing(demo_zoo: Path) -> None:
    llm = serve(demo_zoo, boundary_cache_bytes=0)
    prompt = prompt_of(128)
    ask(llm, "base", prompt)
    before = hits(llm)
    ask(llm, "solver", prompt)
    assert hits(llm) == before


def test_a_page_that_begins_alike_is_copied(demo_zoo: Path, cold: LLM) -> None:
    llm = serve(demo_zoo)
    known = prompt_of(128)
    ask(llm, "base", known)
    again = ask(llm, "base", known)
    assert again.num_cached_tokens == 96  # told in whole pages; the last one enters at the boundary
    for prompt, told, copied in (
        (known[:80] + prompt_of(40, 8), 64, 1),
        (known[:98] + prompt_of(40, 9), 96, 0),
    ):
        before = llm.engine.metrics().copied_pages_total
        found = ask(llm, "base", prompt)
        assert found.num_cached_tokens == told
        assert llm.engine.metrics().copied_pages_total - before == copied
        assert_same(found, ask(cold, "base", prompt))
        assert_same(ask(llm, "solver", prompt), ask(cold, "solver", prompt))


def test_nothing_is_kept_that_no_other_model_may_use(demo_zoo: Path) -> None:
    llm = serve(demo_zoo, kv_sharing="model")
    boundaries = llm.engine._zoo.boundaries
    for model in llm.models:
        ask(llm, model, prompt_of(128))
    assert len(boundaries) == boundaries.num_bytes == 0


def test_a_published_document_is_kept_for_the_other_models(demo_zoo: Path) -> None:
    llm = serve(demo_zoo, kv_sharing="model")
    llm.publish("numbers", " ".join(map(str, range(100))), ["base"])
    assert len(llm.engine._zoo.boundaries) > 0
