"""Calls of tools told from text, and schemas of forced ones."""

from __future__ import annotations

import json

import pytest

from blockzoo.server_config.openai.errors import ApiError
from blockzoo.server_config.openai.tools import Call, CallParser, Tools, format_of

SKY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name, parameters=SKY):
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


TOOLS = Tools((tool("sky"), tool("sea")), (), True)
CALL = '<tool_call>\n{"name": "sky", "arguments": {"city": "Zürich"}}\n</tool_call>'
SEA = '<tool_call>{"name": "sea", "arguments": {}}</tool_call>'
MOON = '<tool_call>{"name": "moon", "arguments": {}}</tool_call>'
BAD = '<tool_call>{"name": "sky", "arguments": [1]}</tool_call>'
ZURICH, NOTHING = Call("sky", '{"city": "Zürich"}'), Call("sea", "{}")


def told(kind, text, size, tools=TOOLS):
    """What is told of a text that comes in parts of a size, neighbouring texts joined."""
    parser = CallParser(kind, tools)
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    found = [item for part in parts for item in parser.push(part)] + parser.finish()
    joined = []
    for item in found:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    assert parser.num_calls == sum(isinstance(item, Call) for item in joined)
    return joined


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("plain  text\n", ["plain  text\n"]),
        ("1 < 2 <tool", ["1 < 2 <tool"]),
        (CALL, [ZURICH]),
        (f"Let me see.\n{CALL}\n", ["Let me see.", ZURICH]),
        (f"{CALL}\n{SEA}", [ZURICH, NOTHING]),
        (f"{CALL} and {SEA}", [ZURICH, " and", NOTHING]),
        (CALL.removesuffix("\n</tool_call>"), [ZURICH]),  # ended by the end token
        (f"a <tool_call>no json</tool_call> b {CALL}", ["a <tool_call>no json</tool_call> b", ZURICH]),
        (MOON, [MOON]),
        (BAD, [BAD]),
        ('<tool_call>{"name": "sea", "arguments": "{}"}</tool_call>', [NOTHING]),
        ('<tool_call>{"name": "sky", "arguments"', ['<tool_call>{"name": "sky", "arguments"']),
        ("<tool_call>" + "[" * 5000, ["<tool_call>" + "[" * 5000]),
    ],
)
def test_hermes(text, expected, size):
    assert told("hermes", text, size) == expected


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" plain {}", [" plain {}"]),
        ('{"name": "sky", "parameters": {"city": "Zürich"}}', [ZURICH]),
        (
            '\n{"name": "sky", "parameters": {"city": "Zürich"}}; {"name": "sea", "parameters": {}}',
            [ZURICH, NOTHING],
        ),
        ('{"name": "sea"}', [NOTHING]),
        ('{"name": "moon", "parameters": {}}', ['{"name": "moon", "parameters": {}}']),
        ('{"answer": 42}', ['{"answer": 42}']),
        ('{"name": "sea", "parameters": {}} indeed', ['{"name": "sea", "parameters": {}} indeed']),
        ('{"name": "sea", ', ['{"name": "sea", ']),
    ],
)
def test_llama(text, expected, size):
    assert told("llama", text, size) == expected


def test_text_comes_as_soon_as_it_is_known_to_be_text():
    parser = CallParser("hermes", TOOLS)
    assert parser.push("Let me") == ["Let me"]
    assert parser.push(" see") == [" see"]
    assert parser.push(" <") == []
    assert parser.push("3") == [" <3"]


def test_one_call_alone_where_parallel_ones_are_not_wanted():
    tools = Tools(TOOLS.tools, (), False)
    assert told("hermes", f"So: {CALL} and {SEA} done", 3, tools) == ["So:", ZURICH]


def test_a_forced_call_needs_no_tag():
    tools = Tools(TOOLS.tools, ("sky",), True)
    assert told("hermes", '{"name": "sky", "arguments": {"city": "Zürich"}}', 4, tools) == [ZURICH]
    assert told("llama", '{"name": "sky", "parameters": {"city": "Zürich"}}', 4, tools) == [ZURICH]


def test_the_schema_of_forced_calls():
    one = json.loads(Tools(TOOLS.tools, ("sky",), True).schema("hermes"))
    assert one["properties"] == {"name": {"const": "sky"}, "arguments": SKY}
    assert one["required"] == ["name", "arguments"]
    both = json.loads(Tools(TOOLS.tools, ("sky", "sea"), True).schema("llama"))
    assert [each["properties"]["name"]["const"] for each in both["anyOf"]] == ["sky", "sea"]
    assert "parameters" in both["anyOf"][0]["properties"]


def test_definitions_lie_where_references_look_for_them():
    first = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "$defs": {"A": {"type": "integer"}},
    }
    other = {**first, "$defs": {"A": {"type": "string"}}}
    tools = Tools((tool("x", first), tool("y", first)), ("x", "y"), True)
    assert json.loads(tools.schema("hermes"))["$defs"] == {"A": {"type": "integer"}}
    with pytest.raises(ApiError, match="Two tools define"):
        Tools((tool("x", first), tool("y", other)), ("x", "y"), True).schema("hermes")


def test_formats_of_templates():
    assert format_of(["{% for tool in tools %}<tool_call>"]) == "hermes"
    assert format_of(["{% if tools %}", '{"name": "x", "parameters": {']) == "llama"
    assert format_of(["{{ tools }}[TOOL_CALLS]"]) is None
    assert format_of(["<tool_call>"]) is None
    assert format_of([]) is None
