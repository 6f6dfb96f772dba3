"""Messages, tools and settings as a chat template may see them: plain JSON, bounded, as in transformers."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from blockzoo.runtime.api.errors import InvalidRequestError, PromptTooLongError
from blockzoo.runtime.api.request import shown

MAX_MESSAGES = 10_000
MAX_CHARS = 4_000_000
"""Of all texts of a request together, keys included."""
MAX_VALUES = 500_000
MAX_DEPTH = 64
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of an answer's reasoning; templates read the first, or the second."""
_MEDIA = {"image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio"}
_MEDIA |= {"file", "input_file"}


class PlainData:
    """Turns values into plain JSON, and counts what they come to over a request."""

    def __init__(self) -> None:
        self._chars = self._values = 0

    def take(self, value: Any, where: str, depth: int = 0) -> Any:
        """A copy of `value` of dict, list, str, int, float, bool and None only.

        Dataclasses and pydantic models become dicts, as the answers of OpenAI's client are.

        Raises:
            InvalidRequestError: something else, or too deep.
            PromptTooLongError: too many values or characters, since the first call.
        """
        self._values += 1
        if self._values > MAX_VALUES:
            raise PromptTooLongError(f"the messages hold more than {MAX_VALUES} values; send fewer")
        if depth > MAX_DEPTH:
            raise InvalidRequestError(f"{where} is nested more than {MAX_DEPTH} deep")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, numbers.Integral):
            return self._int(int(value), where)
        if isinstance(value, numbers.Real):
            return float(value)
        if isinstance(value, Mapping):
            return {
                self._key(key, where): self.take(item, f"{where}.{shown(key)}", depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
            return [self.take(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return self.take(fields, where, depth + 1)
        if callable(getattr(value, "model_dump", None)):
            return self.take(value.model_dump(), where, depth + 1)
        raise InvalidRequestError(
            f"{where} is of type {type(value).__name__}; expected a text, number, true, false, null, list or "
            "object of these"
        )

    def _text(self, value: str) -> str:
        self._chars += len(value)
        if self._chars > MAX_CHARS:
            raise PromptTooLongError(f"the messages have more than {MAX_CHARS} characters; send less")
        return str.__str__(value)

    def _key(self, key: Any, where: str) -> str:
        if not isinstance(key, str):
            raise InvalidRequestError(f"{where} has the key {shown(key)}; expected texts as keys")
        return self._text(key)

    def _int(self, value: int, where: str) -> int:
        if abs(value) >= 1 << 1024:  # more than a float holds; and slow to print
            raise InvalidRequestError(f"{where} is {shown(value)}; expected less than 2^1024")
        return value


def checked_messages(messages: Any, plain: PlainData) -> list[dict[str, Any]]:
    """Messages as transformers hands them to a template: without fields of None, reasoning by both names.

    Raises InvalidRequestError (no messages, another type, a part that is no text) and as `PlainData.take`.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages is of type {type(messages).__name__}; expected a list of objects with role and content"
        )
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequestError(f"messages is a list of {len(messages)}; expected 1 to {MAX_MESSAGES}")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        fields = plain.take(message, where)
        if not isinstance(fields, dict):
            raise InvalidRequestError(f"{where} is {shown(message)}; expected an object with a role")
        if not isinstance(fields.get("role"), str):
            raise InvalidRequestError(
                f"{where}.role is {shown(fields.get('role'))}; expected a text such as user"
            )
        _refuse_media(fields.get("content"), f"{where}.content")
        checked.append(_with_reasoning({key: item for key, item in fields.items() if item is not None}))
    return checked


def checked_list(value: Any, name: str, plain: PlainData) -> list[dict[str, Any]] | None:
    """A list of objects, or None. Raises InvalidRequestError."""
    if value is None:
        return None
    items = plain.take(value, name)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidRequestError(f"{name} is {shown(value)}; expected a list of objects")
    return items


def _refuse_media(content: Any, where: str) -> None:
    for index, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _MEDIA:
            raise InvalidRequestError(f"{where}[{index}] is of type {kind!r}; the models here read text only")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[name] for name in _REASONING if name in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


class Continuation:
    """Marks the end of the last message, and cuts the text that is made of it there."""

    _TAG = "CONTINUE_FINAL_MESSAGE_TAG "

    def __init__(self, messages: list[dict[str, Any]], template: str) -> None:
        """Marks the last message, in place. Raises InvalidRequestError where it has no text."""
        last, content = messages[-1], messages[-1].get("content")
        if "content" not in template:
            raise InvalidRequestError("continue_final_message: the chat template does not read content")
        if isinstance(content, str):
            self._text = content
            last["content"] = content + self._TAG
            return
        for part in reversed(content) if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                self._text = part["text"]
                part["text"] += self._TAG
                return
        raise InvalidRequestError("continue_final_message: the last message has no text to go on from")

    def cut(self, text: str) -> str:
        """The text up to the mark. Raises InvalidRequestError where the template changed the message."""
        tag = self._TAG.strip()
        if self._text.strip() not in text or tag not in text:
            raise InvalidRequestError(
                "continue_final_message: the chat template leaves out some of the last message, so that "
                "nothing can go on from there"
            )
        end = text.rindex(tag)
        kept = text[end : end + len(self._TAG)] == self._TAG  # else the template strips messages
        return text[:end] if kept else text[:end].rstrip()
