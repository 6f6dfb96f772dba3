"""Tenants of every kind in one batch: each shared block runs once a step, for all rows that use it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from blockzoo.engines.openvino import OpenVINOEngine
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.store import Zoo

KINDS = ["base", "notes", "notes-merged", "solver", "base-sharded"]  # base, LoRA, merged, tuned layers, alias
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """By engine, how often it ran."""
    counted: Counter[int] = Counter()
    run = OpenVINOEngine.run

    def counting(engine: OpenVINOEngine) -> None:
        counted[id(engine)] += 1
        run(engine)

    monkeypatch.setattr(OpenVINOEngine, "run", counting)
    return counted


def test_the_zoo_has_every_kind(demo_zoo: Path) -> None:
    models = Zoo.open(demo_zoo).manifest.models
    base = models["base"]
    assert models["base-sharded"].chain == base.chain
    assert models["notes"].chain == models["notes-merged"].chain == base.chain
    assert models["notes"].adapters
    assert models["notes-merged"].adapters
    assert models["notes-merged"].adapters != models["notes"].adapters
    assert models["solver"].chain[:-5] == base.chain[:-5]
    assert models["solver"].chain != base.chain


def test_every_engine_runs_once_a_step_for_rows_of_all_kinds(demo_zoo: Path, runs: Counter[int]) -> None:
    llm = LLM(demo_zoo, precision="f32", kv_cache_bytes=32 << 20)
    rng = np.random.default_rng(0)
    models = KINDS * 2
    for i, model in enumerate(models):
        prompt = rng.integers(2, 2048, 5 + i).tolist()
        llm.engine.add_request(str(i), model, prompt, GREEDY)
    llm.engine.step()  # all prompts
    while llm.engine.has_unfinished():
        before = llm.engine.metrics()
        runs.clear()
        outputs = llm.engine.step()
        after = llm.engine.metrics()
        assert len(outputs) == len(models)
        # the trunk and the head run all rows; the last two layers the base's ones and the solver's
        assert sorted(runs.values()) == [1, 1, 1, 1]
        assert after.engine_calls_total - before.engine_calls_total == 4
        rows = after.mean_batch_per_block * after.engine_calls_total
        assert round(rows - before.mean_batch_per_block * before.engine_calls_total) == 10 + 8 + 2 + 10
    metrics = llm.engine.metrics()
    assert metrics.engine_calls_per_step == 4
    assert metrics.mean_batch_per_block > 7


def test_tokens_of_every_kind_are_those_it_gets_alone(demo_zoo: Path) -> None:
    rng = np.random.default_rng(1)
    models = KINDS * 2
    prompts = [rng.integers(2, 2048, int(rng.integers(1, 90))).tolist() for _ in models]
    alone = LLM(demo_zoo, precision="f32", kv_cache_bytes=32 << 20, prefix_caching=False)
    together = LLM(demo_zoo, precision="f32", kv_cache_bytes=32 << 20, max_num_batched_tokens=64)
    found = together.generate(models, prompts, GREEDY, progress=False)
    for model, prompt, done in zip(models, prompts, found, strict=True):
        assert done.token_ids == alone.generate(model, [prompt], GREEDY, progress=False)[0].token_ids, model
