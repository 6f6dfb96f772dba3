"""Bodies of /v1/responses -> what is to be generated, and what its answer repeats.

Nothing is kept between requests: what needs a state here is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from blockzoo.server_config.openai.catalog import ServedModel
from blockzoo.server_config.openai.errors import invalid
from blockzoo.server_config.openai.fields import Fields
from blockzoo.server_config.openai.messages import MAX_MESSAGES, Chat, called, read_tools
from blockzoo.server_config.openai.requests import (
    IGNORED,
    Generation,
    check_tools,
    num_top,
    read_form,
    read_rest,
    read_sampling,
)

_LOGPROBS = "message.output_text.logprobs"
_NOTHING_OF = ("reasoning.encrypted_content",)  # there is no reasoning apart from the text
_MAX_METADATA, _MAX_KEY_CHARS, _MAX_VALUE_CHARS = 16, 64, 512  # as OpenAI has them
_TEXT_PARTS = ("input_text", "output_text", "text")
_STATELESS = "this server keeps no responses, conversations or prompts; send all items in input"
_REFUSED = {
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "prompt": _STATELESS,
    "max_tool_calls": "no tool is called here: your program calls functions",
    "context_management": "nothing is left out of the input",
    "moderation": "nothing is moderated",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a response repeats of its request, as JSON; and whether it tells log-probabilities."""

    repeated: Mapping[str, Any]
    logprobs: bool


def read_response(fields: Fields, model: ServedModel) -> tuple[Generation, Chat, Asked]:
    """A body, but for `model`; the generation's prompt is still to be rendered. Raises ApiError."""
    instructions = fields.take("instructions", str)
    messages = _messages(fields)
    if instructions is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    kwargs = fields.take("chat_template_kwargs", dict, {})
    include = _include(fields)
    top = num_top(fields, "top_logprobs")
    limit = fields.plain().get("max_output_tokens")
    text = Fields(fields.take("text", dict, {}), "text.")
    guided = read_form(text, "format", flat=True)
    text.refuse({"verbosity": "say it in the instructions"})
    text.end()
    logprobs = (top or 0) if include or top else None
    params = read_sampling(fields, model.defaults, "max_output_tokens", logprobs, guided)
    generation = read_rest(fields, model, ("",), params, fields.take("stream", bool, False))
    generation = replace(generation, guide_field="text.format")
    tools = read_tools(fields, flat=True)
    check_tools(tools, params, "text.format")
    metadata = _metadata(fields)
    _read_options(fields)
    fields.end()
    given = fields.plain()
    repeated = {
        "instructions": instructions,
        "max_output_tokens": limit,
        "metadata": metadata,
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "temperature": params.temperature,
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": given.get("tools", []),
        "top_p": params.top_p,
        "top_logprobs": top or 0,
        "text": {"format": given.get("text", {}).get("format") or {"type": "text"}},
        "user": given.get("user"),
        "background": False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
    }
    chat = Chat(messages, True, False, kwargs, tools, "input")
    return generation, chat, Asked(repeated, logprobs is not None)


def _read_options(fields: Fields) -> None:
    """Fields whose only right value is the one that changes nothing."""
    if fields.take("store", bool, False):
        raise invalid("store", f"store is true, but {_STATELESS}: leave store out.", "unsupported_parameter")
    if fields.take("background", bool, False):
        raise invalid("background", f"background is true, but {_STATELESS}.", "unsupported_parameter")
    if fields.one_of("truncation", ("disabled", "auto")) == "auto":
        raise invalid("truncation", "truncation is 'auto'; expected 'disabled'.", "unsupported_parameter")
    options = Fields(fields.take("stream_options", dict, {}), "stream_options.")
    options.ignore(("include_obfuscation",))
    options.end()
    reasoning = Fields(fields.take("reasoning", dict, {}), "reasoning.")
    reasoning.refuse(
        dict.fromkeys(reasoning.plain(), "see the template's own switches, chat_template_kwargs")
    )
    fields.ignore((*IGNORED, "prompt_cache_retention", "prompt_cache_options"))
    fields.refuse(_REFUSED)


def _include(fields: Fields) -> bool:
    """Whether log-probabilities are to be included."""
    wanted = fields.take("include", list, [])
    for index, name in enumerate(wanted):
        if name not in (_LOGPROBS, *_NOTHING_OF):
            raise fields.wrong(f"include[{index}]", name, repr(_LOGPROBS))
    return _LOGPROBS in wanted


def _metadata(fields: Fields) -> dict[str, str]:
    given = fields.take("metadata", dict, {})
    for key, value in given.items():
        if not isinstance(value, str) or len(value) > _MAX_VALUE_CHARS or len(key) > _MAX_KEY_CHARS:
            expected = f"texts of at most {_MAX_VALUE_CHARS} characters, with names of {_MAX_KEY_CHARS}"
            raise fields.wrong("metadata", {key: value}, expected)
    if len(given) > _MAX_METADATA:
        raise fields.wrong("metadata", f"{len(given)} pairs", f"at most {_MAX_METADATA}")
    return given


# ---- items of the input -> messages


def _messages(fields: Fields) -> list[dict[str, Any]]:
    given = fields.plain().get("input")
    if given is None:
        raise fields.missing("input")
    if isinstance(given, str):
        return [{"role": "user", "content": fields.take("input", str)}]
    items = fields.objects("input", MAX_MESSAGES)
    if not items:
        raise fields.missing("input")
    messages: list[dict[str, Any]] = []
    for item in items:
        _add_item(item, messages)
    return messages


def _add_item(fields: Fields, messages: list[dict[str, Any]]) -> None:
    """One item; text and calls of one answer become one message."""
    kind = fields.take("type", str, "message")
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    fields.ignore(("id", "status"))  # of an item that was an answer's
    if kind == "message":
        role = fields.one_of("role", ("system", "developer", "user", "assistant"))
        if role is None:
            raise fields.missing("role")
        content = _text(fields, "content")
        fields.ignore(("phase",))
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    elif kind == "function_call":
        call = {"id": _call_id(fields), "type": "function", "function": called(fields)}
        if last is None:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            last.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        call_id = _call_id(fields)
        messages.append({"role": "tool", "tool_call_id": call_id, "content": _text(fields, "output")})
    elif kind == "item_reference":
        raise invalid(f"{fields.where}type", f"{fields.where}type is 'item_reference', but {_STATELESS}.")
    else:
        known = "'message', 'function_call' or 'function_call_output'"
        raise fields.wrong("type", kind, known)
    fields.end()


def _call_id(fields: Fields) -> str:
    call_id = fields.take("call_id", str)
    if not call_id:
        raise fields.missing("call_id")
    return call_id


def _text(fields: Fields, name: str) -> str:
    """A text, or the texts of parts."""
    content = fields.any(name)
    if content is None:
        raise fields.missing(name)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise fields.wrong(name, content, "a text, or a list of parts that are text")
    texts = []
    for index, part in enumerate(content):
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise fields.wrong(f"{name}[{index}]", part, 'a part {"type": "input_text", "text": ...}')
        texts.append(text)
    return "".join(texts)
