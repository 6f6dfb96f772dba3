"""The messages and tools of a chat's body -> what its template is given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from blockzoo.server_config.openai.errors import invalid
from blockzoo.server_config.openai.fields import Fields
from blockzoo.server_config.openai.tools import Tools

MAX_MESSAGES = 4096
MAX_TOOLS = 128


@dataclass(frozen=True, slots=True)
class Chat:
    """What a chat's template is given."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, Any]
    tools: Tools | None = None
    field: str = "messages"
    """Of the body, that it comes from."""


def read_messages(fields: Fields) -> Chat:
    """Messages and what goes to the template with them. Raises ApiError."""
    messages = fields.objects("messages", MAX_MESSAGES)
    if not messages:
        raise fields.missing("messages")
    goes_on = fields.take("continue_final_message", bool, False)
    begins = fields.take("add_generation_prompt", bool, not goes_on)
    if goes_on and begins:
        raise invalid(
            "continue_final_message", "continue_final_message and add_generation_prompt are both true."
        )
    kwargs = fields.take("chat_template_kwargs", dict, {})
    return Chat([_message(message) for message in messages], begins, goes_on, kwargs)


def _message(fields: Fields) -> dict[str, Any]:
    roles = ("system", "developer", "user", "assistant", "tool")
    role = fields.one_of("role", roles)
    if role is None:
        raise fields.missing("role")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}  # templates know no other
    calls = fields.objects("tool_calls", MAX_TOOLS) if role == "assistant" else None
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
        message["content"] = _content(fields, "")
    else:
        message["content"] = _content(fields)
    if role == "tool":
        message["tool_call_id"] = fields.take("tool_call_id", str, "")
    for name in ("name", "reasoning_content"):
        value = fields.take(name, str)
        if value is not None:
            message[name] = value
    fields.ignore(("refusal",))  # of an earlier answer that is sent back
    fields.end()
    return message


def _call(fields: Fields) -> dict[str, Any]:
    """A call of an earlier answer."""
    call_id = fields.take("id", str, "")
    fields.one_of("type", ("function",))
    fields.ignore(("index",))
    function = Fields(fields.take("function", dict, {}), f"{fields.where}function.")
    call = {"id": call_id, "type": "function", "function": called(function)}
    function.end()
    fields.end()
    return call


def called(fields: Fields) -> dict[str, Any]:
    """The name and the arguments of a call; templates write those as an object. Raises ApiError."""
    name = fields.take("name", str)
    if not name:
        raise fields.missing("name")
    text = fields.take("arguments", str, "{}")
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise fields.wrong("arguments", text, "a JSON object as text")
    return {"name": name, "arguments": arguments}


def _content(fields: Fields, default: str | None = None) -> str:
    """A text, or the texts of parts."""
    content = fields.any("content")
    if content is None and default is not None:
        return default
    if content is None:
        raise fields.missing("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise fields.wrong("content", content, "a text, or a list of parts of type text")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise fields.wrong(f"content[{index}]", part, 'a part {"type": "text", "text": ...}')
        texts.append(part["text"])
    return "".join(texts)


def read_tools(fields: Fields, flat: bool = False) -> Tools | None:
    """The functions offered; None where there are none, or none may be called. Raises ApiError.

    `flat`: a function's fields stand beside `type`, as in /v1/responses, and not in an object `function`.
    """
    parallel = fields.take("parallel_tool_calls", bool, True)
    tools = tuple(_tool(tool, flat) for tool in fields.objects("tools", MAX_TOOLS) or ())
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise invalid("tools", "tools has two functions of one name; give each a name of its own.")
    choice = fields.any("tool_choice")
    forced: tuple[str, ...] = ()
    if isinstance(choice, dict):
        named = Fields(choice, "tool_choice.")
        named.one_of("type", ("function",))
        function = named if flat else Fields(named.take("function", dict, {}), "tool_choice.function.")
        name = function.take("name", str)
        if name not in names:
            raise function.wrong("name", name, "the name of one of the tools")
        function.end()
        named.end()
        forced = (name,)
    elif choice == "required":
        forced = tuple(names)
    elif choice not in (None, "none", "auto"):
        raise fields.wrong("tool_choice", choice, "'none', 'auto', 'required' or a function")
    if choice == "required" and not tools:
        raise fields.missing("tools")
    return Tools(tools, forced, parallel) if tools and choice != "none" else None


def _tool(fields: Fields, flat: bool) -> dict[str, Any]:
    fields.one_of("type", ("function",))
    function = fields if flat else Fields(fields.take("function", dict, {}), f"{fields.where}function.")
    name = function.take("name", str)
    if not name:
        raise function.missing("name")
    description = function.take("description", str, "")
    parameters = function.take("parameters", dict, {"type": "object", "properties": {}})
    function.ignore(("strict",))
    function.end()
    fields.end()
    # templates read all three
    inner = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": inner}
