"""Bodies of any values in any field: each gets an answer or an error, and the server stays as it was."""

from __future__ import annotations

import json
import random

import openai
import pytest

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
TEXT = {"model": "chat", "prompt": "x", "max_tokens": 1}
RESPONSE = {"model": "chat", "input": "x", "max_output_tokens": 1}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FIELDS = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "echo",
    "best_of",
    "user",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "kv_reuse",
    "kv_scope",
    "documents",
    "bad_words",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "chat_template_kwargs",
    "modalities",
    "add_generation_prompt",
    "continue_final_message",
    "suffix",
    "tokens",
    "add_special_tokens",
    "unheard_of",
    "input",
    "instructions",
    "max_output_tokens",
    "text",
    "include",
    "metadata",
    "store",
    "truncation",
    "background",
    "previous_response_id",
    "reasoning",
]
LEAVES = (
    *(None, True, False, 0, 1, -1, 3, 10**18, 2**64, 0.5, -1e300, "", "x", "required", "approx"),
    *("é\x00\u2028🐢", "x" * 3000, "0", "json_object", "<tool_call>", "{{ 7 * 7 }}"),
)
KEYS = (
    "type",
    "role",
    "content",
    "name",
    "function",
    "arguments",
    "json_schema",
    "schema",
    "text",
    "5",
    "$ref",
    "",
    "format",
    "call_id",
    "output",
    "parameters",
)


def any_value(draw: random.Random, depth: int = 0):
    kind = draw.random()
    if depth > 3 or kind < 0.6:
        return draw.choice(LEAVES)
    if kind < 0.8:
        return [any_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return any_object(draw, depth + 1)


def any_object(draw: random.Random, depth: int = 1):
    return {draw.choice(KEYS): any_value(draw, depth) for _ in range(draw.randrange(4))}


def near_value(draw: random.Random):
    """What is almost right."""
    return draw.choice(
        (
            [{"role": draw.choice(LEAVES), "content": any_value(draw)}],
            [
                {"role": "assistant", "tool_calls": any_value(draw)},
                {"role": "tool", "content": any_value(draw)},
            ],
            [{"type": "function", "function": {"name": "f", "parameters": any_value(draw)}}],
            {"type": "json_schema", "json_schema": {"schema": any_value(draw)}},
            {"type": "grammar", "syntax": "lark", "definition": any_value(draw)},
            {"type": "function", "function": any_value(draw)},
            {str(draw.choice(LEAVES)): any_value(draw)},
            [TOOL],
            [{"role": "user", "content": [{"type": "input_text", "text": any_value(draw)}]}],
            [
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": any_value(draw)},
                {"type": "function_call_output", "call_id": "c", "output": any_value(draw)},
            ],
            [{"type": draw.choice(("message", "reasoning", "function_call")), **any_object(draw)}],
            [{"type": "function", "name": "f", "parameters": any_value(draw)}],
            {"format": {"type": "json_schema", "name": "x", "schema": any_value(draw)}},
        )
    )


def named_nowhere(message: str) -> bool:
    """Errors of no one field: of values that do not go together, and of the engine."""
    return message.startswith(
        ("guided cannot go with", "the prompt has", "logit_bias holds", "The prompt holds")
    )


@pytest.fixture(scope="module")
def endpoint(serve_openai, chat_zoo):
    return serve_openai(chat_zoo)


@pytest.mark.parametrize("seed", range(6))
def test_any_body_is_answered(endpoint, seed):
    draw = random.Random(seed)
    for _ in range(100):
        path, body = draw.choice(
            (
                ("/v1/responses", RESPONSE),
                ("/v1/responses", RESPONSE),
                ("/v1/chat/completions", CHAT),
                ("/v1/completions", TEXT),
                ("/tokenize", TEXT),
                ("/detokenize", {}),
            )
        )
        body = dict(body)
        for _ in range(draw.randrange(1, 4)):
            body[draw.choice(FIELDS)] = near_value(draw) if draw.random() < 0.4 else any_value(draw)
        limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        body[limit] = draw.choice((1, 2, body.get(limit)))
        if body[limit] not in (1, 2) or "max_completion_tokens" in body:
            body["ignore_eos"], body[limit] = False, 1
        status, _, text = endpoint.ask("POST", path, body)
        assert status in (200, 400, 404), (body, status, text)
        if status != 200:
            error = json.loads(text)["error"]
            assert error["message"], body
            assert path != "/v1/responses" or error["param"] or named_nowhere(error["message"]), (body, error)
            assert len(text) < 4000
        else:
            assert "Internal error" not in text
    endpoint.wait_until_idle()
    assert endpoint.client.chat.completions.create(**CHAT).usage.completion_tokens == 1
    assert not [line for line in endpoint.served.err if "Traceback" in line]


def test_refusals_do_not_wear_the_server_down(endpoint):
    """Triton's own errors with a status on gRPC streams log an error each, and end it after some thousand."""
    pid = endpoint.served.server_pid()
    for _ in range(50):
        with pytest.raises(openai.BadRequestError):
            endpoint.client.completions.create(model="chat", prompt="x", logit_bias={"99999": 1})
    assert endpoint.served.server_pid() == pid
    assert not [line for line in endpoint.served.err if "HandleCancellation" in line]
