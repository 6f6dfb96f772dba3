"""Engine outputs -> the tensors of responses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blockzoo.runtime.api.request import RequestOutput, SamplingParams, TokenLogprob
from blockzoo.server_config.answer import Answer
from blockzoo.server_config.schema import ParsedRequest


def request(stream=False, echo="", logprobs=None) -> ParsedRequest:
    return ParsedRequest("chat", "p", SamplingParams(logprobs=logprobs), stream, echo, None, None, (), None)


def output(text="", ids=(), reason=None, error=None, logprobs=None) -> RequestOutput:
    return RequestOutput("r", "chat", text, ids, logprobs, reason is not None, reason, error, 4, 2, len(ids))


def text_of(response) -> str:
    return response.tensors["text_output"][0, 0].decode()


def test_without_stream_there_is_one_response_with_everything():
    answer = Answer(request(echo="Q: "))
    assert answer.push(output("a", (1,))) is None
    assert answer.push(output("", (2,))) is None
    response = answer.push(output("b", (3,), "length"))
    assert response.final
    assert text_of(response) == "Q: ab"
    assert response.tensors["token_ids"].tolist() == [[1, 2, 3]]
    assert response.tensors["finish_reason"][0, 0] == b"length"
    assert response.tensors["num_prompt_tokens"].tolist() == [[4]]
    assert response.tensors["num_cached_tokens"].tolist() == [[2]]
    assert "cum_log_probs" not in response.tensors


def test_a_stream_has_a_response_per_token_and_counts_with_the_last():
    answer = Answer(request(stream=True))
    first, second = answer.push(output("a", (1,))), answer.push(output("", (2,)))
    last = answer.push(output("b", (3,), "stop"))
    assert [text_of(r) for r in (first, second, last)] == ["a", "", "b"]
    assert [r.tensors["token_ids"].tolist() for r in (first, second, last)] == [[[1]], [[2]], [[3]]]
    assert [r.final for r in (first, second, last)] == [False, False, True]
    assert "finish_reason" not in first.tensors
    assert "finish_reason" in last.tensors


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_add_up(stream):
    answer = Answer(request(stream, logprobs=0))
    first = answer.push(output("a", (1,), logprobs=(TokenLogprob(1, -0.5, ()),)))
    last = answer.push(output("b", (2,), "length", logprobs=(TokenLogprob(2, -0.25, ()),)))
    assert last.tensors["cum_log_probs"].tolist() == [[-0.75]]
    assert last.tensors["cum_log_probs"].dtype == np.float32
    assert last.tensors["output_log_probs"].tolist() == ([[[-0.25]]] if stream else [[[-0.5, -0.25]]])
    if stream:
        assert first.tensors["output_log_probs"].shape == (1, 1, 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_top", [0, 2])
def test_log_probabilities_of_a_prompt_come_once(stream, num_top):
    params = SamplingParams(prompt_logprobs=num_top)
    answer = Answer(ParsedRequest("chat", "p", params, stream, "", None, None, (), None))
    tops = (((7, -0.5), (8, -1.0)), ((9, -0.25), (8, -4.0)))
    told = (None, *(TokenLogprob(t, -0.5 * t, top[:num_top]) for t, top in zip((8, 9), tops, strict=True)))
    first = answer.push(replace(output("a", (1,)), prompt_token_ids=(6, 8, 9), prompt_logprobs=told))
    last = answer.push(output("b", (2,), "length"))
    with_them, without = (first, last) if stream else (last, None)
    tensors = {name: a.tolist() for name, a in with_them.tensors.items() if name.startswith("prompt_")}
    expected = {"prompt_token_ids": [[6, 8, 9]], "prompt_log_probs": [[-4.0, -4.5]]}
    if num_top:
        expected["prompt_top_token_ids"] = [[[7, 8], [9, 8]]]
        expected["prompt_top_log_probs"] = [[[-0.5, -1.0], [-0.25, -4.0]]]
    assert tensors == expected
    assert without is None or not any(name.startswith("prompt_") for name in without.tensors)


def test_an_error_before_any_response_is_an_error():
    response = Answer(request(stream=True)).push(output(reason="error", error="no pages"))
    assert (response.error, response.final, response.tensors) == ("no pages", True, {})


def test_an_error_after_a_response_ends_the_stream_in_band():
    answer = Answer(request(stream=True))
    answer.push(output("a", (1,)))
    response = answer.push(output("tail", reason="error", error="no pages"))
    assert response.error is None
    assert response.final
    assert response.tensors["error"][0, 0] == b"no pages"
    assert text_of(response) == "tail"


def test_a_time_limit_is_told_as_the_reason_of_an_abort():
    answer = Answer(request())
    answer.push(output("a", (1,)))
    assert answer.push(output(reason="abort"), "too late").error == "too late"


def test_text_outside_ascii_is_utf8():
    response = Answer(request()).push(output("żółw 🐢", (1,), "stop"))
    assert response.tensors["text_output"][0, 0] == "żółw 🐢".encode()


def test_the_likeliest_tokens_come_in_the_tokens_places():
    answer = Answer(request(stream=True, logprobs=2))
    first = answer.push(output("a", (1,), logprobs=(TokenLogprob(1, -0.5, ((1, -0.5), (4, -1.0))),)))
    assert first.tensors["top_token_ids"].tolist() == [[[1, 4]]]
    assert first.tensors["top_log_probs"].tolist() == [[[-0.5, -1.0]]]
    assert (first.tensors["top_token_ids"].dtype, first.tensors["top_log_probs"].dtype) == ("i4", "f4")
    last = answer.push(output("", (), "length", logprobs=()))
    assert last.tensors["top_token_ids"].shape == last.tensors["top_log_probs"].shape == (1, 0, 2)
