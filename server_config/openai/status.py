"""How the engine is, and its metrics: looked up once a second at most, however many ask."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from blockzoo.server_config.openai.engine import EngineClient
from blockzoo.server_config.openai.errors import ApiError

_CHECK_S = 1.0  # how old what is told of health and metrics may be
T = TypeVar("T")


class Status:
    """Of one event loop.

    Args:
        read: gives the metrics.
    """

    def __init__(self, engine: EngineClient, read: Callable[[], Awaitable[bytes]]) -> None:
        self._health, self._metrics = Recent(engine.check), Recent(read)

    async def check(self) -> None:
        """Raises ApiError where the engine does not serve."""
        await self._health()

    async def metrics(self) -> bytes:
        """The engine's metrics as Prometheus reads them. Raises ApiError."""
        return await self._metrics()

    @property
    def metrics_read(self) -> float:
        """When they were read last, by the monotonic clock in seconds."""
        return self._metrics.when


def read_metrics(url: str) -> bytes:
    """The engine's own metrics out of tritonserver's at `url`. Raises ApiError."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            lines = response.read().decode().splitlines(keepends=True)
    except OSError as error:
        raise ApiError(503, f"The metrics cannot be read now: {error}", retry_after=2) from None
    ours = ("blockzoo_", "# HELP blockzoo_", "# TYPE blockzoo_")
    return "".join(line for line in lines if line.startswith(ours)).encode()


class Recent(Generic[T]):
    """A look-up that many may ask for and that is made once in a while at most.

    Args:
        fresh_s: for how long a result, or an error, is given again.
    """

    def __init__(self, look: Callable[[], Awaitable[T]], fresh_s: float = _CHECK_S) -> None:
        self._look, self._fresh_s = look, fresh_s
        self._lock = asyncio.Lock()
        self.when = float("-inf")
        """Of the last look-up, by the monotonic clock in seconds."""
        self._result: T
        self._error: ApiError | None = None

    async def __call__(self) -> T:
        """The result of the last look-up. Raises ApiError where it did."""
        async with self._lock:
            if time.monotonic() - self.when > self._fresh_s:
                try:
                    self._result, self._error = await self._look(), None
                except ApiError as error:
                    self._error = error
                self.when = time.monotonic()
        if self._error is not None:
            raise self._error.with_traceback(None)
        return self._result
