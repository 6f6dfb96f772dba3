"""Workers that are far away: steps wait for the links, and guesses spare steps, with the same answers.

Their logits come over the wire: they do not find the head's memory, which says to be another machine's.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.api.request import GuidedDecoding
from blockzoo.runtime.serve import speculation
from blockzoo.runtime.serve.speculation import Speculation
from blockzoo.runtime.workers import logits_memory
from blockzoo.zoo.demo.tasks import facts

SETTINGS: dict[str, Any] = {
    "precision": "f32",
    "kv_cache_bytes": 32 << 20,
    "num_threads": 1,
    "speculate": "auto",
}
AWAY_S = 0.02
TOKENS = 48
NOTES = facts(random.Random(0), 6).context
QUOTES = NOTES + NOTES + NOTES[:40]
SCHEMA = {
    "type": "object",
    "properties": {"the first name": {"type": "integer"}, "the second name": {"type": "integer"}},
    "required": ["the first name", "the second name"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def local(demo_zoo: Path) -> LLMEngine:
    return LLMEngine(demo_zoo, EngineConfig(**SETTINGS))


@pytest.fixture(scope="module")
def far(demo_zoo: Path) -> Iterator[LLMEngine]:
    away = {"workers": 2, "worker_delays_ms": (0.0, 1e3 * AWAY_S)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits_memory, "boot_id", lambda: "another machine's")
        engine = LLMEngine(demo_zoo, EngineConfig(**SETTINGS, **away))
    yield engine
    engine.close()


@pytest.fixture
def equal_steps(far: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of the far workers take as long as their links do, however busy this machine is."""
    observe = Speculation.observe
    monkeypatch.setattr(
        Speculation, "observe", lambda self, family, items, _: observe(self, family, items, 2 * AWAY_S)
    )
    monkeypatch.setattr(speculation, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(far, "_speculation", Speculation(far._recorder.on_drafted))


def answer(engine: LLMEngine, prompt: str, **params: Any) -> tuple[list[int], int, float]:
    """Tokens; decode steps, and their seconds."""
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, **params)
    engine.add_request("r", "base", prompt, sampling, scope=str(params))
    found: list[int] = []
    steps, start = 0, 0.0
    while engine.has_unfinished():
        steps, start = (steps + 1, start) if found else (0, time.monotonic())
        for output in engine.step():
            assert output.error is None, output.error
            found += output.token_ids
    return found, steps, time.monotonic() - start


@pytest.mark.usefixtures("equal_steps")
def test_guesses_spare_waits_for_a_far_worker(local: LLMEngine, far: LLMEngine) -> None:
    expected, *_ = answer(local, QUOTES, ignore_eos=True, speculate=False)
    found, steps, seconds = answer(far, QUOTES, ignore_eos=True, speculate=False)
    assert (found, steps) == (expected, TOKENS - 1)
    assert seconds > 2 * AWAY_S * steps, "to the far worker and back"
    found, fewer, seconds = answer(far, QUOTES, ignore_eos=True)
    assert found == expected
    assert fewer < 0.6 * steps
    assert seconds > 2 * AWAY_S * fewer


def test_links_are_measured(far: LLMEngine) -> None:
    assert far._zoo.workers is not None
    facts, links = far._zoo.workers.group.facts, far._zoo.workers.group.links
    assert {each.machine for each in facts} == {logits_memory.boot_id()}
    assert AWAY_S <= links.hop_s[0][1] == links.hop_s[1][0] < 3 * AWAY_S
    assert links.head_s[0] < AWAY_S <= links.head_s[1]
    assert [links.hop_s[index][index] for index in (0, 1)] == [0, 0]


def test_sampled_tokens_and_all_tenants(local: LLMEngine, far: LLMEngine) -> None:
    found: list[dict[str, list[int]]] = []
    for engine in (local, far):
        for seed, model in enumerate(engine.models):
            engine.add_request(model, model, NOTES, SamplingParams(max_tokens=8, temperature=1.0, seed=seed))
        found.append({model: [] for model in engine.models})
        while engine.has_unfinished():
            for output in engine.step():
                assert output.error is None, output.error
                found[-1][output.request_id] += output.token_ids
    assert found[0] == found[1]


@pytest.mark.usefixtures("equal_steps")
def test_forced_tokens_over_workers(local: LLMEngine, far: LLMEngine) -> None:
    guided = GuidedDecoding("json_schema", json.dumps(SCHEMA))
    expected, *_ = answer(local, "The names:", guided=guided, speculate=False)
    found, steps, _ = answer(far, "The names:", guided=guided)
    assert found == expected
    assert steps < len(found) - 1
    assert far.metrics().accepted_tokens_total["base", "grammar"] > 0


@pytest.mark.parametrize("delays", [(1.0,), (1.0, -1.0), (0.0, 1e5)])
def test_delays_that_make_no_sense_are_refused(delays: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="worker_delays_ms"):
        EngineConfig(workers=2, worker_delays_ms=delays)
    with pytest.raises(InvalidRequestError, match="workers is not"):
        EngineConfig(worker_delays_ms=delays)
