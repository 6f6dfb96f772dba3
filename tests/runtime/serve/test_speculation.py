"""Speculative execution changes no answer, whatever is guessed and whatever else runs; and it speeds up."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import delayed_span
from benchmarks.delayed_span import delay_last_span
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.request import GuidedDecoding
from blockzoo.runtime.draft.balance import Balances
from blockzoo.runtime.draft.guesses import Context, Guess, Kind
from blockzoo.runtime.draft.row_choice import Hopes, Option, RowChoice
from blockzoo.runtime.serve import llm_engine, speculation
from blockzoo.runtime.serve.speculation import Speculation

pytestmark = pytest.mark.usefixtures("steady_pace")
NEAR = 2e-3  # log-probabilities, by rounding
QUIET = EngineConfig(
    precision="f32", kv_cache_bytes=32 << 20, max_num_seqs=1, prefix_caching=False, speculate="off"
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "top_p": 0.9, "seed": 5},
    "hot": {"temperature": 2.5, "top_k": 50, "min_p": 0.01, "seed": 7},
    "penalties": {
        "temperature": 0.7,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "seed": 1,
    },
    "biased": {"temperature": 0.0, "logit_bias": {40: 4.0, 41: -100.0}, "bad_words": ("self", "re")},
    "bounds": {"temperature": 0.8, "min_tokens": 9, "seed": 2, "stop": ("e", "\n"), "ignore_eos": False},
    "logprobs": {"temperature": 0.5, "logprobs": 3, "seed": 3},
    "guided": {"guided": GuidedDecoding("json_schema", json.dumps(SCHEMA)), "temperature": 0.8, "seed": 4},
}


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    reason: str | None = None


def ask(kind: str, max_tokens: int) -> SamplingParams:
    given = {"ignore_eos": kind != "guided", "max_tokens": max_tokens} | KINDS[kind]
    return SamplingParams(**given)


def take(engine: LLMEngine, answers: dict[str, Answer]) -> None:
    for output in engine.step():
        answer = answers.setdefault(output.request_id, Answer())
        assert output.error is None, output.error
        answer.tokens += output.token_ids
        answer.text += output.text
        answer.logprobs += output.logprobs or ()
        answer.reason = output.finish_reason
        assert output.num_generated == len(answer.tokens)


def assert_same(found: Answer, expected: Answer) -> None:
    assert (found.tokens, found.text, found.reason) == (expected.tokens, expected.text, expected.reason)
    assert [entry.token_id for entry in found.logprobs] == [entry.token_id for entry in expected.logprobs]
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=NEAR)
        assert len(one.top) == len(other.top)


class Seer:
    """Knows all answers, and is wrong now and then."""

    def __init__(self, answers: list[list[int]], rng: random.Random) -> None:
        self._answers, self._rng = answers, rng

    def propose(self, context: Context, limit: int) -> list[Guess]:
        known = context.token_ids.tolist()
        for whole in self._answers:
            if whole[: len(known)] == known:
                coming = whole[len(known) : len(known) + self._rng.randint(1, limit)]
                wrong = self._rng.random() < 0.5
                if coming and wrong:
                    coming[self._rng.randrange(len(coming))] = self._rng.choice([0, 1, 9, 10**6, -5])
                return [Guess(token, Kind("seer", 4)) for token in coming]
        return []


@pytest.fixture(scope="module")
def quiet(demo_zoo: Path) -> LLMEngine:
    return LLMEngine(demo_zoo, QUIET)


@pytest.fixture
def any_rows(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """As many drafted rows as a die says, whatever they cost."""
    rng = random.Random(11)

    def choose(_: RowChoice, kind: Any, sequences: list[Hopes], spare: int, *_more: float) -> Option:
        return Option(rng.randint(0, min(spare, 15 * sum(each.may_draft for each in sequences))))

    monkeypatch.setattr(RowChoice, "choose", choose)
    monkeypatch.setattr(Balances, "at_stake", lambda *_: 1.0)
    return rng


def alone(engine: LLMEngine, model: str, prompt: list[int], params: SamplingParams) -> Answer:
    answers: dict[str, Answer] = {}
    engine.add_request("q", model, prompt, params)
    while engine.has_unfinished():
        take(engine, answers)
    return answers["q"]


@pytest.mark.parametrize(
    "pages", [pytest.param(16 << 20, marks=pytest.mark.slow), 2 << 20], ids=["roomy", "tight"]
)
def test_answers_are_those_without_whatever_else_runs(
    demo_zoo: Path, quiet: LLMEngine, any_rows: random.Random, pages: int
) -> None:
    rng, numbers = any_rows, np.random.default_rng(3)
    shared = numbers.integers(2, 2048, 40).tolist()
    asked: dict[str, tuple[str, list[int], SamplingParams]] = {}
    models = ("base", "notes", "notes-merged", "solver")
    for number, kind in enumerate([*KINDS, "greedy", "guided"]):
        prompt = shared[: rng.choice([0, 33, 40])] + numbers.integers(2, 2048, rng.randint(3, 30)).tolist()
        asked[f"{kind} {number}"] = models[number % 4], prompt, ask(kind, rng.randint(1, 50))
    expected = {name: alone(quiet, *given) for name, given in asked.items()}
    wholes = [prompt + expected[name].tokens for name, (_, prompt, _) in asked.items()]

    config = EngineConfig(precision="f32", kv_cache_bytes=pages, max_num_seqs=6, speculate="auto")
    engine = LLMEngine(demo_zoo, config)
    engine._speculation = Speculation(engine._recorder.on_drafted, drafters=[Seer(wholes, rng)])
    waiting, found, aborted = list(asked), {}, set()
    rng.shuffle(waiting)
    while waiting or engine.has_unfinished():
        for name in [waiting.pop() for _ in range(min(len(waiting), rng.randint(0, 2)))]:
            model, prompt, params = asked[name]
            engine.add_request(name, model, prompt, params, scope=rng.choice(["a", "b"]))
            engine.add_request(f"gone {name}", model, prompt, params)
        take(engine, found)
        engine.check_integrity()
        for name in [name for name in engine._requests if name.startswith("gone") and rng.random() < 0.1]:
            engine.abort(name)
            aborted.add(name)
    for name in asked:
        assert_same(found[name], expected[name])
        if f"gone {name}" not in aborted:
            assert_same(found[f"gone {name}"], expected[name])
    metrics = engine.metrics()
    assert metrics.pages_used == 0
    assert metrics.pages_free + metrics.pages_cached == metrics.pages_total
    drafted = sum(n for (_, who), n in metrics.drafted_tokens_total.items() if who == "seer")
    accepted = sum(n for (_, who), n in metrics.accepted_tokens_total.items() if who == "seer")
    assert 0.2 * drafted < accepted < drafted, "wrong guesses and right ones were tried"
    if pages == 2 << 20:
        assert metrics.preemptions_total > 0


def test_a_request_and_an_engine_may_do_without(demo_zoo: Path, any_rows: random.Random) -> None:
    engine = LLMEngine(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=16 << 20, speculate="auto"))
    prompt = [5, 6, 7, 8] * 8
    for speculate in (False, True):
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, speculate=speculate)
        alone(engine, "base", prompt, params)
        assert bool(engine.metrics().drafted_tokens_total) == speculate
    engine = LLMEngine(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=16 << 20))
    alone(engine, "base", prompt, params)
    assert not engine.metrics().drafted_tokens_total


def test_other_answers_are_looked_at_within_a_scope_alone(demo_zoo: Path, any_rows: random.Random) -> None:
    engine = LLMEngine(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=16 << 20, speculate="auto"))
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, ignore_eos=True)
    prompt = np.random.default_rng(8).integers(2, 2048, 25).tolist()

    def accepted(scope: str | None, kv_reuse: Any = "exact") -> int:
        before = engine.metrics().accepted_tokens_total.get(("base", "answers"), 0)
        engine.add_request("r", "base", prompt, params, scope=scope, kv_reuse=kv_reuse)
        while engine.has_unfinished():
            engine.step()
        return engine.metrics().accepted_tokens_total.get(("base", "answers"), 0) - before

    assert accepted("a") == 0, "there are none"
    assert accepted("b") == 0, "those of others are not looked at"
    assert accepted("a", "off") == 0, "who reuses nothing looks at nothing"
    assert accepted("a") > 10


def test_a_drafter_that_fails_harms_nobody(
    demo_zoo: Path, quiet: LLMEngine, any_rows: random.Random, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def propose(self, context: Context, limit: int) -> list[Guess]:
            raise ZeroDivisionError

    engine = LLMEngine(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=16 << 20, speculate="auto"))
    engine._speculation = Speculation(engine._recorder.on_drafted, drafters=[Broken()])
    prompt, params = list(range(5, 25)), ask("seeded", 10)
    assert_same(alone(engine, "base", prompt, params), alone(quiet, "base", prompt, params))
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_prompt_of_which_one_token_runs_is_left_alone(
    demo_zoo: Path, quiet: LLMEngine, any_rows: random.Random
) -> None:
    """It starts at an odd place, so that two tokens a step leave one before the border of a page."""
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 3, "kv_cache_bytes": 16 << 20}
    engine = LLMEngine(demo_zoo, EngineConfig(precision="f32", speculate="auto", **settings))
    first, found = list(range(5, 40)), dict[str, Answer]()
    alone(engine, "base", first, ask("greedy", 1))
    engine.add_request("a", "base", [900, 901, 902, 903] * 3, ask("greedy", 40))
    while not found:
        take(engine, found)
    prompt = [*first[:5], *range(100, 140)]
    engine.add_request("b", "base", prompt, ask("greedy", 4))
    while engine.has_unfinished():
        take(engine, found)
    assert engine.metrics().copied_pages_total == 1
    assert_same(found["b"], alone(quiet, "base", prompt, ask("greedy", 4)))


class Clock:
    """A millisecond goes by as it is looked at, and what is slept, however busy this machine is."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        self.now += 1e-3
        return self.now

    perf_counter = monotonic


def test_guesses_hide_the_delay_of_a_far_span(
    demo_zoo: Path, quiet: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delay counts in what steps are learnt to cost, so drafts are long then; answers stay the same."""
    clock = Clock()
    for module in (delayed_span, llm_engine, speculation):
        monkeypatch.setattr(module, "time", clock)
    engine = LLMEngine(
        demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=16 << 20, speculate="auto", num_threads=1)
    )
    far = delay_last_span(engine, "base")
    params = SamplingParams(max_tokens=96, temperature=0.0, ignore_eos=True)
    prompt = [300, 301, 302, 303, 304] * 12
    prompt += alone(quiet, "base", prompt, params).tokens  # it goes round and round from here
    expected = alone(quiet, "base", prompt, params)
    far.seconds = 0.01
    runs = []
    for speculate in (False, True):
        far.num_runs = 0
        assert_same(alone(engine, "base", prompt, replace(params, speculate=speculate)), expected)
        runs.append(far.num_runs)
    assert runs[0] >= 96
    assert runs[1] < 0.4 * runs[0], "most of the delays are waited for once for several tokens"
