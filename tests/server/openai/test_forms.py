"""Structured outputs and calls of tools on a real server, by OpenAI's own client."""

from __future__ import annotations

import json
import re

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoTokenizer

from blockzoo.runtime import LLM, SamplingParams

MESSAGES = [{"role": "user", "content": "def parse(line):"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ab", "cd"]}, "size": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ok: bool
    size: int = Field(ge=0, le=99)


def tool(name, parameters=SCHEMA):
    return {"type": "function", "function": {"name": name, "description": "It is.", "parameters": parameters}}


@pytest.fixture(scope="module")
def endpoint(serve_openai, chat_zoo):
    return serve_openai(chat_zoo)


@pytest.fixture(scope="module")
def client(endpoint):
    return endpoint.client


def form(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model", ["chat", "llama"])
def test_an_answer_has_the_form_of_a_schema(client, model, seed):
    asked = {"model": model, "messages": MESSAGES, "seed": seed, "response_format": form(SCHEMA, strict=True)}
    choice = client.chat.completions.create(**asked, max_tokens=200).choices[0]
    value = json.loads(choice.message.content)
    assert value["name"] in ("ab", "cd")
    assert 1 <= value["size"] <= 99
    assert choice.finish_reason == "stop"
    chunks = list(client.chat.completions.create(**asked, max_tokens=200, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content


def test_pydantic_models_of_the_client(client):
    asked = {"model": "chat", "messages": MESSAGES, "seed": 1, "max_tokens": 400}
    answer = client.chat.completions.parse(**asked, response_format=Answer).choices[0].message.parsed
    assert isinstance(answer, Answer)


def test_objects_expressions_and_grammars(client):
    def content(response_format, **fields):
        asked = {"model": "chat", "messages": MESSAGES, "seed": 5, "response_format": response_format}
        return client.chat.completions.create(**asked, max_tokens=60, **fields).choices[0].message.content

    assert content({"type": "json_object"}).startswith("{")
    regex = {"type": "grammar", "syntax": "regex", "definition": "[ab]{3}-[0-9]{2}"}
    assert re.fullmatch("[ab]{3}-[0-9]{2}", content(regex))
    lark = {"type": "grammar", "syntax": "lark", "definition": 'start: "<" /[xy]{1,4}/ ">"'}
    assert re.fullmatch("<[xy]{1,4}>", content(lark))
    assert content({"type": "text"}, n=1)
    (text,) = client.completions.create(
        model="chat", prompt="x", seed=1, max_tokens=20, extra_body={"response_format": regex}
    ).choices
    assert re.fullmatch("[ab]{3}-[0-9]{2}", text.text)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"response_format": form({"type": "objct"})}, "response_format", "at #: "),
        (
            {"response_format": form({"type": "object", "properties": {"a": {"type": "intger"}}})},
            "response_format",
            "at #/properties/a: ",
        ),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "Missing"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x", "Unknown"),
        ({"response_format": form(SCHEMA), "ignore_eos": True}, None, "guided cannot go with ignore_eos"),
        ({"response_format": form({"enum": ["x" * 70_000]})}, "response_format", "at most 65536"),
        ({"response_format": form(SCHEMA), "tools": [tool("a")]}, "response_format", "send one of them"),
        ({"tools": [tool("a"), tool("a")]}, "tools", "two functions of one name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "expected 'function'"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "Missing"),
        ({"tools": [tool("a")], "tool_choice": "maybe"}, "tool_choice", "'required'"),
        ({"tool_choice": "required"}, "tools", "Missing"),
        (
            {"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}},
            "tool_choice.function.name",
            "one of the tools",
        ),
        ({"tools": [tool("a", {"type": "objct"})], "tool_choice": "required"}, "tools", "objct"),
        ({"model": "plain", "tools": [tool("a")]}, "messages", "no chat template"),
        (
            {
                "messages": [
                    *MESSAGES,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1]"}}]},
                ]
            },
            "messages[1].tool_calls[0].function.arguments",
            "a JSON object as text",
        ),
    ],
)
def test_bad_forms_and_tools_say_what_is_wrong(endpoint, body, param, message):
    body = {"model": "chat", "messages": MESSAGES, "max_tokens": 2, **body}
    for stream in (False, True):
        status, _, text = endpoint.ask("POST", "/v1/chat/completions", {**body, "stream": stream})
        error = json.loads(text)["error"]
        assert status == 400, error
        assert message in error["message"]
        assert param is None or error["param"] == param


@pytest.mark.parametrize("model", ["chat", "llama"])
def test_a_forced_call_is_one(client, model):
    tools = [tool("first"), tool("second", Answer.model_json_schema())]
    asked = {"model": model, "messages": MESSAGES, "tools": tools, "max_tokens": 300, "seed": 2}
    choice = client.chat.completions.create(**asked, tool_choice="required").choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert call.function.name in ("first", "second")

    named = {"type": "function", "function": {"name": "second"}}
    (call,) = client.chat.completions.create(**asked, tool_choice=named).choices[0].message.tool_calls
    assert call.function.name == "second"
    Answer.model_validate_json(call.function.arguments)

    chunks = list(client.chat.completions.create(**asked, tool_choice=named, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    (streamed,) = [part for delta in deltas for part in delta.tool_calls or ()]
    assert (streamed.index, streamed.function) == (0, streamed.function)
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_tools_reach_the_template_and_text_stays_text(client, chat_zoo, chat_family):
    tokenizer = AutoTokenizer.from_pretrained(chat_family["chat"])
    tools = [tool("first")]
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "first", "arguments": '{"name": "ab", "size": 3}'},
    }
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    parsed = {**call, "function": {"name": "first", "arguments": {"name": "ab", "size": 3}}}
    given = [messages[0], {"role": "assistant", "content": "", "tool_calls": [parsed]}, messages[2]]
    prompt = tokenizer.apply_chat_template(given, tools=tools, tokenize=False, add_generation_prompt=True)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    (expected,) = LLM(chat_zoo, precision="f32").generate("chat", [prompt], params, progress=False)
    asked = {"model": "chat", "messages": messages, "tools": tools, "max_tokens": 12, "temperature": 0}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.message.content == expected.text
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "length"
    streamed = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected.text
    none = client.chat.completions.create(**asked, tool_choice="none")
    assert none.usage.prompt_tokens < client.chat.completions.create(**asked).usage.prompt_tokens


def test_a_call_that_is_cut_off_is_shown_as_it_is(client):
    asked = {"model": "chat", "messages": MESSAGES, "tools": [tool("first")], "max_tokens": 3}
    choice = client.chat.completions.create(**asked, tool_choice="required").choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("<tool_call>")


def test_what_a_guide_refuses_streams_no_answer(client):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="chat", messages=MESSAGES, stream=True, response_format=form({"type": "objct"})
        )
