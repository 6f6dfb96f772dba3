"""How the engine is, and its metrics: looked up once a second at most, however many ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from blockzoo.server_config.openai.engine import Engine
from blockzoo.server_config.openai.errors import ApiError

_CHECK_S = 1.0  # how old what is told of health and metrics may be
T = TypeVar("T")


class Status:
    """Of one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._health, self._metrics = Recent(engine.check), Recent(engine.metrics)

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
