"""The engine loop on the demo zoo: outputs, ends, errors, and memory that comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE_S

from blockzoo.runtime import LLM, EngineConfig, EngineThread, LLMEngine, RequestOutput, SamplingParams
from blockzoo.runtime.api.errors import (
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
    UnknownModelError,
)
from blockzoo.runtime.kv.sequence import TokenSequence
from blockzoo.runtime.serve.step_pace import measured_pace
from blockzoo.zoo.store import Zoo

pytestmark = pytest.mark.usefixtures("steady_pace")
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPT = "def main(argv):\n    "
CONFIG = EngineConfig(precision="f32", kv_cache_bytes=16 << 20, max_num_seqs=8)


@pytest.fixture(scope="module")
def shared_engine(demo_zoo: Path) -> LLMEngine:
    return LLMEngine(demo_zoo, CONFIG)


@pytest.fixture
def engine(shared_engine: LLMEngine) -> Iterator[LLMEngine]:
    """The engine, idle, and every page accounted for afterwards."""
    yield shared_engine
    assert not shared_engine.has_unfinished()
    shared_engine.check_integrity()
    metrics = shared_engine.metrics()
    assert metrics.pages_used == 0
    assert metrics.pages_free + metrics.pages_cached == metrics.pages_total


def run(engine: LLMEngine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def text(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def test_outputs_come_token_by_token_and_end_once(engine: LLMEngine) -> None:
    engine.add_request("r", "base", PROMPT, GREEDY)
    outputs = run(engine)["r"]
    assert [len(output.token_ids) for output in outputs] == [1] * 8
    assert [output.finished for output in outputs] == [False] * 7 + [True]
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].num_generated == 8
    ids = [token for output in outputs for token in output.token_ids]
    assert text(outputs) == engine.tokenizer("base").decode(ids)


def test_a_stop_word_ends_the_text_before_it(engine: LLMEngine) -> None:
    engine.add_request(
        "free", "base", PROMPT, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    )
    free = text(run(engine)["free"])
    word = free[5:8]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(word,))
    engine.add_request("r", "base", PROMPT, params)
    outputs = run(engine)["r"]
    assert text(outputs) == free[: free.index(word)]
    assert outputs[-1].finish_reason == "stop"


def test_the_end_of_sequence_token_ends_without_text(engine: LLMEngine, demo_zoo: Path) -> None:
    model = engine._zoo.models["base"]
    engine.add_request("probe", "base", PROMPT, GREEDY)
    first = run(engine)["probe"][0].token_ids[0]
    object.__setattr__(model, "eos_token_ids", (first,))
    try:
        engine.add_request("r", "base", PROMPT, SamplingParams(temperature=0.0))
        outputs = run(engine)["r"]
    finally:
        object.__setattr__(model, "eos_token_ids", (1,))
    assert len(outputs) == 1
    assert (outputs[0].finish_reason, outputs[0].text, outputs[0].token_ids) == ("stop", "", (first,))


def test_log_probabilities(engine: LLMEngine) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=2)
    engine.add_request("r", "base", PROMPT, params)
    for output in run(engine)["r"]:
        assert output.logprobs is not None
        (entry,) = output.logprobs
        assert entry.token_id == output.token_ids[0] == entry.top[0][0]
        assert entry.logprob == entry.top[0][1] <= 0
        assert len(entry.top) == 2


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_newcomer_is_served_at_once_and_nobody_loses_a_token(demo_zoo: Path, prefix_caching: bool) -> None:
    settings: dict[str, Any] = {
        "precision": "f32",
        "kv_cache_bytes": 16 << 20,
        "prefix_caching": prefix_caching,
    }
    prompts = [[5 + i, *range(10, 40 + i)] for i in range(12)]
    params = SamplingParams(max_tokens=40, temperature=0.9, seed=3, ignore_eos=True)
    quiet = LLM(demo_zoo, **settings, max_num_seqs=1)
    expected = [c.token_ids for c in quiet.generate("base", prompts, params, progress=False)]
    polite = quiet.generate("base-sharded", PROMPT, GREEDY, progress=False)[0].token_ids

    engine = LLMEngine(demo_zoo, EngineConfig(**settings, max_num_seqs=4))
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), "base", prompt, params)
    found: dict[str, tuple[int, ...]] = {}

    def step() -> set[str]:
        outputs = engine.step()
        for output in outputs:
            found[output.request_id] = found.get(output.request_id, ()) + output.token_ids
        return {output.request_id for output in outputs}

    for number in range(6):
        for _ in range(13):
            step()
        engine.add_request(f"polite {number}", "base-sharded", PROMPT, GREEDY)
        assert f"polite {number}" in step(), "its first token is a step away"
    while engine.has_unfinished():
        step()
    assert [found[str(i)] for i in range(12)] == expected
    assert {found[f"polite {number}"] for number in range(6)} == {polite}
    assert engine.metrics().preemptions_total >= 5
    engine.check_integrity()


def test_the_pace_of_prefill_is_seeded_by_the_zoo_and_learnt_from_steps(demo_zoo: Path) -> None:
    manifest = Zoo.open(demo_zoo).manifest
    times = {1: 7.0, 256: 512.0}  # us a block
    blocks = {i: block.with_latency(i, times) for i, block in manifest.blocks.items()}
    model = manifest.models["base"]
    layers = len(model.chain) - 2  # attention and feed-forward, without embedding and head
    assert measured_pace(replace(manifest, blocks=blocks), "base") == pytest.approx(layers * 2e-6)
    blocks[model.chain[1]] = blocks[model.chain[1]].with_latency(None, None)
    assert measured_pace(replace(manifest, blocks=blocks), "base") is None
    assert measured_pace(manifest, "nobody") is None

    engine = LLMEngine(demo_zoo, CONFIG)
    before = engine._pace.seconds_per_token("base")
    engine.add_request("r", "base", list(range(5, 105)), GREEDY)
    run(engine)
    learnt = engine._pace.seconds_per_token("base")
    assert learnt is not None
    assert learnt > 0
    assert learnt != before


def test_max_tokens_is_cut_where_the_context_ends(demo_zoo: Path) -> None:
    engine = LLMEngine(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=16 << 20, max_model_len=40))
    assert engine.max_model_len("base") == 40
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    engine.add_request("r", "base", [5] * 37, params)
    outputs = run(engine)["r"]
    assert (outputs[-1].num_generated, outputs[-1].finish_reason) == (3, "length")
    with pytest.raises(PromptTooLongError, match="40 tokens; base takes at most 39"):
        engine.add_request("r", "base", [5] * 40, params)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "bas"}, UnknownModelError, "did you mean 'base'"),
        ({"model": "zzz"}, UnknownModelError, "it serves base, "),
        ({"prompt": ""}, InvalidRequestError, "empty"),
        ({"prompt": [5, 99999]}, InvalidRequestError, "99999"),
        ({"prompt": [-3]}, InvalidRequestError, "-3"),
        ({"prompt": [5] * 5000}, PromptTooLongError, "5000 tokens"),
    ],
)
def test_bad_requests_are_refused_by_name(
    engine: LLMEngine, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.add_request("r", **({"model": "base", "prompt": PROMPT, "params": GREEDY} | change))


def test_a_request_id_in_use_is_refused(engine: LLMEngine) -> None:
    engine.add_request("r", "base", PROMPT, GREEDY)
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add_request("r", "base", PROMPT, GREEDY)
    assert len(run(engine)) == 1


@pytest.mark.parametrize("steps", range(5))
def test_abort_at_any_moment(engine: LLMEngine, steps: int) -> None:
    for name in ("a", "b", "c"):
        engine.add_request(name, "solver", PROMPT * 4, GREEDY)
    outputs = [output for _ in range(steps) for output in engine.step()]
    last = engine.abort("b")
    assert last is not None
    assert last.finish_reason == "abort"
    assert engine.abort("b") is None
    rest = run(engine)
    assert set(rest) == {"a", "c"}
    assert sum(output.request_id == "a" for output in outputs) + len(rest["a"]) == 8


def test_an_engine_that_fails_in_a_step_ends_its_requests_and_goes_on(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = next(iter(engine._zoo.executors.values()))
    real, count = executor.run, 0

    def failing(batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("out of luck")
        return real(batch)

    monkeypatch.setattr(executor, "run", failing)
    for name in ("a", "b"):
        engine.add_request(name, "base", PROMPT, GREEDY)
    for output in (outputs[-1] for outputs in run(engine).values()):
        assert output.finish_reason == "error"
        assert "out of luck" in (output.error or "")
    engine.add_request("after", "base", PROMPT, GREEDY)
    assert run(engine)["after"][-1].finish_reason == "length"


def test_rows_that_cannot_run_end_their_request_alone(engine: LLMEngine) -> None:
    engine.add_request("alone", "base", PROMPT, GREEDY)
    expected = text(run(engine)["alone"])
    for name in ("good", "bad", "fine"):
        engine.add_request(name, "base", PROMPT, GREEDY)
    engine._requests["bad"].seq._tokens[3] = 10**6
    outputs = run(engine)
    assert [part.finish_reason for part in outputs["bad"]] == ["error"]
    assert "token ids" in (outputs["bad"][0].error or "")
    assert text(outputs["good"]) == text(outputs["fine"]) == expected


@pytest.mark.parametrize("where", ["before", "after"])
def test_an_error_around_a_step_ends_one_request(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    real = getattr(engine._runner._reuse, where)

    def failing(seq: TokenSequence, *arguments: Any) -> Any:
        if seq.request_id == "bad":
            raise RuntimeError("out of luck")
        return real(seq, *arguments)

    monkeypatch.setattr(engine._runner._reuse, where, failing)
    for name in ("good", "bad"):
        engine.add_request(name, "base", PROMPT, GREEDY)
    outputs = run(engine)
    assert outputs["bad"][-1].error == "the engine failed: out of luck"
    assert outputs["good"][-1].finish_reason == "length"
    assert "out of luck" in capsys.readouterr().err  # and whoever runs the server sees where


def test_a_token_that_cannot_be_shown_ends_one_request(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "bad"):
        engine.add_request(name, "base", PROMPT, GREEDY)

    def failing(token_id: int) -> str:
        raise RuntimeError("no such character")

    monkeypatch.setattr(engine._requests["bad"].detokenizer, "push", failing)
    outputs = run(engine)
    assert [part.error for part in outputs["bad"]] == ["the engine failed: no such character"]
    assert outputs["good"][-1].finish_reason == "length"
    assert "no such character" in capsys.readouterr().err


def test_cached_tokens_are_told_in_whole_pages(engine: LLMEngine) -> None:
    """Token by token they would spell out what others have asked."""
    prompt = np.random.default_rng(7).integers(2, 2048, 90).tolist()
    engine.add_request("first", "base", prompt, GREEDY)
    run(engine)
    before = engine.metrics()
    for count, told in ((4, 0), (30, 0), (33, 32), (50, 32), (80, 64)):
        engine.add_request("again", "base", [*prompt[:count], 5, 6, 7], GREEDY, kv_reuse="exact")
        assert {output.num_cached_tokens for output in run(engine)["again"]} == {told}
    after = engine.metrics()
    assert after.copied_pages_total > before.copied_pages_total  # parts of pages are used all the same
    assert after.cached_tokens_total - before.cached_tokens_total == 32 + 32 + 64


def test_a_row_of_nan_ends_only_its_request(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = next(iter(engine._zoo.executors.values()))
    real = executor.run

    def poisoned(batch: Any) -> Any:
        result = real(batch)
        for logits, indices in result.logits:
            logits[[i for i, index in enumerate(indices) if index == 0]] = np.nan
        return result

    monkeypatch.setattr(executor, "run", poisoned)
    for name in ("first", "second"):
        engine.add_request(name, "base", PROMPT, SamplingParams(max_tokens=1, temperature=0.0))
    outputs = run(engine)
    assert outputs["first"][-1].finish_reason == "error"
    assert "finite" in (outputs["first"][-1].error or "")
    assert outputs["second"][-1].finish_reason in ("length", "stop")


def test_a_request_that_takes_too_long_ends_with_an_error(demo_zoo: Path) -> None:
    config = EngineConfig(precision="f32", kv_cache_bytes=16 << 20, max_request_seconds=1e-6)
    engine = LLMEngine(demo_zoo, config)
    engine.add_request("r", "base", PROMPT, GREEDY)
    (output,) = run(engine)["r"]
    assert output.finish_reason == "error"
    assert "max_request_seconds" in (output.error or "")


def test_a_kv_budget_without_a_page_is_refused(demo_zoo: Path) -> None:
    with pytest.raises(InvalidRequestError, match="raise it"):
        LLMEngine(demo_zoo, EngineConfig(kv_cache_bytes=1000))


@pytest.mark.parametrize(
    "setting",
    [
        {"precision": "fp8"},
        {"kv_cache_bytes": 0},
        {"max_num_seqs": 0},
        {"max_waiting": -1},
        {"max_num_batched_tokens": 31},
        {"schedule": "random"},
        {"kv_sharing": "all"},
        {"boundary_cache_bytes": -1},
        {"max_request_seconds": 0.0},
    ],
)
def test_settings_out_of_range_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(setting))):
        EngineConfig(**setting)


# ---- LLM


def test_generate_takes_one_or_many(demo_zoo: Path) -> None:
    llm = LLM(demo_zoo, precision="f32", kv_cache_bytes=16 << 20)
    (one,) = llm.generate("base", PROMPT, GREEDY)
    texts = llm.generate(["base", "solver"], [PROMPT, PROMPT], [GREEDY, GREEDY])
    assert texts[0].text == one.text
    assert texts[0].token_ids == one.token_ids
    assert [completion.model for completion in texts] == ["base", "solver"]
    with pytest.raises(InvalidRequestError, match="2 entries for 1 prompts"):
        llm.generate(["base", "solver"], PROMPT)
    with pytest.raises(UnknownModelError):
        llm.generate("nobody", PROMPT)
    assert not llm.engine.has_unfinished()


def test_a_stop_word_that_is_a_special_token(demo_zoo: Path) -> None:
    llm = LLM(demo_zoo, precision="f32", kv_cache_bytes=16 << 20)
    asked = "Q: 3+4\nA:"
    (end,) = llm.engine.end_ids["solver"]  # </s>
    (expected,) = llm.generate("solver", asked, SamplingParams(max_tokens=64, temperature=0.0))
    assert expected.token_ids[-1] == end
    assert expected.finish_reason == "stop"
    for fields, text in (
        ({}, expected.text),
        ({"skip_special_tokens": False}, expected.text),
        ({"include_stop": True}, f"{expected.text}</s>"),
        ({"min_tokens": len(expected.token_ids) - 1}, expected.text),
    ):
        params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True, stop=("</s>",), **fields)
        (found,) = llm.generate("solver", asked, params)
        assert (found.text, found.token_ids, found.finish_reason) == (text, expected.token_ids, "stop")
    # it ends the answer anyway
    params = SamplingParams(max_tokens=64, temperature=0.0, stop=("</s>",), include_stop=True)
    (found,) = llm.generate("solver", asked, params)
    assert (found.text, found.token_ids) == (f"{expected.text}</s>", expected.token_ids)


def test_generate_takes_token_ids_of_any_integer_type(demo_zoo: Path) -> None:
    llm = LLM(demo_zoo, precision="f32", kv_cache_bytes=16 << 20)
    ids = llm.engine.tokenizer("base").encode(PROMPT)
    (expected,) = llm.generate("base", ids, GREEDY)
    array = np.array(ids, np.int32)
    for one in (array, tuple(ids), list(array), array.astype(np.uint64), np.array([PROMPT])):
        (found,) = llm.generate("base", one, GREEDY)  # type: ignore[arg-type]
        assert found.token_ids == expected.token_ids
    found, again = llm.generate("base", [array, PROMPT], GREEDY)
    assert found.token_ids == again.token_ids == expected.token_ids
    assert llm.generate("base", [], GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (np.array([[1, 2], [3, 4]]), r"array of int64 of shape \(2, 2\)"),
        (np.array([1.5]), "array of float64"),
        (np.array([], np.int64), "the prompt is empty"),
        ([np.array([], np.int64)], "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ([1.5, 2.5], r"prompt\[0\] is 1.5"),
        ([True, False], r"prompt\[0\] is True"),
        (np.array([True]), "array of bool"),
        (["a", 7], "of type int"),
        ([7, "a"], r"prompt\[1\] is 'a'"),
        ([2**70], r"prompt\[0\] is 1180591620717411303424"),
        (b"bytes", "of type bytes"),
        ([b"bytes"], "of type bytes"),
        (7, "of type int"),
        (None, "of type NoneType"),
    ],
)
def test_generate_refuses_what_is_no_prompt(engine: LLMEngine, prompts: Any, message: str) -> None:
    llm = LLM.__new__(LLM)
    llm.engine = engine
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate("base", prompts, GREEDY)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (5, {}, "model is 5; expected str"),
        (["base", None], {}, r"model\[1\] is None; expected str"),
        ("base", {"params": {"max_tokens": 5}}, r"params is \{'max_tokens': 5\}; expected SamplingParams"),
        ("base", {"params": [GREEDY, "greedy"]}, r"params\[1\] is 'greedy'; expected SamplingParams"),
        ("base", {"params": []}, "params has 0 entries for 2 prompts"),
        ("base", {"kv_reuse": ["off", 1]}, r"kv_reuse\[1\] is 1; expected str"),
        ("base", {"documents": "text"}, "documents is of type str; expected a list"),
        ("base", {"documents": [[1, 2]]}, "A text to tokenize is of type list"),
    ],
)
def test_generate_refuses_other_arguments_by_name(
    engine: LLMEngine, model: Any, arguments: dict[str, Any], message: str
) -> None:
    llm = LLM.__new__(LLM)
    llm.engine = engine
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(model, ["a", "b"], **arguments)


# ---- EngineThread


class Sink:
    """Collects the outputs of requests; `done` is set when each has ended."""

    def __init__(self, expected: int) -> None:
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.done = threading.Event()
        self._left = expected

    def __call__(self, output: RequestOutput) -> None:
        self.outputs.setdefault(output.request_id, []).append(output)
        if output.finished:
            self._left -= 1
            if self._left == 0:
                self.done.set()


@pytest.fixture
def thread(demo_zoo: Path) -> Iterator[EngineThread]:
    thread = EngineThread(demo_zoo, CONFIG)
    yield thread
    thread.close()
    assert not thread.alive


def test_many_callers_at_once(thread: EngineThread) -> None:
    sink = Sink(24)

    def submit(caller: int) -> None:
        for i in range(6):
            thread.submit(f"{caller}-{i}", thread.models[i % 5], PROMPT, GREEDY, sink)

    callers = [threading.Thread(target=submit, args=(caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sink.done.wait(PATIENCE_S)
    assert len(sink.outputs) == 24
    assert all(text(sink.outputs[f"0-{i}"]) == text(sink.outputs[f"3-{i}"]) for i in range(6))


def test_what_is_wrong_is_raised_where_it_was_submitted(thread: EngineThread) -> None:
    with pytest.raises(UnknownModelError):
        thread.submit("r", "nobody", PROMPT, GREEDY, Sink(1))
    with pytest.raises(InvalidRequestError, match="array of float64"):
        thread.submit("r", "base", np.ones(3), GREEDY, Sink(1))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="to tokenize is of type list"):
        thread.publish("doc", [5, 6])  # type: ignore[arg-type]
    sink = Sink(1)
    thread.submit("r", "base", PROMPT, GREEDY, sink)
    assert sink.done.wait(PATIENCE_S)
    ids = np.array(thread.engine.tokenizer("base").encode(PROMPT), np.uint16)
    again = Sink(1)
    thread.submit("s", "base", ids, GREEDY, again)
    assert again.done.wait(PATIENCE_S)
    assert text(again.outputs["s"]) == text(sink.outputs["r"])


def test_a_full_queue_is_refused_at_once(demo_zoo: Path) -> None:
    config = EngineConfig(precision="f32", kv_cache_bytes=16 << 20, max_num_seqs=1, max_waiting=2)
    thread = EngineThread(demo_zoo, config)
    long = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True)
    sink = Sink(3)
    for i in range(3):
        thread.submit(str(i), "base", PROMPT, long, sink)
    with pytest.raises(OverloadedError, match="3 requests"):
        thread.submit("3", "base", PROMPT, long, sink)
    for i in range(3):
        thread.abort(str(i))
    assert sink.done.wait(PATIENCE_S)
    assert {outputs[-1].finish_reason for outputs in sink.outputs.values()} <= {"abort", "length"}
    thread.close()


def test_a_full_queue_refuses_the_flood_alone(demo_zoo: Path) -> None:
    config = EngineConfig(precision="f32", kv_cache_bytes=16 << 20, max_num_seqs=2, max_waiting=4)
    thread = EngineThread(demo_zoo, config)
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    sink, polite = Sink(6), Sink(2)
    for i in range(6):
        thread.submit(str(i), "base", PROMPT, long, sink)
    with pytest.raises(OverloadedError, match="6 of them of 'base', whose share of the 6 that may be is 6"):
        thread.submit("6", "base", PROMPT, long, sink)
    thread.submit("polite", "base-sharded", PROMPT, GREEDY, polite)
    thread.submit("keyed", "base", PROMPT, GREEDY, polite, tenant="a key")
    assert polite.done.wait(PATIENCE_S)
    assert {outputs[-1].finish_reason for outputs in polite.outputs.values()} == {"length"}
    metrics = thread.metrics()
    assert metrics.model_requests_refused_total == {"base": 1}
    assert metrics.model_requests_running.keys() == {"base", "base-sharded"}
    for i in range(6):
        thread.abort(str(i))
    assert sink.done.wait(PATIENCE_S)
    idle = {"base": 0, "base-sharded": 0}
    assert thread.metrics().model_requests_running == thread.metrics().model_requests_waiting == idle
    assert not thread._held
    thread.close()


def test_a_callback_that_raises_loses_its_own_request_only(thread: EngineThread) -> None:
    def broken(output: RequestOutput) -> None:
        raise OSError("client is gone")

    sink = Sink(1)
    thread.submit("broken", "base", PROMPT, GREEDY, broken)
    thread.submit("good", "base", PROMPT, GREEDY, sink)
    assert sink.done.wait(PATIENCE_S)
    assert sink.outputs["good"][-1].finish_reason == "length"


def test_drain_finishes_what_runs_and_refuses_the_rest(thread: EngineThread) -> None:
    sink = Sink(3)
    for i in range(3):
        thread.submit(str(i), "base", PROMPT, GREEDY, sink)
    assert thread.drain(PATIENCE_S)
    assert all(outputs[-1].finish_reason == "length" for outputs in sink.outputs.values())
    with pytest.raises(OverloadedError, match="shutting down"):
        thread.submit("late", "base", PROMPT, GREEDY, sink)


def test_close_ends_what_still_runs(demo_zoo: Path) -> None:
    thread = EngineThread(demo_zoo, CONFIG)
    sink = Sink(2)
    long = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True)
    for i in range(2):
        thread.submit(str(i), "base", PROMPT, long, sink)
    thread.close()
    assert sink.done.is_set()
    assert {outputs[-1].finish_reason for outputs in sink.outputs.values()} == {"abort"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_thread_tells_everybody(demo_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = EngineThread(demo_zoo, CONFIG)

    def die() -> list[RequestOutput]:
        raise MemoryError("no more")

    monkeypatch.setattr(thread.engine, "step", die)
    sink = Sink(1)
    thread.submit("r", "base", PROMPT, GREEDY, sink)
    assert sink.done.wait(PATIENCE_S)
    assert sink.outputs["r"][-1].finished
    thread._thread.join(PATIENCE_S)  # its error must not reach whatever test comes next
    assert not thread.alive
    with pytest.raises(RequestError, match="no more"):
        thread.submit("s", "base", PROMPT, GREEDY, sink)
