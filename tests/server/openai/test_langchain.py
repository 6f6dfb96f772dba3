"""LangChain's OpenAI provider against the endpoint, over chat completions and over responses."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from openai import DefaultAsyncHttpxClient, DefaultHttpxClient
from pydantic import BaseModel, ConfigDict, Field

MESSAGES = [SystemMessage("Be brief."), HumanMessage("def parse(line):")]


class Answer(BaseModel):
    """What was found."""

    model_config = ConfigDict(extra="forbid")

    ok: bool
    size: int = Field(ge=0, le=99)


@tool
def look_up(size: int, ok: bool) -> str:
    """Look something up."""
    return f"{size} {ok}"


look_up.args_schema.model_config["extra"] = "forbid"  # else a random model adds fields without end


@pytest.fixture(scope="module")
def endpoint(serve_openai, chat_zoo):
    return serve_openai(chat_zoo)


@pytest.fixture(scope="module")
def http():
    with DefaultHttpxClient() as client:
        yield client


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def make_chat(endpoint, http, request):
    def make(**settings):
        return ChatOpenAI(
            base_url=f"{endpoint.served.openai}/v1",
            api_key="none",
            model="chat",
            max_retries=0,
            use_responses_api=request.param,
            extra_body={"seed": 3},
            http_client=http,
            **settings,
        )

    return make


@pytest.fixture
def chat(make_chat):
    return make_chat(max_tokens=400, temperature=0.7)


def test_invoke_and_stream(make_chat):
    chat = make_chat(max_tokens=12, temperature=0)
    whole = chat.invoke(MESSAGES)
    assert whole.text
    assert whole.usage_metadata["output_tokens"] == 12
    assert whole.usage_metadata["input_tokens"] > 12
    chunks = list(chat.stream(MESSAGES))
    assert len(chunks) > 3
    assert "".join(chunk.text for chunk in chunks) == whole.text

    async def main():
        async with DefaultAsyncHttpxClient() as http:
            chat = make_chat(max_tokens=12, temperature=0, http_async_client=http)
            answers = await chat.abatch([MESSAGES, MESSAGES])
        return [answer.text for answer in answers]

    assert asyncio.run(main()) == [whole.text] * 2


def test_calls_of_tools_there_and_back(chat):
    caller = chat.bind_tools([look_up], tool_choice="look_up")
    answer = caller.invoke(MESSAGES)
    (call,) = answer.tool_calls
    assert call["name"] == "look_up"
    assert set(call["args"]) == {"size", "ok"}
    streamed = None
    for chunk in caller.stream(MESSAGES):
        streamed = chunk if streamed is None else streamed + chunk
    assert [call["args"] for call in streamed.tool_calls] == [call["args"]]
    result = look_up.invoke(call["args"])
    again = chat.bind_tools([look_up]).invoke(
        [*MESSAGES, answer, ToolMessage(result, tool_call_id=call["id"])]
    )
    assert isinstance(again, AIMessage)
    assert again.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]


def test_structured_output(chat):
    assert isinstance(chat.with_structured_output(Answer, method="json_schema").invoke(MESSAGES), Answer)
    if not chat.use_responses_api:
        by_call = chat.with_structured_output(Answer, method="function_calling")
        assert isinstance(by_call.invoke(MESSAGES), Answer)


def test_text_completions(endpoint, http):
    url = f"{endpoint.served.openai}/v1"
    text = OpenAI(base_url=url, api_key="none", model="plain", max_tokens=8, http_client=http)
    whole = text.bind(temperature=0).invoke("def parse(")
    assert "".join(text.bind(temperature=0).stream("def parse(")) == whole != ""
