"""Log-probabilities of prompts against transformers' log-softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_against_transformers import assert_greedy, hf_model, prompts

from blockzoo.runtime import LLM, SamplingParams
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.exec.executor import Executor
from blockzoo.runtime.serve.config import MAX_PROMPT_LOGITS

LENGTHS = (1, 2, 31, 33, 129, 300, 470)
ASKED = SamplingParams(max_tokens=8, temperature=0.0, prompt_logprobs=3, logprobs=2, ignore_eos=True)
PLAIN = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)


def expected(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """float32 [tokens - 1, vocab]: of each next token."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).float()[:-1]


def check(model: torch.nn.Module, ids: list[int], found: Any, num_top: int = 3) -> None:
    first, *rest = found
    assert first is None
    oracle = expected(model, ids)
    assert [token.token_id for token in rest] == ids[1:]
    chosen = oracle[range(len(rest)), ids[1:]]
    assert [token.logprob for token in rest] == pytest.approx(chosen.tolist(), abs=1e-4)
    for token, row in zip(rest, oracle, strict=True):
        assert len(token.top) == num_top
        values, ids_of_top = row.topk(num_top)
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        if (values[:-1] - values[1:] > 1e-3).all():
            assert [token_id for token_id, _ in token.top] == ids_of_top.tolist()


@pytest.fixture(scope="module")
def llm(architecture_zoo: Path) -> LLM:
    return LLM(architecture_zoo, precision="f32", kv_cache_bytes=64 << 20, max_num_seqs=4)


@pytest.mark.parametrize("name", ["llama-gqa-untied", "mistral-window", "qwen3-qk-norm"])
def test_they_are_those_of_transformers(llm: LLM, architectures: dict[str, Path], name: str) -> None:
    """In one batch with requests that ask for none; chunks of them are cut by rows of logits."""
    asked, model = prompts(2048, LENGTHS), hf_model(architectures[name])
    params = [ASKED, PLAIN] * len(asked)
    both = [prompt for prompt in asked for _ in range(2)]
    answers = llm.generate(name, both, params, progress=False)
    for prompt, told, plain in zip(asked, answers[::2], answers[1::2], strict=True):
        check(model, prompt, told.prompt_logprobs)
        assert plain.prompt_logprobs is None
        assert_greedy(model, prompt, plain.token_ids)
        assert told.token_ids == plain.token_ids[:8]


def test_adapters_and_the_torch_backend(demo_zoo: Path, demo_family: dict[str, Path]) -> None:
    from peft import PeftModel

    llm = LLM(demo_zoo, precision="f32", kv_cache_bytes=32 << 20, backend="reference", device="cpu")
    asked = prompts(2048, (3, 150))
    params = replace(ASKED, max_tokens=1)
    for name in ("base", "notes"):
        model = hf_model(demo_family["base"])  # an adapter changes it
        if name == "notes":
            model = PeftModel.from_pretrained(model, demo_family["notes"])
        for prompt, told in zip(asked, llm.generate(name, asked, params, progress=False), strict=True):
            check(model, prompt, told.prompt_logprobs)


def test_nothing_has_to_be_generated(llm: LLM, architectures: dict[str, Path]) -> None:
    name = "llama-gqa-untied"
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    asked = prompts(2048, LENGTHS)
    model = hf_model(architectures[name])
    for prompt, told in zip(asked, llm.generate(name, asked, params, progress=False), strict=True):
        check(model, prompt, told.prompt_logprobs, num_top=0)
        assert (told.text, told.token_ids, told.finish_reason) == ("", (), "length")


def test_the_prefix_cache_hides_no_tokens(llm: LLM, architectures: dict[str, Path]) -> None:
    name = "llama-gqa-untied"
    (prompt,) = prompts(2048, (200,))
    model = hf_model(architectures[name])

    def ask(params: SamplingParams, scope: str) -> tuple[int, Any]:
        (told,) = llm.generate(name, [prompt], params, scope=scope, progress=False)
        return told.num_cached_tokens, told.prompt_logprobs

    assert (ask(PLAIN, "warm")[0], ask(PLAIN, "warm")[0]) == (0, 192)
    for _ in range(2):
        num_cached, found = ask(ASKED, "warm")
        assert num_cached == 0
        check(model, prompt, found)
    ask(ASKED, "cold")
    assert ask(PLAIN, "cold")[0] == 0  # it left nothing
    with pytest.raises(InvalidRequestError, match="prompt_logprobs cannot go with kv_reuse 'approx'"):
        llm.generate(name, [prompt], ASKED, kv_reuse="approx", progress=False)


def test_preempted_prompts_tell_each_token_once(llm: LLM, architectures: dict[str, Path]) -> None:
    name = "llama-gqa-untied"
    asked = prompts(2048, (470, 400, 450, 470, 300))
    model = hf_model(architectures[name])
    before = llm.engine.metrics().preemptions_total
    for i, prompt in enumerate(asked[:4]):
        llm.engine.add_request(str(i), name, prompt, replace(ASKED, max_tokens=40), tenant="flood")
    told: dict[str, list[Any]] = {}
    for number in count():
        if not llm.engine.has_unfinished():
            break
        if number == 12:  # the last of them is amid its prompt, and gives way
            assert 0 < llm.engine._requests["3"].seq.num_computed < len(asked[3])
            llm.engine.add_request("4", name, asked[4], ASKED, tenant="newcomer")
        for output in llm.engine.step():
            assert output.error is None
            if output.prompt_logprobs is not None:
                told.setdefault(output.request_id, []).append(output)
                assert output.request_id != "3" or number > 15
    assert llm.engine.metrics().preemptions_total > before
    for i, prompt in enumerate(asked):
        (output,) = told[str(i)]
        assert output.prompt_token_ids == tuple(prompt)
        check(model, prompt, output.prompt_logprobs)


def test_a_step_has_bounded_rows_of_logits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run: Callable[..., Any] = Executor.run

    def counted(self: Executor, batch: Any) -> Any:
        seen.append(sum(rows.num_logits for rows in batch))
        return run(self, batch)

    monkeypatch.setattr(Executor, "run", counted)
    asked = prompts(2048, (470, 2, 470, 40, 300))
    llm.generate("llama-gqa-untied", asked, ASKED, progress=False)
    assert MAX_PROMPT_LOGITS <= max(seen) <= MAX_PROMPT_LOGITS + 4


def test_logits_that_are_not_finite_end_their_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = prompts(2048, (5, 40))
    run: Callable[..., Any] = Executor.run

    def broken(self: Executor, batch: Any) -> Any:
        result = run(self, batch)
        for logits, members in result.logits:
            firsts = [members.index(member) for member in set(members)]
            long_ones = [row for row in firsts if len(batch[members[row]].token_ids) == 40]
            logits[long_ones] = np.nan
        return result

    monkeypatch.setattr(Executor, "run", broken)
    for i, (prompt, max_tokens) in enumerate(((short, 8), (long, 8), (long, 0))):
        llm.engine.add_request(str(i), "llama-gqa-untied", prompt, replace(ASKED, max_tokens=max_tokens))
    ends = {}
    while llm.engine.has_unfinished():
        ends |= {output.request_id: output for output in llm.engine.step() if output.finished}
    assert ends["0"].finish_reason == "length"
    for number in ("1", "2"):
        assert ends[number].finish_reason == "error"
        assert "largest logit is nan" in ends[number].error
