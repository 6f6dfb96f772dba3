"""Calls of tools: what a template's models write for them, and how they are told from text.

Two formats are known: that of Hermes and Qwen, `<tool_call>{"name": ..., "arguments": ...}</tool_call>` in a
text, and that of Llama 3, an answer that is `{"name": ..., "parameters": ...}` alone. A call of a function
that was not offered, or that is no JSON, stays text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from blockzoo.server_config.openai.errors import ApiError, invalid

Format = Literal["hermes", "llama"]
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_ARGUMENTS = {"hermes": "arguments", "llama": "parameters"}
PROMPT_OF_CALL = {"hermes": _OPEN + "\n", "llama": ""}
"""What an answer that must be a call begins with."""


def format_of(templates: Iterable[str]) -> Format | None:
    """The format that a model's chat templates ask for; None where they know no tools, or another one."""
    text = "\n".join(templates)
    if "tools" not in text:
        return None
    if _OPEN in text:
        return "hermes"
    return "llama" if '"parameters": ' in text and '{"name": ' in text else None


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that a request offers.

    Attributes:
        tools: as the template is given them.
        forced: names of those of which the answer must be a call; () where the model chooses.
        parallel: whether an answer may hold several calls; else what follows the first is left out.
    """

    tools: tuple[Mapping[str, Any], ...]
    forced: tuple[str, ...]
    parallel: bool

    @property
    def names(self) -> frozenset[str]:
        """Of the functions."""
        return frozenset(tool["function"]["name"] for tool in self.tools)

    def schema(self, kind: Format) -> str:
        """The JSON schema of a forced call. Raises ApiError."""
        calls: list[Any] = []
        shared: dict[str, dict[str, Any]] = {}
        for tool in self.tools:
            function = tool["function"]
            if function["name"] not in self.forced:
                continue
            arguments = dict(function.get("parameters") or {"type": "object"})
            for place in ("$defs", "definitions"):  # where "#/..." looks for them
                for name, part in arguments.pop(place, {}).items():
                    if shared.setdefault(place, {}).setdefault(name, part) != part:
                        raise invalid("tools", f"Two tools define {place}/{name} differently; rename one.")
            properties = {"name": {"const": function["name"]}, _ARGUMENTS[kind]: arguments}
            calls.append(
                {
                    "type": "object",
                    "properties": properties,
                    "required": list(properties),
                    "additionalProperties": False,
                }
            )
        return json.dumps({**(calls[0] if len(calls) == 1 else {"anyOf": calls}), **shared})


@dataclass(frozen=True, slots=True)
class Call:
    """One call; `arguments` is JSON text."""

    name: str
    arguments: str

    def json(self) -> dict[str, Any]:
        """As messages show it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class CallParser:
    """Tells calls from text while an answer comes.

    Args:
        kind: of format.
        tools: that were offered.
    """

    def __init__(self, kind: Format, tools: Tools) -> None:
        self._kind, self._tools = kind, tools
        self._names = tools.names
        self._parts = [PROMPT_OF_CALL[kind]] if tools.forced else []  # of the answer, not told yet
        self._waits = False  # for the end of a call
        self._tail = ""
        self._is_text = False  # llama: the answer is no call
        self.num_calls = 0

    def push(self, text: str) -> list[str | Call]:
        """Take what was added to the answer; what can be told of it now, in order."""
        self._parts.append(text)
        if self._waits:
            seen = self._tail + text
            self._tail = seen[1 - len(_CLOSE) :]
            if self._kind == "llama" or _CLOSE not in seen:
                return []
        return self._tell(last=False)

    def finish(self) -> list[str | Call]:
        """The rest."""
        return self._tell(last=True)

    def _tell(self, last: bool) -> list[str | Call]:
        held = "".join(self._parts)
        found: list[str | Call] = []
        rest = (self._hermes if self._kind == "hermes" else self._llama)(held, last, found)
        self._parts, self._tail = [rest], rest[1 - len(_CLOSE) :]
        return found

    def _hermes(self, held: str, last: bool, found: list[str | Call]) -> str:
        """Adds to `found`; what cannot be told yet."""
        self._waits = False
        while held:
            start = held.find(_OPEN)
            if start < 0:
                # white space before a call belongs to neither, and a tag may come in parts
                keep = 0 if last else _open_end(held)
                self._add_text(found, held[: len(held) - keep])
                return held[len(held) - keep :]
            end = held.find(_CLOSE, start)
            if end < 0 and not last:
                text = held[:start].rstrip()
                self._add_text(found, text)
                self._waits = True
                return held[len(text) :]
            calls = self._calls(held[start + len(_OPEN) : end if end >= 0 else None], "arguments")
            stop = end + len(_CLOSE) if end >= 0 else len(held)
            self._add_text(found, held[:start].rstrip() if calls else held[:stop])
            self._add_calls(found, calls)
            held = held[stop:]
        return ""

    def _llama(self, held: str, last: bool, found: list[str | Call]) -> str:
        """Adds to `found`; what cannot be told yet."""
        begin = held.lstrip()[:1]
        if not self._is_text and begin in ("", "{") and not last:
            self._waits = begin == "{"
            return held
        calls = [] if self._is_text else self._calls(held, "parameters")
        self._is_text = not calls
        if calls:
            self._add_calls(found, calls)
        else:
            self._add_text(found, held)
        return ""

    def _add_text(self, found: list[str | Call], text: str) -> None:
        if self.num_calls:  # between and behind calls only what says something
            text = text if text.strip() and self._tools.parallel else ""
        if text:
            found.append(text)

    def _add_calls(self, found: list[str | Call], calls: list[Call]) -> None:
        for call in calls:
            if self._tools.parallel or not self.num_calls:
                found.append(call)
                self.num_calls += 1

    def _calls(self, text: str, field: str) -> list[Call]:
        """The calls that a text is made of; [] where it is anything else."""
        decoder = json.JSONDecoder()
        calls, place = [], 0
        text = text.strip()
        while place < len(text):
            try:
                value, place = decoder.raw_decode(text, place)
            except (ValueError, RecursionError):
                return []
            call = self._call(value, field)
            if call is None:
                return []
            calls.append(call)
            while place < len(text) and text[place] in "; \n\r\t":
                place += 1
        return calls

    def _call(self, value: Any, field: str) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get(field, value.get("arguments", value.get("parameters", {})))
        if isinstance(arguments, str):  # JSON in JSON
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _open_end(text: str) -> int:
    """How many characters at the end may belong to a call that follows."""
    tag = next((size for size in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:size])), 0)
    before = text[: len(text) - tag]
    return tag + len(before) - len(before.rstrip())


def no_tools(model: str) -> ApiError:
    """Tools for a model whose template knows none that could be read."""
    return invalid(
        "tools",
        f"The chat template of model {model!r} asks for no calls in a format that is known here (Hermes and "
        "Qwen: <tool_call>, Llama 3: JSON): leave tools out.",
        "unsupported_parameter",
    )
