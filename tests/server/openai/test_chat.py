"""/v1/chat/completions on a real server, by OpenAI's own client, against transformers and the library."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from quiet import near
from transformers import AutoTokenizer

from blockzoo.runtime import LLM, SamplingParams

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe 你好?"},
    {"role": "assistant", "content": "x = 1"},
    {"role": "user", "content": "def parse(line):"},
]


@pytest.fixture(scope="module")
def endpoint(serve_openai, chat_zoo):
    return serve_openai(chat_zoo)


@pytest.fixture(scope="module")
def client(endpoint):
    return endpoint.client


@pytest.fixture(scope="module")
def llm(chat_zoo):
    return LLM(chat_zoo, precision="f32")


@pytest.fixture(scope="module")
def tokenizers(chat_family):
    return {name: AutoTokenizer.from_pretrained(chat_family[name]) for name in ("chat", "llama")}


@pytest.mark.parametrize("model", ["chat", "llama"])
def test_answers_are_those_to_the_prompt_of_transformers(client, llm, tokenizers, model):
    prompt = tokenizers[model].apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    params = SamplingParams(max_tokens=20, temperature=0.0)
    (expected,) = llm.generate(model, [prompt], params, progress=False)
    asked = {"model": model, "messages": MESSAGES, "max_completion_tokens": 20, "temperature": 0}
    answer = client.chat.completions.create(**asked)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason == "length"
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens
    assert answer.usage.completion_tokens == 20
    chunks = list(client.chat.completions.create(**asked, stream=True))
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert "".join(part.delta.content for part in middle) == expected.text
    assert {part.delta.role for part in middle} == {None}
    assert (last.delta.content, last.finish_reason) == (None, "length")


def test_async_streams_with_usage_and_several_choices(endpoint, client):
    asked = {"model": "chat", "messages": MESSAGES, "max_tokens": 10, "seed": 4, "n": 2}
    whole = client.chat.completions.create(**asked)

    async def main():
        texts, usage, roles = ["", ""], None, []
        async with endpoint.async_client() as async_client:
            stream = await async_client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    roles += [choice.index] if choice.delta.role else []
        return texts, usage, roles

    texts, usage, roles = asyncio.run(main())
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == [0, 1]
    assert usage.completion_tokens == whole.usage.completion_tokens == 20
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_log_probabilities(client, llm, tokenizers):
    prompt = tokenizers["chat"].apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=4)
    (expected,) = llm.generate("chat", [prompt], params, progress=False)
    asked = {"model": "chat", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": 4}
    choice = client.chat.completions.create(**asked).choices[0]
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content
    assert [token.logprob for token in tokens] == pytest.approx(
        [t.logprob for t in expected.logprobs], abs=1e-3
    )
    assert [token.top_logprobs[0].token for token in tokens] == [token.token for token in tokens]
    assert {len(token.top_logprobs) for token in tokens} == {4}
    streamed = client.chat.completions.create(**asked, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    told = [token.model_dump() for part in parts if part for token in part.content]
    assert told == near([token.model_dump() for token in tokens])


def test_parts_developers_and_answers_to_go_on_from(endpoint, client, tokenizers):
    parts = [{"type": "text", "text": "def "}, {"type": "text", "text": "parse(line):"}]
    same = [{"role": "developer", "content": "Be brief."}, *MESSAGES[1:3], {"role": "user", "content": parts}]
    asked = {"model": "chat", "max_tokens": 8, "temperature": 0}
    one, other = (client.chat.completions.create(**asked, messages=m) for m in (MESSAGES, same))
    assert one.choices[0].message.content == other.choices[0].message.content

    def text(**extra):
        _, _, said = endpoint.ask("POST", "/tokenize", {"model": "chat", **extra})
        tokens = json.loads(said)["tokens"]
        return json.loads(endpoint.ask("POST", "/detokenize", {"model": "chat", "tokens": tokens})[2])[
            "prompt"
        ]

    begun = [*MESSAGES, {"role": "assistant", "content": "return"}]
    apply = tokenizers["chat"].apply_chat_template
    assert text(messages=MESSAGES) == apply(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text(messages=begun, continue_final_message=True) == apply(
        begun, tokenize=False, continue_final_message=True
    )
    assert text(messages=MESSAGES, add_generation_prompt=False) == apply(MESSAGES, tokenize=False)


def test_an_answer_is_as_long_as_the_model_allows_by_default(client):
    messages = [{"role": "user", "content": "x " * 3700}]
    asked = {"model": "chat", "messages": messages, "temperature": 0, "extra_body": {"ignore_eos": True}}
    usage = client.chat.completions.create(**asked).usage
    assert usage.completion_tokens > 100
    assert usage.total_tokens == 4096


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"model": "plain"}, "messages", None),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "missing_required_parameter"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": ["hello"]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "x", "a": 1}]}, "messages[0].a", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages", None),
        ({"max_completion_tokens": 5}, "max_tokens", None),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": 2}, "logprobs", "invalid_value"),
        ({"modalities": ["audio"]}, "modalities", "invalid_value"),
        ({"functions": []}, "functions", "unsupported_parameter"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs", "invalid_value"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", None),
        ({"frequency_penaltyy": 1}, "frequency_penaltyy", "unknown_parameter"),
    ],
)
def test_bad_requests_say_what_is_wrong(endpoint, body, param, code):
    body = {"model": "chat", "messages": MESSAGES, "max_tokens": 2, **body}
    status, _, text = endpoint.ask("POST", "/v1/chat/completions", body)
    error = json.loads(text)["error"]
    assert (status, error["param"], error["code"]) == (400, param, code), error


def test_what_a_template_refuses_is_told(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="chat", messages=MESSAGES, extra_body={"chat_template_kwargs": {"messages": []}}
        )
    assert caught.value.param == "messages"
    assert "chat_template_kwargs" in caught.value.message or "kwargs" in caught.value.message
