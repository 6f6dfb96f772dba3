"""Triton inputs -> a prompt and SamplingParams, and every refusal."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from blockzoo.runtime.api.errors import InvalidRequestError, RequestError, UnknownModelError
from blockzoo.runtime.api.request import GuidedDecoding, SamplingParams
from blockzoo.server_config.schema import MAX_TEXT_BYTES, ParsedRequest, parse_request
from blockzoo.server_config.tensors import INPUTS

DTYPES = {
    "INT32": np.int32,
    "UINT64": np.uint64,
    "FP32": np.float32,
    "BOOL": np.bool_,
    "STRING": object,
}
DTYPE_OF = {field.name: DTYPES[field.data_type] for field in INPUTS}
END_IDS = {"chat": (2,), "code": (2, 7)}


def parse(parameters=None, end_ids=END_IDS, **values) -> ParsedRequest:
    """Parse a request given as Python values, shaped [1, n] as clients send them."""
    inputs = {}
    for name, value in values.items():
        value = value if isinstance(value, list) else [value]
        value = [item.encode() if isinstance(item, str) else item for item in value]
        inputs[name] = np.array([value], DTYPE_OF[name])
    return parse_request(inputs, parameters or {}, end_ids)


def test_a_minimal_request_is_greedy_and_echoes_its_prompt():
    request = parse(text_input="Hello", model="chat", max_tokens=5)
    assert request == ParsedRequest(
        model="chat",
        prompt="Hello",
        params=SamplingParams(max_tokens=5, temperature=0.0),
        stream=False,
        echo="Hello",
        kv_scope=None,
        kv_reuse=None,
        documents=(),
        timeout_s=None,
    )


def test_documents_are_texts_and_an_empty_one_is_none():
    documents = np.array([[b"one", "zw\u00f6lf".encode(), b""]], dtype=object)
    assert parse(text_input="x", model="chat", documents=documents).documents == ("one", "zw\u00f6lf")
    with pytest.raises(InvalidRequestError, match="documents is not UTF-8"):
        parse(text_input="x", model="chat", documents=np.array([[b"one", b"\xff"]], dtype=object))


def test_every_sampling_input_is_read():
    request = parse(
        text_input="x",
        model="code",
        max_tokens=9,
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        random_seed=2**64 - 1,
        stop_words=["a", "b c"],
        bad_words=["d"],
        min_length=2,
        return_log_probs=True,
    )
    assert request.params == SamplingParams(
        max_tokens=9,
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=2**64 - 1,
        stop=("a", "b c"),
        bad_words=("d",),
        min_tokens=2,
        logprobs=0,
    )


def test_sampling_parameters_add_what_has_no_input():
    request = parse(
        text_input="x", model="chat", max_tokens=3, sampling_parameters='{"min_p": 0.1, "ignore_eos": true}'
    )
    assert request.params == SamplingParams(max_tokens=3, min_p=0.1, ignore_eos=True)
    guides = {"guided_decoding_guide_type": "lark_grammar", "guided_decoding_guide": "start: /a/"}
    request = parse(text_input="x", model="chat", **guides)
    assert request.params.guided == GuidedDecoding("lark", "start: /a/")
    text = '{"guided": {"kind": "json"}}'
    request = parse(text_input="x", model="chat", sampling_parameters=text)
    assert request.params.guided == GuidedDecoding("json")
    text = '{"logprobs": 3, "logit_bias": {"7": -1.5}}'
    request = parse(
        text_input="x", model="chat", max_tokens=3, return_log_probs=True, sampling_parameters=text
    )
    assert request.params == SamplingParams(
        max_tokens=3, temperature=0.0, logprobs=3, logit_bias=((7, -1.5),)
    )


@pytest.mark.parametrize(
    ("values", "temperature"),
    [
        ({}, 0.0),
        ({"top_k": 0, "top_p": 0.0}, 0.0),  # what clients of the backend send for "off"
        ({"random_seed": 3}, 0.0),
        ({"temperature": 0.5}, 0.5),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"sampling_parameters": '{"top_p": 0.9}'}, 1.0),
    ],
)
def test_sampling_starts_where_something_asks_for_it(values, temperature):
    assert parse(text_input="x", model="chat", **values).params.temperature == temperature


def test_the_usual_request_of_the_backends_documentation():
    request = parse(
        text_input="What is machine learning?",
        model="chat",
        max_tokens=20,
        bad_words="",
        stop_words="",
        pad_id=2,
        end_id=2,
        beam_width=1,
        num_return_sequences=1,
        length_penalty=1.0,
        return_context_logits=False,
        return_generation_logits=False,
    )
    assert request.params == SamplingParams(max_tokens=20, temperature=0.0)


def test_streams_and_excluding_requests_have_no_echo():
    assert parse(text_input="x", model="chat", stream=True).echo == ""
    assert parse(text_input="x", model="chat", exclude_input_in_output=True).echo == ""


def test_token_ids_are_the_prompt_and_the_text_its_echo():
    request = parse(input_ids=[5, 6, 7], text_input="abc", model="chat")
    assert (request.prompt, request.echo) == ([5, 6, 7], "abc")


def test_the_only_model_need_not_be_named():
    assert parse(text_input="x", end_ids={"chat": (2,)}).model == "chat"


def test_kv_scope_and_reuse():
    assert parse(text_input="x", model="chat", kv_scope="team a").kv_scope == "team a"
    for reuse in ("exact", "off", "approx"):
        assert parse(text_input="x", model="chat", kv_reuse=reuse).kv_reuse == reuse


def test_the_client_timeout_is_in_microseconds():
    assert parse({"timeout": 1_500_000}, text_input="x", model="chat").timeout_s == 1.5
    assert parse({"timeout": 0, "id": "7"}, text_input="x", model="chat").timeout_s is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "chat"}, "the prompt is missing; send text_input, or input_ids"),
        ({"text_input": "", "model": "chat"}, "text_input is empty"),
        ({"input_ids": [], "model": "chat"}, "input_ids is empty"),
        ({"text_input": "x"}, "model is missing; name one of chat, code"),
        ({"text_input": b"a\xff", "model": "chat"}, "text_input is not UTF-8 (byte 0xff at 1)"),
        ({"text_input": b"a" * (MAX_TEXT_BYTES + 1), "model": "chat"}, "text_input has 1048577 bytes"),
        ({"max_tokens": 0}, "max_tokens is 0; expected a whole number from 1"),
        ({"max_tokens": -3}, "max_tokens is -3"),
        ({"max_tokens": 2**31 - 1}, "max_tokens is 2147483647"),
        ({"max_tokens": [1, 2]}, "max_tokens has 2 elements; expected 1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": float("inf")}, "top_p is inf"),
        ({"stop_words": ["w"] * 1000}, "stop_words has 1000 texts; expected at most"),
        ({"stop_words": [b"\xc3"]}, "stop_words is not UTF-8"),
        ({"bad_words": ["w" * 5000]}, "bad_words[0] has 5000 characters"),
        ({"beam_width": 4}, "beam_width is 4; this server generates one sequence"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2"),
        ({"return_context_logits": True}, "return_context_logits is true"),
        ({"end_id": 9}, "end_id is 9; the model ends at its own token (2)"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"kv_reuse": "maybe"}, "kv_reuse is 'maybe'; expected off or exact or approx"),
        ({"kv_scope": "s" * 300}, "kv_scope has 300 characters"),
        ({"sampling_parameters": "{"}, "sampling_parameters is not JSON"),
        ({"sampling_parameters": "[" * 100_000}, "sampling_parameters is not JSON"),
        ({"sampling_parameters": "[1]"}, "sampling_parameters is a JSON list; expected an object"),
        (
            {"sampling_parameters": '{"temprature": 1}'},
            "unknown key 'temprature'; did you mean 'temperature'?",
        ),
        ({"sampling_parameters": '{"temperature": "hot"}'}, "temperature is 'hot'; expected a number"),
        ({"sampling_parameters": '{"temperature": NaN}'}, "temperature is nan"),
        ({"guided_decoding_guide": "a"}, "guided_decoding_guide_type is missing; expected one of json,"),
        ({"guided_decoding_guide_type": "regexp"}, "did you mean 'regex'?"),
        ({"guided_decoding_guide_type": "ebnf_grammar", "guided_decoding_guide": "a"}, "'ebnf_grammar'"),
        ({"guided_decoding_guide_type": "regex"}, "guided.guide is ''; expected a text"),
        ({"sampling_parameters": '{"logprobs": 21}'}, "logprobs is 21; expected a whole number from 0 to 20"),
        (
            {"max_tokens": 4, "sampling_parameters": '{"max_tokens": 5}'},
            "max_tokens and sampling_parameters['max_tokens'] are both set; send one",
        ),
    ],
)
def test_bad_requests_say_what_to_do(values, message):
    if not {"model", "text_input", "input_ids"} & values.keys():
        values = {"text_input": "x", "model": "chat", **values}
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        parse(**values)


def test_an_unknown_model_is_told_the_nearest():
    with pytest.raises(UnknownModelError, match=re.escape("no model 'chta'; did you mean 'chat'?")):
        parse(text_input="x", model="chta")


@pytest.mark.parametrize(("name", "nearest"), [("max_token", "max_tokens"), ("stopwords", "stop_words")])
def test_json_keys_that_name_no_input_are_refused(name, nearest):
    with pytest.raises(InvalidRequestError, match=f"no input '{name}'; did you mean '{nearest}'?"):
        parse({name: 5}, text_input="x", model="chat")


@pytest.mark.parametrize("timeout", [-1, "soon", [1], 1e400])
def test_a_timeout_must_be_a_duration(timeout):
    with pytest.raises(InvalidRequestError, match="expected a number of microseconds"):
        parse({"timeout": timeout}, text_input="x", model="chat")


def test_any_json_in_sampling_parameters_is_taken_or_refused():
    """Whatever JSON holds, a request ends in parameters or in a RequestError."""
    odd = [None, True, -1, 10**400, 1e308, "", "x", [], ["a"], [1], {}, {"a": 1}]
    for key in ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos", "min_tokens"):
        for value in odd:
            try:
                request = parse(text_input="x", model="chat", sampling_parameters=json.dumps({key: value}))
            except RequestError:
                continue
            assert isinstance(request.params, SamplingParams)


def test_a_model_that_is_left_out_is_refused_with_the_reason():
    inputs = {"text_input": np.array([b"x"], object), "model": np.array([b"hurt"], object)}
    with pytest.raises(UnknownModelError, match=r"^model 'hurt' is left out: blocks/a: corrupt$"):
        parse_request(inputs, {}, {"chat": (2,), "code": (2,)}, {"hurt": "blocks/a: corrupt"})
