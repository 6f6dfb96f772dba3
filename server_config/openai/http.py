"""HTTP of the endpoint: bodies within bounds, JSON and event streams out, and work that ends with its client.

A client that goes away, or that does not read for a while what is sent to it, ends its request: the task that
answers it is cancelled, and with it the streams to the engine.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from blockzoo.server_config.openai.answers import encode
from blockzoo.server_config.openai.errors import ApiError
from blockzoo.server_config.openai.fields import parse_json
from blockzoo.server_config.openai.keys import Key

MAX_BODY_BYTES = 8 << 20
BODY_SECONDS = 30.0
"""In which a body must have come."""
STALLED_SECONDS = 30.0
"""After which a client that takes nothing of what is sent to it is given up."""
_LOOK_EVERY_S = 2.0
_SMALL_BYTES = 1 << 16  # read as JSON in the event loop
_EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class Exchange:
    """One request and its answer.

    Attributes:
        request: its head; `body` reads the rest.
        id: given back as x-request-id.
        started: whether an answer has begun.
        key: whose request it is, where keys are asked for.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.request = Request(scope, receive)
        self.id = uuid.uuid4().hex
        self._send = send
        self._sending_since: float | None = None
        self._failed: Callable[[ApiError], bytes] = _nothing_more
        self.started = False
        self.key: Key | None = None

    async def body(self) -> dict[str, Any]:
        """The JSON object that was sent. Raises ApiError, ClientDisconnect."""
        kind = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also keeps pages of other sites from posting unasked
            raise ApiError(415, f"The content type is {kind!r:.100}; expected application/json.")
        length = self.request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
            raise _too_large()
        try:
            data = await asyncio.wait_for(self._read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"The body did not come within {BODY_SECONDS:.0f} s.") from None
        if len(data) <= _SMALL_BYTES:
            return parse_json(data)
        return await asyncio.get_running_loop().run_in_executor(None, parse_json, data)

    async def _read(self) -> bytes:
        parts, size = [], 0
        async for part in self.request.stream():
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise _too_large()
            parts.append(part)
        return b"".join(parts)

    async def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answer with JSON."""
        await self.data(encode(value).encode(), "application/json", status, headers)

    async def data(
        self, data: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with bytes."""
        length = {"content-type": content_type, "content-length": str(len(data))}
        await self._start(status, {**length, **(headers or {})})
        await self._write(data, last=True)

    async def error(self, error: ApiError) -> None:
        """Answer with an error, or end a stream that has begun with it."""
        if self.started:
            await self._write(self._failed(error), last=True)
            return
        # the rest of a body that is not read would be taken for the next request
        closing = {"connection": "close"} if error.status in (408, 413, 415) else {}
        await self.json(error.body(), error.status, {**error.headers(), **closing})

    async def events(self, events: AsyncIterator[bytes], failed: Callable[[ApiError], bytes]) -> None:
        """Answer with a stream of events, which starts with the first that is ready; `failed` makes those
        that end it before its time."""
        self._failed = failed
        async for data in events:
            if not self.started:
                await self._start(200, _EVENT_STREAM)
            if data:
                await self._write(data)
        await self._write(b"", last=True)

    @property
    def stalled(self) -> bool:
        """Whether the client has taken nothing for too long."""
        since = self._sending_since
        return since is not None and asyncio.get_running_loop().time() - since > STALLED_SECONDS

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        fields = {"x-request-id": self.id, **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
        await self._sent({"type": "http.response.start", "status": status, "headers": raw})

    async def _write(self, data: bytes, last: bool = False) -> None:
        await self._sent({"type": "http.response.body", "body": data, "more_body": not last})

    async def _sent(self, message: Message) -> None:
        """Sending waits while the client does not read: nothing more is asked of the engine meanwhile."""
        self._sending_since = asyncio.get_running_loop().time()
        await self._send(message)
        self._sending_since = None


Body = dict[str, Any]


class Endpoint:
    """An ASGI application that answers with a handler for as long as its client is there.

    Args:
        handler: is given the JSON object that was sent, {} where `has_body` is false; raises ApiError for
            what is to be answered as an error.
        guard: called before a body is read; raises ApiError for whom it refuses.
    """

    def __init__(
        self,
        handler: Callable[[Exchange, Body], Awaitable[None]],
        guard: Callable[[Exchange], None],
        has_body: bool = False,
    ) -> None:
        self._handler, self._guard, self._has_body = handler, guard, has_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = Exchange(scope, receive, send)
        try:
            self._guard(exchange)
            body = await exchange.body() if self._has_body else {}
        except ClientDisconnect:
            return
        except ApiError as error:
            await exchange.error(error)
            return
        work = asyncio.ensure_future(self._answer(exchange, body))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while not (work.done() or gone.done() or exchange.stalled):
                await asyncio.wait({work, gone}, timeout=_LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            if exchange.stalled and not work.done():
                scope.get("state", {}).get("abort", _nothing)()  # closing alone waits for what is not read
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _answer(self, exchange: Exchange, body: Body) -> None:
        try:
            await self._handler(exchange, body)
        except ApiError as error:
            await exchange.error(error)
        except Exception as error:  # a bug of ours: this request ends, the server goes on
            print(f"request {exchange.id}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            await exchange.error(ApiError(500, f"Internal error: {type(error).__name__}."))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _nothing() -> None:
    pass


def _nothing_more(error: ApiError) -> bytes:
    return b""


def _too_large() -> ApiError:
    return ApiError(413, f"The body is too large; expected at most {MAX_BODY_BYTES} bytes.")
