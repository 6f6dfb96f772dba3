"""The JSON of responses (/v1/responses): whole, or as the events by which one comes to be."""

from __future__ import annotations

import time
import uuid

from blockzoo.server_config.openai.answers import Answer, Json, encode, token_logprobs
from blockzoo.server_config.openai.catalog import TokenTexts
from blockzoo.server_config.openai.engine import Delta
from blockzoo.server_config.openai.errors import ApiError
from blockzoo.server_config.openai.requests import Generation
from blockzoo.server_config.openai.responses import Asked
from blockzoo.server_config.openai.tools import Call, CallParser


class ResponseAnswer(Answer):
    """Items of output, messages and calls, built up in order; of a whole response in the same way.

    Args:
        asked: what it repeats of its request.
        parser: that tells calls of tools from text; None where there are no tools.
    """

    prefix = "resp_"

    def __init__(
        self, generation: Generation, texts: TokenTexts | None, asked: Asked, parser: CallParser | None = None
    ) -> None:
        super().__init__(generation, texts)
        self._asked, self._parser = asked, parser
        self._items: list[Json] = []  # that are complete
        self._message: Json | None = None  # that grows
        self._parts: list[str] = []  # of its text
        self._logprobs: list[Json] = []  # of its tokens
        self._num_told = 0  # of these
        self._num_events = 0
        self._finish_reason: str | None = None

    def whole(self, deltas: list[Delta]) -> Json:
        """The response in one."""
        self._chunks(0, deltas[0])
        return self._response(self._status)

    def closing(self) -> bytes:
        """The event with the whole response."""
        return self._events([self._event(f"response.{self._status}", response=self._response(self._status))])

    def failed(self, error: ApiError) -> bytes:
        """The event that ends a stream before its time."""
        response = self._response("failed")
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._events([self._event("response.failed", response=response)])

    @staticmethod
    def _events(chunks: list[Json]) -> bytes:
        return "".join(f"event: {chunk['type']}\ndata: {encode(chunk)}\n\n" for chunk in chunks).encode()

    def _opening(self) -> list[Json]:
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._response("in_progress")) for kind in kinds]

    def _chunks(self, index: int, delta: Delta) -> list[Json]:
        """The events of a delta."""
        if self._texts is not None:
            self._logprobs += token_logprobs(delta, self._texts)
        self._finish_reason = delta.finish_reason
        events: list[Json] = []
        for part in self._told(delta):
            if isinstance(part, str):
                events += self._add_text(part)
            else:
                events += [*self._end_message("completed"), *self._add_call(part)]
        if delta.finish_reason is not None:
            if self._message is None and not self._items:
                events += self._begin_message()
            events += self._end_message(self._status)
        return events

    def _told(self, delta: Delta) -> list[str | Call]:
        if self._parser is None:
            return [delta.text] if delta.text else []
        last = delta.finish_reason is not None
        return self._parser.push(delta.text) + (self._parser.finish() if last else [])

    def _begin_message(self) -> list[Json]:
        self._message = {
            "id": _new_id("msg"),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        return [
            self._event(
                "response.output_item.added", output_index=len(self._items), item=self._message.copy()
            ),
            self._part_event("response.content_part.added", part=_text_part("", [])),
        ]

    def _add_text(self, text: str) -> list[Json]:
        events = [] if self._message is not None else self._begin_message()
        self._parts.append(text)
        new, self._num_told = self._logprobs[self._num_told :], len(self._logprobs)
        return [*events, self._part_event("response.output_text.delta", delta=text, logprobs=new)]

    def _end_message(self, status: str) -> list[Json]:
        if self._message is None:
            return []
        text, logprobs = "".join(self._parts), self._logprobs
        part = _text_part(text, logprobs)
        events = [
            self._part_event("response.output_text.done", text=text, logprobs=logprobs),
            self._part_event("response.content_part.done", part=part),
        ]
        item = {**self._message, "status": status, "content": [part]}
        self._message, self._parts, self._logprobs, self._num_told = None, [], [], 0
        return [*events, self._end_item(item)]

    def _add_call(self, call: Call) -> list[Json]:
        item = {
            "id": _new_id("fc"),
            "type": "function_call",
            "call_id": _new_id("call"),
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        place = {"item_id": item["id"], "output_index": len(self._items)}
        arguments = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=len(self._items), item=item),
            self._event(f"{arguments}.delta", **place, delta=call.arguments),
            self._event(f"{arguments}.done", **place, name=call.name, arguments=call.arguments),
            self._end_item({**item, "arguments": call.arguments, "status": "completed"}),
        ]

    def _end_item(self, item: Json) -> Json:
        self._items.append(item)
        return self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _part_event(self, kind: str, **fields: object) -> Json:
        assert self._message is not None
        place = {"item_id": self._message["id"], "output_index": len(self._items), "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: object) -> Json:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _response(self, status: str) -> Json:
        ended = status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._generation.model,
            "output": self._items.copy(),
            "usage": self._usage() if ended else None,
            **self._asked.repeated,
        }

    def _usage(self) -> Json:
        return {
            "input_tokens": self.usage.prompt,
            "input_tokens_details": {"cached_tokens": self.usage.cached, "cache_write_tokens": 0},
            "output_tokens": self.usage.generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.usage.prompt + self.usage.generated,
        }


def _text_part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
