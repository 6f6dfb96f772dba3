"""The JSON of answers: chat and text completions, whole or in chunks, with usage and log-probabilities."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blockzoo.server_config.openai.catalog import TokenTexts
from blockzoo.server_config.openai.engine import Delta
from blockzoo.server_config.openai.requests import Generation
from blockzoo.server_config.openai.tools import Call, CallParser

Json = dict[str, Any]
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
    """Base of both kinds: what all chunks have in common, and the count of tokens.

    Args:
        texts: of single tokens; None where no log-probabilities are asked for.
    """

    prefix = ""
    kind = ""
    chunk_kind = ""

    def __init__(self, generation: Generation, texts: TokenTexts | None) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
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

    def opening(self) -> list[Json]:
        """The chunks before any text."""
        return []

    def chunks(self, index: int, delta: Delta) -> list[Json]:
        """The chunks of a delta of the choice `index`."""
        raise NotImplementedError

    def closing(self) -> list[Json]:
        """The chunk behind all choices, with the usage, where it is asked for."""
        if not self._generation.include_usage:
            return []
        return [{**self._head(self.chunk_kind), "choices": [], "usage": self.usage.json()}]

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

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, generation: Generation, texts: TokenTexts | None, parsers: Sequence[CallParser] = ()
    ) -> None:
        super().__init__(generation, texts)
        self._parsers = parsers

    def opening(self) -> list[Json]:
        """The role of each choice."""
        start = {"role": "assistant", "content": ""}
        return [self._delta(index, start, None, None) for index in range(self._generation.n)]

    def chunks(self, index: int, delta: Delta) -> list[Json]:
        """Text, then the reason of the end."""
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
        content = []
        for place, (token_id, logprob) in enumerate(zip(delta.token_ids, delta.logprobs, strict=True)):
            tops = delta.tops[place] if delta.tops else ()
            content.append(
                {**self._token(token_id, logprob), "top_logprobs": [self._token(*top) for top in tops]}
            )
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        assert self._texts is not None
        text, data = self._texts.of(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


class TextAnswer(Answer):
    """Of /v1/completions.

    Args:
        prompts: as text, for `echo`; () without.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, generation: Generation, texts: TokenTexts | None, prompts: tuple[str, ...] = ()
    ) -> None:
        super().__init__(generation, texts)
        self._prompts = prompts
        self._offsets: dict[int, int] = {}  # characters of a choice's tokens so far

    def opening(self) -> list[Json]:
        """The prompts, where they are to be echoed."""
        n = self._generation.n
        return [
            self._chunk(self._text(p * n + i, prompt, None, None))
            for p, prompt in enumerate(self._prompts)
            for i in range(n)
        ]

    def chunks(self, index: int, delta: Delta) -> list[Json]:
        """Text, with the reason of the end."""
        logprobs = self._logprobs(index, delta)
        if not delta.text and delta.finish_reason is None and not (logprobs and delta.token_ids):
            return []
        return [self._chunk(self._text(index, delta.text, logprobs, delta.finish_reason))]

    def _choice(self, index: int, delta: Delta) -> Json:
        echo = self._prompts[index // self._generation.n] if self._prompts else ""
        return self._text(index, echo + delta.text, self._logprobs(index, delta), delta.finish_reason)

    def _text(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, delta: Delta) -> Json | None:
        if self._texts is None:
            return None
        texts = [self._texts.of(token_id)[0] for token_id in delta.token_ids]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(text)
        tops = [{self._texts.of(token)[0]: _finite(value) for token, value in top} for top in delta.tops]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(value) for value in delta.logprobs],
            "top_logprobs": tops or None,
            "text_offset": offsets,
        }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST
