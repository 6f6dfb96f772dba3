"""The replicas as one engine, for the OpenAI endpoint: requests through Ray Serve's handle, and again
elsewhere where a replica is lost before it has said anything."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from blockzoo.server_config.openai.engine import Delta, EngineRequest
from blockzoo.server_config.openai.errors import ApiError, of_engine
from blockzoo.server_config.replicas.figures import exposition
from blockzoo.server_config.replicas.host import Refusal, Told
from blockzoo.server_config.replicas.local_ray import connect
from blockzoo.server_config.replicas.router import ReplicaRouter, router_of

__all__ = ["DEPLOYMENT", "ReplicaClient", "ReplicaRouter", "join"]
DEPLOYMENT = "Replica"
_ASK_S = 5.0  # for what replicas answer at once
_PATIENCE_S = 60.0  # while no replica runs
_TRIES = 3  # of a request whose replicas are lost: it may be what they are lost by
_LOST = (RayActorError, ObjectLostError, NodeDiedError, WorkerCrashedError)


def join(address: str) -> None:
    """Connect this process to the Ray that runs the replicas. Raises ServerError where it cannot."""
    connect(address)


class ReplicaClient:
    """An `Engine` of all replicas. Belongs to one event loop.

    Args:
        application: name of the replicas' application of Ray Serve.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._handle: Any = serve.get_deployment_handle(DEPLOYMENT, application)
        self._generate = self._handle.options(method_name="generate", stream=True)
        self._leaving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Leave Ray, which ends what is under way."""
        await asyncio.to_thread(ray.shutdown)

    async def ready(self, names: Iterable[str]) -> list[str]:
        """See `Engine.ready`; one replica that serves a model is enough. Waits a while for replicas where
        there are none."""
        served = self._served()
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while served is None:
            try:
                served = {name for told in await self._ask() for name in told.state.models}
            except ApiError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.2)
        return [name for name in names if name in served]

    def _served(self) -> set[str] | None:
        """What replicas told last; None where none has told anything."""
        router = router_of(self._application)
        stats = [] if router is None else [one.routing_stats for one in list(router.curr_replicas.values())]
        told = [each["models"] for each in stats if "models" in each]
        return {name for names in told for name in names} if told else None

    async def check(self) -> None:
        """See `Engine.check`: some replica answers."""
        try:
            await asyncio.wait_for(self._handle.tell.remote(), _ASK_S)
        except (RayError, RayServeException, asyncio.TimeoutError) as error:
            raise _unreachable(error) from None

    async def metrics(self) -> bytes:
        """See `Engine.metrics`."""
        return exposition({told.replica: told.metrics for told in await self._ask()})

    async def _ask(self) -> list[Told]:
        """What all replicas say that answer in time. Raises ApiError where none does."""
        try:
            answers = await self._handle.broadcast("tell").results_async(
                timeout_s=_ASK_S, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError) as error:
            raise _unreachable(error) from None
        told = [answer for answer in answers if isinstance(answer, Told)]
        if not told:
            raise _unreachable(answers[0] if answers else "no replica runs")
        return told

    async def generate(self, request: EngineRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        """See `Engine.generate`. A request whose replica is lost before its first delta begins anew on
        another; one that has begun ends with an error that says so."""
        for _ in range(_TRIES):
            num_tokens, begun, finished, ended = 0, False, False, False
            name = uuid.uuid4().hex
            items = self._generate.remote(request, name)
            try:
                async for item in items:  # to its end: then it counts as ended at once
                    if isinstance(item, Refusal):
                        raise of_engine(item.status, item.message)
                    begun = True
                    num_tokens += len(item.token_ids)
                    finished = item.finish_reason is not None
                    yield item
                ended = True
                if not finished:
                    raise ApiError(500, "The engine ended the request without a last response.")
                return
            except _LOST:
                ended = True
                if finished:
                    return
                if begun:
                    raise _lost(num_tokens) from None
            except DeploymentUnavailableError as error:
                raise _unreachable(error) from None
            finally:
                if not ended:
                    items.cancel()  # which Ray loses as often as not where the stream has begun
                    leaving = asyncio.create_task(self._leave(name))
                    self._leaving.add(leaving)  # the loop itself keeps no task alive
                    leaving.add_done_callback(self._leaving.discard)
        raise ApiError(503, f"{_TRIES} replicas were lost while they had this request.", None, None, 2)

    async def _leave(self, name: str) -> None:
        """Tell whatever replica has a request that its client has left."""
        with suppress(RayError, RayServeException, TimeoutError):
            told = self._handle.broadcast("leave", name)
            await told.results_async(timeout_s=_ASK_S, return_exceptions=True)


def _lost(num_tokens: int) -> ApiError:
    return ApiError(
        503,
        f"The replica that generated this answer was lost after {num_tokens} tokens of it: what was sent is "
        "a beginning, nothing more will come. Send the request again.",
        None,
        "replica_lost",
        1,
    )


def _unreachable(error: object) -> ApiError:
    why = str(error).strip().splitlines() or [type(error).__name__]
    return ApiError(503, f"No replica can be reached now: {why[0]}", None, None, 2)
