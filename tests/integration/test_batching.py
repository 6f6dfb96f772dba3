"""What one request gets must not depend on who else is served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.runtime import LLM, EngineConfig, LLMEngine, SamplingParams


@pytest.fixture(scope="module")
def jobs(demo_zoo: Path) -> tuple[list[str], list[list[int]], list[SamplingParams]]:
    rng = np.random.default_rng(0)
    names = LLM(demo_zoo, precision="f32", kv_cache_bytes=32 << 20).models
    models = [names[i % len(names)] for i in range(32)]
    prompts = [rng.integers(2, 2048, int(rng.integers(1, 120))).tolist() for _ in range(32)]
    greedy = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    drawn = [
        SamplingParams(max_tokens=32, temperature=0.9, top_p=0.95, top_k=50, seed=i, ignore_eos=True)
        for i in range(32)
    ]
    return models, prompts, [greedy if i % 2 else drawn[i] for i in range(32)]


@pytest.fixture(scope="module")
def alone(demo_zoo: Path, jobs: tuple) -> list[tuple[int, ...]]:
    llm = LLM(demo_zoo, precision="f32", kv_cache_bytes=32 << 20, prefix_caching=False)
    return [llm.generate(*job, progress=False)[0].token_ids for job in zip(*jobs, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 48},  # prompts in small chunks between other requests' tokens
        {"kv_cache_bytes": 2 << 20},  # too small for all: preemption and recompute
        {"max_span_layers": 1},
        {"prefix_caching": False, "schedule": "fair"},
    ],
    ids=["default", "chunked", "preempted", "unfused", "uncached"],
)
def test_tokens_are_the_same_alone_and_among_31_others(
    demo_zoo: Path, jobs: tuple, alone: list[tuple[int, ...]], settings: dict
) -> None:
    llm = LLM(demo_zoo, **({"precision": "f32", "kv_cache_bytes": 32 << 20} | settings))
    together = llm.generate(*jobs, progress=False)
    assert [completion.token_ids for completion in together] == alone
    if settings.get("kv_cache_bytes") == 2 << 20:
        assert llm.engine.metrics().preemptions_total > 0


def test_a_cached_prefix_gives_the_same_tokens_across_models(demo_zoo: Path) -> None:
    llm = LLM(demo_zoo, precision="f32", kv_cache_bytes=32 << 20)
    prompt = np.random.default_rng(5).integers(2, 2048, 200).tolist()
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    cold = {model: llm.generate(model, [prompt], params, progress=False)[0] for model in llm.models}
    warm = {model: llm.generate(model, [prompt], params, progress=False)[0] for model in llm.models}
    assert cold["base"].num_cached_tokens == 0
    assert cold["base-sharded"].num_cached_tokens == 192  # the same blocks under another name
    for model in llm.models:
        assert warm[model].num_cached_tokens == 192
        assert warm[model].token_ids == cold[model].token_ids


def arrivals(engine: LLMEngine, jobs: list[tuple], seed: int) -> list[tuple[int, ...]]:
    """Answers of jobs that arrive in a random order, at random steps."""
    rng = np.random.default_rng(seed)
    waiting = rng.permutation(len(jobs)).tolist()
    tokens: list[tuple[int, ...]] = [()] * len(jobs)
    while waiting or engine.has_unfinished():
        for index in waiting[: int(rng.integers(0, 5))]:
            engine.add_request(str(index), *jobs[index])
            waiting.remove(index)
        for output in engine.step():
            assert output.error is None
            tokens[int(output.request_id)] += output.token_ids
    return tokens


def test_a_seed_gives_the_same_tokens_in_f32_whoever_arrives_when(
    demo_zoo: Path, jobs: tuple, alone: list[tuple[int, ...]]
) -> None:
    engine = LLMEngine(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=32 << 20))
    everything = list(zip(*jobs, strict=True))
    for seed in range(3):
        assert arrivals(engine, everything, seed) == alone
    engine.check_integrity()


def test_equal_batches_give_the_same_tokens_in_bf16(demo_zoo: Path, jobs: tuple) -> None:
    if OpenVINOEngines().precision != "bf16":
        pytest.skip("this CPU does not compute bf16 in hardware")
    config = EngineConfig(precision="bf16", kv_cache_bytes=32 << 20, prefix_caching=False)
    everything = list(zip(*jobs, strict=True))
    found = [arrivals(LLMEngine(demo_zoo, config), everything, seed) for seed in (1, 1)]
    assert found[0] == found[1]
    engine = LLMEngine(demo_zoo, config)
    alone = [[arrivals(engine, [job], 0)[0] for job in everything[:8]] for _ in range(2)]
    assert alone[0] == alone[1]
