"""How the engine is, and its metrics: looked up once a second at most, however many ask."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

from blockzoo.server_config.openai.engine import EngineClient
from blockzoo.server_config.openai.errors import ApiError

_CHECK_S = 1.0


class Status:
    """Of one event loop.

    Args:
        read: gives the metrics.
    """

    def __init__(self, engine: EngineClient, read: Callable[[], Awaitable[bytes]]) -> None:
        self._health, self._metrics = _Recent(engine.check), _Recent(read)

    async def check(self) -> None:
        """Raises ApiError where the engine does not serve."""
        await self._health()

    async def metrics(self) -> bytes:
        """The engine's metrics as Prometheus reads them. Raises ApiError."""
        return await self._metrics()


def read_metrics(url: str) -> bytes:
    """The engine's own metrics out of tritonserver's at `url`. Raises ApiError."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            lines = response.read().decode().splitlines(keepends=True)
    except OSError as error:
        raise ApiError(503, f"The metrics cannot be read now: {error}", retry_after=2) from None
    ours = ("blockzoo_", "# HELP blockzoo_", "# TYPE blockzoo_")
    return "".join(line for line in lines if line.startswith(ours)).encode()


class _Recent:
    """A look-up that many may ask for and that is made once a second at most."""

    def __init__(self, look: Callable[[], Awaitable[Any]]) -> None:
        self._look = look
        self._lock = asyncio.Lock()
        self._when = float("-inf")
        self._result: Any = None
        self._error: ApiError | None = None

    async def __call__(self) -> Any:
        async with self._lock:
            if time.monotonic() - self._when > _CHECK_S:
                try:
                    self._result, self._error = await self._look(), None
                except ApiError as error:
                    self._error = error
                self._when = time.monotonic()
        if self._error is not None:
            raise self._error.with_traceback(None)
        return self._result
