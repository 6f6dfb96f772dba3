"""/v1/responses on a real server, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

INPUT = "def parse(line):"
ITEMS = [
    {"role": "developer", "content": "Be brief."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Größe "}]},
    {"role": "assistant", "content": [{"type": "output_text", "text": "x = 1", "annotations": []}]},
    {"role": "user", "content": INPUT},
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe "},
    {"role": "assistant", "content": "x = 1"},
    {"role": "user", "content": INPUT},
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ab", "cd"]}, "size": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "look_up", "description": "It is.", "parameters": SCHEMA, "strict": True}
GREEDY = {"model": "chat", "temperature": 0, "max_output_tokens": 12}
EVENT = TypeAdapter(ResponseStreamEvent)


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ok: bool
    size: int = Field(ge=0, le=99)


@pytest.fixture(scope="module")
def endpoint(serve_openai, chat_zoo):
    return serve_openai(chat_zoo)


@pytest.fixture(scope="module")
def client(endpoint):
    return endpoint.client


def events_of(endpoint, body):
    """The events as they are sent, each checked by OpenAI's own types."""
    status, headers, text = endpoint.ask("POST", "/v1/responses", {**body, "stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    blocks = [block.split("\n") for block in text.split("\n\n")]
    assert blocks.pop() == [""]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event)
    return events


def test_an_answer_is_that_of_a_chat(endpoint, client):
    chat = client.chat.completions.create(
        model="chat", messages=MESSAGES, max_tokens=12, temperature=0, extra_body={"kv_reuse": "off"}
    )
    body = {**GREEDY, "input": ITEMS, "kv_reuse": "off", "metadata": {"a": "b"}, "user": "me"}
    status, _, text = endpoint.ask("POST", "/v1/responses", body)
    assert status == 200
    response = Response.model_validate_json(text, strict=False)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.object, response.model, response.error) == ("response", "chat", None)
    (message,) = response.output
    assert (message.role, message.status) == ("assistant", "incomplete")
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == 12
    assert response.usage.total_tokens == chat.usage.prompt_tokens + 12
    assert response.usage.input_tokens_details.cached_tokens == 0
    assert (response.metadata, response.user) == ({"a": "b"}, "me")
    assert (response.temperature, response.max_output_tokens, response.store) == (0, 12, False)
    split = client.responses.create(**GREEDY, instructions="Be brief.", input=ITEMS[1:])
    assert split.output_text == response.output_text
    assert split.instructions == "Be brief."


def test_text_alone_and_cached_tokens(client):
    prompt = "the same long prompt for everybody " * 20
    chat = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": prompt}], max_tokens=12, temperature=0
    )
    response = client.responses.create(**GREEDY, input=prompt)
    assert response.output_text == chat.choices[0].message.content
    cached = response.usage.input_tokens_details.cached_tokens
    assert 0 < cached < response.usage.input_tokens
    assert cached % 16 == 0


def test_the_events_of_a_text(endpoint, client):
    whole = client.responses.create(**GREEDY, input=ITEMS)
    events = events_of(endpoint, {**GREEDY, "input": ITEMS})
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * len(deltas),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert len(deltas) > 1
    assert "".join(event["delta"] for event in deltas) == whole.output_text == events[-4]["text"]
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert (last["id"], last["status"]) == (first["id"], "incomplete")
    assert last["output"] == [events[-2]["item"]]
    assert last["usage"]["output_tokens"] == 12
    item = events[2]["item"]
    assert (item["status"], item["content"]) == ("in_progress", [])
    assert {event["item_id"] for event in events[3:-2]} == {item["id"]}


def test_the_clients_stream(endpoint, client):
    asked = {"model": "chat", "input": INPUT, "seed": 3, "max_output_tokens": 300, "reasoning": {}}
    extra = {"extra_body": {"seed": asked.pop("seed")}}
    with client.responses.stream(**asked, **extra, text_format=Answer) as stream:
        snapshot = ""
        for event in stream:
            if event.type == "response.output_text.delta":
                snapshot = event.snapshot
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == snapshot
    assert final.output_parsed == Answer.model_validate_json(snapshot)
    parsed = client.responses.parse(**asked, **extra, text_format=Answer)
    assert parsed.output_parsed == final.output_parsed

    async def main():
        async with endpoint.async_client() as async_client:
            stream = await async_client.responses.create(**GREEDY, input=INPUT, stream=True)
            return [event async for event in stream]

    events = asyncio.run(main())
    assert events[-1].response.output_text == client.responses.create(**GREEDY, input=INPUT).output_text


def test_forms(client):
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    response = client.responses.create(model="chat", input=INPUT, text=form, max_output_tokens=200)
    value = json.loads(response.output_text)
    assert value["name"] in ("ab", "cd")
    assert response.status == "completed"
    assert response.text.format.name == "x"
    response = client.responses.create(
        model="chat", input="json", text={"format": {"type": "json_object"}}, max_output_tokens=30
    )
    assert response.output_text.startswith("{")


def test_log_probabilities(endpoint, client):
    chat = client.chat.completions.create(
        model="chat", messages=MESSAGES, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
    )
    expected = [token.model_dump() for token in chat.choices[0].logprobs.content]
    asked = {**GREEDY, "input": ITEMS, "include": ["message.output_text.logprobs"], "top_logprobs": 3}
    part = client.responses.create(**asked).output[0].content[0]
    found = [token.model_dump() for token in part.logprobs]
    assert [token["bytes"] for token in found] == [token["bytes"] for token in expected]
    assert [token["logprob"] for token in found] == pytest.approx(
        [token["logprob"] for token in expected], abs=2e-2
    )
    assert {len(token["top_logprobs"]) for token in found} == {3}
    events = events_of(endpoint, asked)
    told = [token for event in events if event["type"].endswith("text.delta") for token in event["logprobs"]]
    assert told == events[-1]["response"]["output"][0]["content"][0]["logprobs"][: len(told)]
    assert client.responses.create(**GREEDY, input=ITEMS).output[0].content[0].logprobs == []


@pytest.mark.parametrize("model", ["chat", "llama"])
def test_calls_of_tools_there_and_back(endpoint, client, model):
    asked = {"model": model, "input": [{"role": "user", "content": INPUT}], "tools": [TOOL]}
    asked |= {"tool_choice": {"type": "function", "name": "look_up"}, "max_output_tokens": 300}
    response = client.responses.create(**asked, extra_body={"seed": 2})
    (call,) = response.output
    assert (response.status, call.type, call.name, call.status) == (
        "completed",
        "function_call",
        "look_up",
        "completed",
    )
    assert json.loads(call.arguments)["name"] in ("ab", "cd")
    assert response.tools[0].name == "look_up"

    events = events_of(endpoint, {**asked, "seed": 2})
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert events[3]["delta"] == events[4]["arguments"] == call.arguments

    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"found": 7}'}
    again = [*asked["input"], *(item.to_dict() for item in response.output), output]
    brief = {"model": model, "temperature": 0}
    answer = client.responses.create(**brief, input=again, tools=[TOOL], max_output_tokens=8)
    function = {"name": "look_up", "arguments": call.arguments}
    messages = [
        *asked["input"],
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": '{"found": 7}'},
    ]
    functions = [{"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}]
    chat = client.chat.completions.create(**brief, messages=messages, tools=functions, max_tokens=8)
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.output_text == (chat.choices[0].message.content or "")


def test_tools_that_may_be_called_and_are_not(client):
    response = client.responses.create(**GREEDY, input=INPUT, tools=[TOOL], parallel_tool_calls=False)
    assert [item.type for item in response.output] == ["message"]
    assert (response.tool_choice, response.parallel_tool_calls) == ("auto", False)
    without = client.responses.create(**GREEDY, input=INPUT, tools=[TOOL], tool_choice="none")
    assert without.output_text == client.responses.create(**GREEDY, input=INPUT).output_text


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": None}, "input", "Missing"),
        ({"input": []}, "input", "Missing"),
        ({"input": 5}, "input", "a list"),
        ({"input": [5]}, "input[0]", "an object"),
        ({"input": [{"content": "x"}]}, "input[0].role", "Missing"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'developer'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
            "input_text",
        ),
        ({"input": [{"role": "user", "content": "x", "z": 1}]}, "input[0].z", "Unknown"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "'function_call_output'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "keeps no responses"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input[0].call_id", "Missing"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "a", "arguments": "[]"}]},
            "input[0].arguments",
            "a JSON object as text",
        ),
        ({"store": True}, "store", "keeps no responses"),
        ({"background": True}, "background", "keeps no responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
        ({"conversation": "conv_1"}, "conversation", "keeps no responses"),
        ({"prompt": {"id": "p"}}, "prompt", "keeps no responses"),
        ({"truncation": "auto"}, "truncation", "'disabled'"),
        ({"reasoning": {"effort": "low", "summary": None}}, "reasoning.effort", "chat_template_kwargs"),
        ({"reasoning": "low"}, "reasoning", "an object"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "Missing"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "objct"}}}},
            "text.format",
            "at #: ",
        ),
        ({"text": {"format": {"type": "json_object"}}, "tools": [TOOL]}, "text.format", "send one of them"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools[0].name", "Missing"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "b"}},
            "tool_choice.name",
            "one of the",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "from 1"),
        ({"max_tokens": 5}, "max_tokens", "Did you mean"),
        ({"top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"include": ["file_search_call.results"]}, "include[0]", "message.output_text.logprobs"),
        ({"metadata": {"a": 5}}, "metadata", "texts of at most 512"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
        ({"n": 2}, "n", "Unknown"),
        ({"model": "plain"}, "input", "no chat template"),
        ({"instructions": 5}, "instructions", "a text"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_say_what_is_wrong(endpoint, body, param, message, stream):
    status, _, text = endpoint.ask(
        "POST", "/v1/responses", {**GREEDY, "input": "x", "stream": stream, **body}
    )
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (400, param), error
    assert message in error["message"]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="nobody", input="x")
    assert caught.value.code == "model_not_found"


def test_nothing_is_stored(client):
    response = client.responses.create(**GREEDY, input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_client_that_goes_away_frees_its_request(endpoint, client):
    before = endpoint.aborted()
    stream = client.responses.create(model="chat", input="x", stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    endpoint.served.wait_for(lambda: endpoint.aborted() == before + 1)
    endpoint.wait_until_idle()


def test_a_stream_that_fails_says_so_in_an_event(endpoint, client):
    stream = client.responses.create(model="chat", input="x", stream=True, extra_body={"ignore_eos": True})
    events = []
    for event in stream:
        events.append(event)
        if len(events) == 8:
            os.kill(endpoint.served.model_pid("blockzoo"), signal.SIGKILL)
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))
