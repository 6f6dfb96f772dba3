"""The JSON of answers: chat and text completions, whole or in events, with usage and log-probabilities."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blockzoo.server_config.openai.catalog import TokenTexts
from blockzoo.server_config.openai.engine import Delta, Tops
from blockzoo.server_config.openai.errors import ApiError
from blockzoo.server_config.openai.requests import Generation
from blockzoo.server_config.openai.tools import Call, CallParser

Json = dict[str, Any]
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""JSON as text."""
_DONE = b"data: [DONE]\n\n"
_LOWEST = -9999.0  # OpenAI's number for a log-probability of minus infinity, which JSON has not


@dataclass(slots=True)
class Usage:
    """Tokens of a request; the prompt counts once, however many answers it gets."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def add(self, delta: Delta, first_answer: bool) -> None:
        """Count what came."""
        self.generated += len(delta.token_ids)
        if first_answer:
            self.prompt += delta.num_prompt_tokens
            self.cached += delta.num_cached_tokens

    def json(self) -> Json:
        """As answers show it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Answer:
    """Base of all kinds: what all chunks have in common, and the count of tokens.

    Args:
        texts: of single tokens; None where no log-probabilities are asked for.
    """

    prefix = ""
    kind = ""
    chunk_kind = ""

    def __init__(self, generation: Generation, texts: TokenTexts | None) -> None:
        self.id = f"{self.prefix}{uuid.uuid4().hex}"
        self._generation, self._texts = generation, texts
        self._created = int(time.time())
        self.usage = Usage()

    def count(self, index: int, delta: Delta) -> None:
        """Count the tokens of a delta of the choice `index`."""
        self.usage.add(delta, index % self._generation.n == 0)

    def whole(self, deltas: list[Delta]) -> Json:
        """The answer in one: one delta per choice."""
        choices = [self._choice(index, delta) for index, delta in enumerate(deltas)]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage.json()}

    def opening(self) -> bytes:
        """The events before any text."""
        return self._events(self._opening())

    def events(self, index: int, delta: Delta) -> bytes:
        """The events of a delta of the choice `index`."""
        return self._events(self._chunks(index, delta))

    def closing(self) -> bytes:
        """The events behind all choices: the usage, where it is asked for, and the end."""
        if not self._generation.include_usage:
            return _DONE
        chunk = {**self._head(self.chunk_kind), "choices": [], "usage": self.usage.json()}
        return self._events([chunk]) + _DONE

    def failed(self, error: ApiError) -> bytes:
        """The events that end a stream before its time."""
        return self._events([error.body()]) + _DONE

    @staticmethod
    def _events(chunks: list[Json]) -> bytes:
        return "".join(f"data: {encode(chunk)}\n\n" for chunk in chunks).encode()

    def _opening(self) -> list[Json]:
        return []

    def _chunks(self, index: int, delta: Delta) -> list[Json]:
        raise NotImplementedError

    def _choice(self, index: int, delta: Delta) -> Json:
        raise NotImplementedError

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._generation.model}

    def _chunk(self, choice: Json) -> Json:
        chunk = {**self._head(self.chunk_kind), "choices": [choice]}
        return {**chunk, "usage": None} if self._generation.include_usage else chunk


class ChatAnswer(Answer):
    """Of /v1/chat/completions.

    Args:
        parsers: that tell calls of tools from text, one for each choice; () where there are no tools.
    """

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, generation: Generation, texts: TokenTexts | None, parsers: Sequence[CallParser] = ()
    ) -> None:
        super().__init__(generation, texts)
        self._parsers = parsers

    def _opening(self) -> list[Json]:
        start = {"role": "assistant", "content": ""}
        return [self._delta(index, start, None, None) for index in range(self._generation.n)]

    def _chunks(self, index: int, delta: Delta) -> list[Json]:
        found = []
        logprobs = self._logprobs(delta)
        parts = self._deltas(index, delta)
        if not parts and logprobs is not None and delta.token_ids:
            parts = [{"content": ""}]
        for part in parts:
            found.append(self._delta(index, part, logprobs, None))
            logprobs = None
        if delta.finish_reason is not None:
            found.append(self._delta(index, {}, None, self._reason(index, delta)))
        return found

    def _deltas(self, index: int, delta: Delta) -> list[Json]:
        if not self._parsers:
            return [{"content": delta.text}] if delta.text else []
        parser = self._parsers[index]
        number = parser.num_calls
        told = parser.push(delta.text) + (parser.finish() if delta.finish_reason is not None else [])
        found: list[Json] = []
        for part in told:
            if isinstance(part, str):
                found.append({"content": part})
            else:
                found.append({"tool_calls": [{"index": number, **part.json()}]})
                number += 1
        return found

    def _reason(self, index: int, delta: Delta) -> str | None:
        called = bool(self._parsers) and self._parsers[index].num_calls > 0
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason

    def _delta(self, index: int, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        return self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _choice(self, index: int, delta: Delta) -> Json:
        message: Json = {"role": "assistant", "content": delta.text, "refusal": None}
        if self._parsers:
            told = self._parsers[index].push(delta.text) + self._parsers[index].finish()
            calls = [part.json() for part in told if isinstance(part, Call)]
            message["content"] = "".join(part for part in told if isinstance(part, str)) or None
            if calls:
                message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(delta),
            "finish_reason": self._reason(index, delta),
        }

    def _logprobs(self, delta: Delta) -> Json | None:
        if self._texts is None:
            return None
        return {"content": token_logprobs(delta, self._texts), "refusal": None}


class TextAnswer(Answer):
    """Of /v1/completions.

    Args:
        prompts: as text, for `echo`; () without.
    """

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(
        self, generation: Generation, texts: TokenTexts | None, prompts: tuple[str, ...] = ()
    ) -> None:
        super().__init__(generation, texts)
        self._prompts = prompts
        self._opened: set[int] = set()  # choices whose prompt has been echoed
        self._offsets: dict[int, int] = {}  # characters of a choice's tokens so far

    def _chunks(self, index: int, delta: Delta) -> list[Json]:
        text = self._echo(index) + delta.text
        logprobs = self._logprobs(index, delta)
        if not (text or delta.finish_reason or (logprobs and logprobs["tokens"])):
            return []
        return [self._chunk(self._text(index, text, logprobs, delta.finish_reason))]

    def _choice(self, index: int, delta: Delta) -> Json:
        text = self._echo(index) + delta.text
        return self._text(index, text, self._logprobs(index, delta), delta.finish_reason)

    def _echo(self, index: int) -> str:
        """The prompt, where it is to be echoed and has not been."""
        if not self._prompts or index in self._opened:
            return ""
        self._opened.add(index)
        return self._prompts[index // self._generation.n]

    def _text(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, delta: Delta) -> Json | None:
        if self._texts is None:
            return None
        told: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if delta.prompt is not None:
            prompt, known = self._prompts[index // self._generation.n], delta.prompt
            self._tell(told, index, known.token_ids[:1], (), (), prompt)
            self._tell(told, index, known.token_ids[1:], known.logprobs, known.tops, prompt)
        self._tell(told, index, delta.token_ids, delta.logprobs, delta.tops)
        if not any(told["top_logprobs"]):
            told["top_logprobs"] = None
        return told

    def _tell(
        self,
        told: Json,
        index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        tops: Tops,
        prompt: str = "",
    ) -> None:
        """Add tokens of a choice, or of its prompt; the one that opens that has no log-probability."""
        assert self._texts is not None
        for place, token_id in enumerate(token_ids):
            text, data = self._texts.of(token_id)
            told["tokens"].append(self._name(token_id))
            told["token_logprobs"].append(_finite(logprobs[place]) if logprobs else None)
            top: Json | None = None
            if tops:  # the one told is always there
                top = {}
                for token, value in (*tops[place], (token_id, logprobs[place])):
                    top.setdefault(self._name(token), _finite(value))
            told["top_logprobs"].append(top)
            offset = self._offsets.setdefault(index, 0)
            told["text_offset"].append(offset)
            if prompt and self._texts.is_special(token_id) and not prompt.startswith(text, offset):
                continue  # put there by the tokenizer
            # characters are counted where they begin: a token may be a part of one
            self._offsets[index] += sum(byte & 0xC0 != 0x80 for byte in data)

    def _name(self, token_id: int) -> str:
        """A token's text, or as OpenAI writes it "bytes:\\xe4" where it is a part of a character."""
        assert self._texts is not None
        text, data = self._texts.of(token_id)
        if text.encode() == data:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_logprobs(delta: Delta, texts: TokenTexts) -> list[Json]:
    """The tokens of a delta with their log-probabilities, as chats and responses show them."""

    def token(token_id: int, logprob: float) -> Json:
        text, data = texts.of(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}

    found = []
    for place, (token_id, logprob) in enumerate(zip(delta.token_ids, delta.logprobs, strict=True)):
        tops = delta.tops[place] if delta.tops else ()
        found.append({**token(token_id, logprob), "top_logprobs": [token(*top) for top in tops]})
    return found


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST
