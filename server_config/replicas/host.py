"""The engine of one replica, as asynchronous iterators over answers.

    generate --fair queue, a thread of it--> EngineThread.submit      (tokenizes)
    engine thread --on_output--> what is ready --event loop--> Delta

Knows nothing of Ray. What a client may send is bounded here as it is before tritonserver's engine model.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from blockzoo.runtime import EngineConfig, EngineThread, Metrics, RequestOutput
from blockzoo.runtime.api.errors import (
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
    UnknownModelError,
)
from blockzoo.runtime.serve.reload import Reloaded
from blockzoo.server_config.documents import publish_documents
from blockzoo.server_config.fair_queue import FairQueue
from blockzoo.server_config.openai.engine import Delta, EngineRequest, PromptTokens
from blockzoo.server_config.replicas.prefixes import CHARS_PER_TOKEN
from blockzoo.server_config.schema import MAX_SCOPE_CHARS, checked_text
from blockzoo.zoo.store import manifest_stamp

_LEFT = 4096  # names of requests that were left, the last ones, which may be heard of first
_STALL_S = 120.0  # longest step before the process counts as hung
_SHORT_BYTES = 1 << 16  # tokenized within about 50 ms
_SHORT_WAITING, _LONG_WAITING = 64 << 20, 128 << 20  # bytes of text
_OTHER_BYTES = 2 << 20  # of a request but for its texts
_RETRY_S = 30.0  # models for which there was no memory are tried again
_STATUS = {OverloadedError: "UNAVAILABLE", UnknownModelError: "NOT_FOUND"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request ends without its last delta; `status` is a name of gRPC's or Triton's."""

    status: str
    message: str


@dataclass(frozen=True, slots=True)
class HostState:
    """What a replica holds and does now.

    Attributes:
        models: served.
        warm: those of them all of whose adapters are in memory.
        kv_tokens: about how many tokens' KV its pools hold.
        chars_per_token: of the texts that it was asked about lately.
        stamp: of the manifest that was read last (`manifest_stamp`).
        retry: whether models wait for memory, and it is time to try them again.
        left_out: models of the zoo that are not served, and why; those that wait for memory too.
    """

    models: tuple[str, ...]
    warm: tuple[str, ...]
    kv_tokens: int
    chars_per_token: float
    stamp: tuple[int, int] | None
    retry: bool
    left_out: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Of all replicas.

    Attributes:
        zoo: path of the zoo, the same on all machines.
        engine: fields of EngineConfig.
        publish: files of documents.
    """

    zoo: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    publish: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Told:
    """What one replica says, by its id."""

    replica: str
    state: HostState
    metrics: Metrics


class EngineHost:
    """One engine and who asks it.

    Raises: as `EngineThread`; RequestError where a document cannot be published.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        self._zoo = Path(settings.zoo)
        self._stamp = manifest_stamp(self._zoo)
        self._engine = EngineThread(settings.zoo, EngineConfig(**settings.engine))
        try:
            publish_documents(self._engine, settings.publish)
        except BaseException:
            self._engine.close()  # else its thread keeps the process
            raise
        self._waiting: Mapping[str, str] = {}
        self._reloaded = time.monotonic()
        self._reloading = threading.Lock()
        self._chars, self._tokens = 100 * CHARS_PER_TOKEN, 100.0  # of texts, the later ones counting more
        self._submitted: dict[str, float] = {}  # when the engine got each request
        self._answers: dict[str, _Answer] = {}  # by the names of their requests
        self._left: deque[str] = deque(maxlen=_LEFT)  # names of requests that their clients left
        self._short = FairQueue("blockzoo-short", 2, _SHORT_WAITING)
        self._long = FairQueue("blockzoo-long", 1, _LONG_WAITING)

    async def generate(self, request: EngineRequest, name: str) -> AsyncGenerator[Delta | Refusal, None]:
        """Deltas until one with a `finish_reason`, or a refusal; of a request without `stream` one at most.
        Closing the iterator ends the request, and so does `leave`, by its name."""
        answer = _Answer(request, asyncio.get_running_loop())
        self._answers[name] = answer
        try:
            if name in self._left:
                answer.leave()
            self._queue(request, answer)
            async with aclosing(answer.items()) as items:
                async for item in items:
                    if isinstance(item, Delta) and item.finish_reason is not None:
                        self._count(request, item.num_prompt_tokens)
                    yield item
        except Exception as error:
            yield _refusal(error)
        finally:
            del self._answers[name]
            answer.given_up = True
            self._forget(answer)

    def leave(self, name: str) -> None:
        """Nobody waits for this request's answer any more. It may be heard of before the request itself."""
        self._left.append(name)
        if name in self._answers:
            self._answers[name].leave()

    def state(self) -> HostState:
        """What to tell whoever sends requests."""
        engine = self._engine.engine
        retry = bool(self._waiting) and time.monotonic() - self._reloaded > _RETRY_S
        left_out = {**self._engine.left_out, **self._waiting}
        return HostState(
            engine.models,
            engine.warm_models,
            engine.kv_tokens,
            self._chars / self._tokens,
            self._stamp,
            retry,
            left_out,
        )

    def metrics(self) -> Metrics:
        """A snapshot."""
        return self._engine.metrics()

    def reload(self) -> Reloaded:
        """Take over what has changed in the zoo, in the calling thread, while requests go on.

        Raises:
            ZooError: the zoo cannot be read; nothing has changed.
        """
        with self._reloading:
            stamp = manifest_stamp(self._zoo)
            found = self._engine.reload()
            self._waiting, self._reloaded, self._stamp = found.waiting, time.monotonic(), stamp
        return found

    def problem(self) -> str | None:
        """Why this process should be replaced; None while it is well."""
        now = time.monotonic()
        if self._engine.error is not None or not self._engine.alive:
            return f"the engine has stopped: {self._engine.error}"
        oldest = min(list(self._submitted.values()), default=now)
        if now - max(self._engine.last_progress, oldest) > _STALL_S:
            return f"the engine has made no step for {_STALL_S:.0f} s"
        return None

    def close(self) -> None:
        """End what still runs and stop all threads."""
        for waiting in (self._short, self._long):
            waiting.close()
        self._engine.close()

    def _queue(self, request: EngineRequest, answer: _Answer) -> None:
        """Let a request wait for a thread that tokenizes. Raises RequestError."""
        size = _check(request)
        most = max(self._engine.max_prompt_bytes.values(), default=0) + _OTHER_BYTES
        if size > most:
            raise PromptTooLongError(
                f"the request has {size} bytes; no model here takes more than {most}: shorten it"
            )
        waiting = self._short if size <= _SHORT_BYTES else self._long
        whose = request.tenant or request.model
        waiting.put(whose, request.kv_scope, size, partial(self._submit, request, answer))

    def _submit(self, request: EngineRequest, answer: _Answer) -> None:
        """A thread of the queue."""
        if answer.given_up:
            return
        try:
            self._engine.submit(
                answer.request_id,
                request.model,
                request.prompt,
                request.params,
                answer.put,
                request.kv_scope or None,
                request.kv_reuse,  # type: ignore[arg-type]  # the engine checks it
                request.documents,
                request.tenant,
                request.weight if request.tenant is not None else None,
            )
        except BaseException as error:  # a tokenizer that panics raises no Exception
            answer.put(error)
            return
        self._submitted[answer.request_id] = time.monotonic()
        if answer.given_up or answer.ended:  # meanwhile
            self._forget(answer)

    def _count(self, request: EngineRequest, num_tokens: int) -> None:
        if isinstance(request.prompt, str):
            chars = len(request.prompt) + sum(map(len, request.documents))
            self._chars, self._tokens = 0.99 * self._chars + chars, 0.99 * self._tokens + num_tokens

    def _forget(self, answer: _Answer) -> None:
        if self._submitted.pop(answer.request_id, None) is not None:
            self._engine.abort(answer.request_id)  # no more than a word where it has ended


class _Answer:
    """One request's outputs on their way from the engine's thread to the event loop."""

    def __init__(self, request: EngineRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = uuid.uuid4().hex
        self.given_up = False
        self.ended = False
        self._stream, self._num_top = request.stream, request.params.logprobs or 0
        self._num_prompt_top = request.params.prompt_logprobs or 0
        self._loop, self._ready = loop, asyncio.Event()
        self._outputs: deque[RequestOutput | BaseException] = deque()

    def leave(self) -> None:
        """Nobody waits for it."""
        self.given_up = True
        self.put(RequestError("the client has left"))  # no bug of ours, of which the log should tell

    def put(self, output: RequestOutput | BaseException) -> None:
        """From any thread."""
        self.ended = self.ended or isinstance(output, BaseException) or output.finished
        self._outputs.append(output)
        self._loop.call_soon_threadsafe(self._ready.set)

    async def items(self) -> AsyncGenerator[Delta | Refusal, None]:
        """What came, as one delta where several outputs are ready. Raises what the engine refused."""
        held: list[RequestOutput] = []
        while True:
            await self._ready.wait()
            self._ready.clear()
            while self._outputs:
                output = self._outputs.popleft()
                if isinstance(output, BaseException):
                    raise output if isinstance(output, Exception) else RuntimeError(repr(output))
                held.append(output)
            last = held[-1] if held else None
            if last is None or not (last.finished or self._stream):
                continue
            failed = last.finished and last.finish_reason in ("error", "abort")
            if not failed:
                yield self._delta(held)
            elif self._stream and len(held) > 1:
                yield self._delta(held[:-1])
            if last.finish_reason == "abort":
                yield Refusal("UNAVAILABLE", "the server is shutting down")
            elif failed:
                yield Refusal("INTERNAL", last.error or "the engine failed")
            if last.finished:
                return
            held = []

    def _delta(self, outputs: Sequence[RequestOutput]) -> Delta:
        last = outputs[-1]
        logprobs = [token for output in outputs for token in output.logprobs or ()]
        ended = last.finished
        return Delta(
            "".join(output.text for output in outputs),
            tuple(token for output in outputs for token in output.token_ids),
            tuple(token.logprob for token in logprobs),
            tuple(token.top for token in logprobs) if self._num_top else (),
            last.finish_reason if ended else None,
            last.num_prompt_tokens if ended else 0,
            last.num_cached_tokens if ended else 0,
            next(filter(None, map(self._prompt, outputs)), None),
        )

    def _prompt(self, output: RequestOutput) -> PromptTokens | None:
        if output.prompt_token_ids is None:
            return None
        tokens = [token for token in output.prompt_logprobs or () if token is not None]
        tops = tuple(token.top for token in tokens) if self._num_prompt_top else ()
        return PromptTokens(output.prompt_token_ids, tuple(token.logprob for token in tokens), tops)


def _check(request: EngineRequest) -> int:
    """The bytes of a request. Raises InvalidRequestError where a field is longer than the engine model's may
    be."""
    texts = {"prompt": request.prompt if isinstance(request.prompt, str) else "", "model": request.model}
    texts |= {f"documents[{index}]": text for index, text in enumerate(request.documents)}
    if request.kv_scope is not None and len(request.kv_scope) > MAX_SCOPE_CHARS:
        raise InvalidRequestError(
            f"kv_scope has {len(request.kv_scope)} characters; at most {MAX_SCOPE_CHARS}"
        )
    size = 0
    for name, text in texts.items():
        data = text.encode("utf-8", "surrogatepass")
        checked_text(data, name)
        size += len(data)
    return size + (0 if isinstance(request.prompt, str) else 4 * len(request.prompt))


def _refusal(error: Exception) -> Refusal:
    if isinstance(error, RequestError):
        return Refusal(_STATUS.get(type(error), "INVALID_ARG"), str(error))
    traceback.print_exception(error)  # a bug of ours: this request ends, the server goes on
    return Refusal("INTERNAL", f"internal error: {error}")
