"""What models answer when nothing else goes on: the oracle of tests where much does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockzoo.runtime import EngineConfig, LLMEngine, RequestOutput, SamplingParams

NEAR = 2e-3  # two tokens whose log-probabilities differ by less may change places by rounding


def near(value: Any) -> Any:
    """Equal to `value` but for rounding: two runs of one request may share batches with other rows."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-4)
    if isinstance(value, dict):
        return {key: near(each) for key, each in value.items()}
    return [near(each) for each in value] if isinstance(value, list) else value


def words(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 2048, length).tolist()


def ask(
    engine: LLMEngine, model: str, prompt: Any, params: SamplingParams, **how: Any
) -> tuple[list[int], list[float], int]:
    """Of one request alone: tokens, their log-probabilities, and how many prompt tokens were cached."""
    engine.add_request("r", model, prompt, params, **how)
    tokens, logprobs, cached = [], [], 0
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None
            tokens += output.token_ids
            logprobs += [entry.logprob for entry in output.logprobs or ()]
            cached = output.num_cached_tokens
    engine.check_integrity()
    return tokens, logprobs, cached


@dataclass
class Live:
    model: str  # of the quiet engine, whatever it is called now
    prompt: list[int] | str
    max_tokens: int
    kv_reuse: str = "off"
    documents: tuple[str, ...] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""


class Quiet:
    """An engine that caches nothing and runs one request at a time."""

    def __init__(self, zoo: Path) -> None:
        config = EngineConfig(precision="f32", kv_cache_bytes=64 << 20, prefix_caching=False, num_threads=1)
        self._engine = LLMEngine(zoo, config)
        self._known: dict[tuple, Live] = {}

    def answer(self, asked: Live) -> Live:
        prompt = asked.prompt if isinstance(asked.prompt, str) else tuple(asked.prompt)
        key = asked.model, prompt, asked.documents, asked.max_tokens
        if key not in self._known:
            found = self._known[key] = Live(asked.model, asked.prompt, asked.max_tokens)
            self._engine.add_request(
                "q", asked.model, asked.prompt, params(asked.max_tokens), documents=asked.documents
            )
            while self._engine.has_unfinished():
                for output in self._engine.step():
                    note(found, output)
        return self._known[key]


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=0)


def note(live: Live, output: RequestOutput) -> None:
    assert output.error is None, output.error
    live.tokens += output.token_ids
    live.logprobs += [entry.logprob for entry in output.logprobs or ()]
    live.text += output.text


def check_equal(found: Live, expected: Live) -> None:
    """Equal tokens and log-probabilities, up to where rounding decides between two tokens."""
    count = len(expected.tokens)
    assert len(found.tokens) == count
    same = next((i for i in range(count) if found.tokens[i] != expected.tokens[i]), count)
    assert found.logprobs[:same] == pytest.approx(expected.logprobs[:same], abs=5e-3), found
    if same < count:
        assert abs(found.logprobs[same] - expected.logprobs[same]) < NEAR, (found, expected)
