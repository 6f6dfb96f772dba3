"""KV must not reach a request of another scope: nothing of others is found, nothing can be left for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blockzoo.runtime import EngineConfig, LLMEngine, RequestOutput, SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=["model", "scope"])
def shared_engine(request: pytest.FixtureRequest, demo_zoo: Path) -> LLMEngine:
    config = EngineConfig(precision="f32", kv_cache_bytes=32 << 20, kv_sharing=request.param)
    return LLMEngine(demo_zoo, config)


@pytest.fixture
def engine(shared_engine: LLMEngine) -> Iterator[LLMEngine]:
    yield shared_engine
    shared_engine.check_integrity()


@pytest.fixture(scope="module")
def cold_engine(demo_zoo: Path) -> LLMEngine:
    return LLMEngine(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=16 << 20, prefix_caching=False))


def prompt_of(seed: int, length: int = 100) -> list[int]:
    return np.random.default_rng(seed).integers(2, 2048, length).tolist()


def ask(engine: LLMEngine, model: str, prompt: list[int], scope: str | None, **how: str) -> tuple[int, ...]:
    """The tokens, after the number of prompt tokens that any layer took from the cache."""
    hits = dict(engine.metrics().prefix_hit_tokens)
    engine.add_request("r", model, prompt, GREEDY, scope, **how)
    tokens: list[int] = []
    last: RequestOutput | None = None
    while engine.has_unfinished():
        for last in engine.step():
            tokens += last.token_ids
    assert last is not None
    now = engine.metrics().prefix_hit_tokens
    spared = max([last.num_cached_tokens, *(now[layers] - hits.get(layers, 0) for layers in now)])
    return (spared, *tokens)


def test_a_scope_finds_its_own_and_nothing_of_others(engine: LLMEngine) -> None:
    prompt = prompt_of(1)
    spared = [
        ask(engine, "base", prompt, scope)[0] for scope in ("red", "blue", "red", None, "", "blue", None)
    ]
    assert spared == [0, 0, 96, 0, 0, 96, 96]


def test_models_of_a_scope_share_only_where_the_operator_says_so(engine: LLMEngine) -> None:
    prompt = prompt_of(2)
    ask(engine, "base", prompt, "red")
    shares = engine.config.kv_sharing == "scope"
    assert ask(engine, "base-sharded", prompt, "red")[0] == (96 if shares else 0)  # the same blocks
    assert ask(engine, "solver", prompt, "red")[0] == (96 if shares else 0)  # the lower layers
    assert ask(engine, "solver", prompt, "blue")[0] == 0


def test_scopes_that_imitate_others_are_others(engine: LLMEngine) -> None:
    prompt = prompt_of(3)
    ask(engine, "base", prompt, "red")
    ask(engine, "base", prompt, None)
    names = [
        "red ",
        "RED",
        "red\0",
        "null",
        json.dumps(["base", "red"]),
        '["base", null]',
        'red"',
        "r\u0435d",
        "\ud800",
    ]
    assert [ask(engine, "base", prompt, name)[0] for name in names] == [0] * len(names)


def test_a_page_of_another_scope_is_not_copied_in_part(engine: LLMEngine) -> None:
    prompt = prompt_of(4)
    ask(engine, "base", prompt, "red")
    copied = engine.metrics().copied_pages_total
    assert ask(engine, "base", prompt[:50] + prompt_of(5), "blue")[0] == 0
    assert engine.metrics().copied_pages_total == copied
    assert ask(engine, "base", prompt[:50] + prompt_of(5), "red")[0] == 32  # told in whole pages
    assert engine.metrics().copied_pages_total == copied + 1


def test_what_a_hostile_scope_leaves_changes_no_answer(engine: LLMEngine, cold_engine: LLMEngine) -> None:
    """The attacker runs everything the victim will ask, whole, shifted and behind a prefix of its own."""
    victim = prompt_of(6, 130)
    for bait in (victim, victim[32:], prompt_of(7, 32) + victim, victim[:65] + prompt_of(8, 60)):
        for model in ("base", "solver", "notes"):
            ask(engine, model, bait, "attacker")
    for model in ("base", "solver"):
        spared, *tokens = ask(engine, model, victim, f"victim of {model}")
        assert spared == 0
        assert tokens == list(ask(cold_engine, model, victim, None)[1:])


def test_without_reuse_nothing_is_used_and_nothing_left(engine: LLMEngine) -> None:
    prompt = prompt_of(9)
    pages = engine.metrics().pages_cached
    assert ask(engine, "base", prompt, "red", kv_reuse="off")[0] == 0
    assert engine.metrics().pages_cached == pages
    assert [ask(engine, "base", prompt, "red", kv_reuse=how)[0] for how in ("exact", "off", "exact")] == [
        0,
        0,
        96,
    ]


def test_waits_are_reported_by_what_was_cached(engine: LLMEngine) -> None:
    before = {label: waits.count for label, waits in engine.metrics().wait_seconds.items()}
    prompt = prompt_of(10, 128)
    for _ in range(2):
        ask(engine, "base", prompt, "waits")
    waits = engine.metrics().wait_seconds
    assert {label: waits[label].count - before[label] for label in waits} in (
        {"0": 1, "1-49": 0, "50-89": 1, "90-100": 0},
        {"0": 1, "1-49": 0, "50-89": 0, "90-100": 1},
    )
    assert waits["0"].quantile(0.99) > 0
