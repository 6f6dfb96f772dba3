"""One replica, as Ray Serve runs it: an actor in a process of its own with a whole engine."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve

from blockzoo.runtime.serve.reload import Reloaded
from blockzoo.server_config.openai.engine import Delta, EngineRequest
from blockzoo.server_config.replicas.host import EngineHost, Refusal, ReplicaSettings, Told


class Replica:
    """Answers for one engine. Raises as `EngineHost` where it cannot start."""

    def __init__(self, settings: ReplicaSettings) -> None:
        self._host = EngineHost(settings)
        self._id = serve.get_replica_context().replica_id.unique_id

    async def generate(self, request: EngineRequest, name: str) -> AsyncGenerator[Delta | Refusal, None]:
        """See `EngineHost.generate`; cancelling the call ends the request."""
        async for item in self._host.generate(request, name):
            yield item

    async def leave(self, name: str) -> None:
        """See `EngineHost.leave`."""
        self._host.leave(name)

    async def tell(self) -> Told:
        """What it holds and has done."""
        return Told(self._id, self._host.state(), self._host.metrics())

    async def reload(self, replica: str) -> Reloaded:
        """Take over what has changed in the zoo, while requests go on. The router brings the call to the
        replica that is named. Raises ZooError."""
        if replica != self._id:
            raise ValueError(f"this is replica {self._id}, not {replica}")
        return await asyncio.to_thread(self._host.reload)

    async def check_health(self) -> None:
        """Called by Ray about every second. Raises where the process should be replaced."""
        problem = self._host.problem()
        if problem is not None:
            print(f"replica {self._id}: {problem}", file=sys.stderr, flush=True)
            raise RuntimeError(problem)

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray about every second, for the routers."""
        state = self._host.state()
        cold = sorted(set(state.models) - set(state.warm))
        return {
            "models": state.models,
            "cold": cold,
            "kv_tokens": state.kv_tokens,
            "chars_per_token": state.chars_per_token,
        }

    def __del__(self) -> None:
        """Called by Ray once no request runs here any more, or the time for that is over."""
        host = getattr(self, "_host", None)  # none where it could not start
        if host is not None:
            host.close()
