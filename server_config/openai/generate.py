"""All answers that one request asks for, as one stream of deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from blockzoo.server_config.openai.engine import Delta, Engine, EngineRequest

_AHEAD = 4  # deltas per answer that may wait for their client; further ones stay with the engine


async def deltas(
    engine: Engine, requests: Sequence[EngineRequest], request_id: str
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Deltas with the index of their request, as they come; ended, or failed, all at once.

    Raises:
        ApiError: of whichever fails first; the others are cancelled.
    """
    if len(requests) == 1:
        async with aclosing(engine.generate(requests[0], request_id)) as answer:
            async for delta in answer:
                yield 0, delta
        return
    ready: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(_AHEAD * len(requests))

    async def read(index: int) -> None:
        last: BaseException | None = None
        try:
            async with aclosing(engine.generate(requests[index], f"{request_id}-{index}")) as answer:
                async for delta in answer:
                    await ready.put((index, delta))
        except Exception as error:
            last = error
        await ready.put((index, last))

    tasks = [asyncio.ensure_future(read(index)) for index in range(len(requests))]
    try:
        left = len(tasks)
        while left:
            index, item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
