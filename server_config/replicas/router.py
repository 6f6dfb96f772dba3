"""Ray Serve's request router of replicas: to where a request is cheapest (`prefixes`).

A router lives in each process that has a handle of the deployment, in a loop of its own. It knows of
replicas what they tell about once a second (`routing_stats`: models, those whose adapters are not in memory,
size of the KV pools) and what it sent them itself.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from blockzoo.server_config.openai.engine import EngineRequest
from blockzoo.server_config.replicas.lanes import Lanes
from blockzoo.server_config.replicas.prefixes import CHARS_PER_TOKEN, Holdings, Prompt

POLICIES = ("held", "round-robin")
"""How replicas are chosen: by what they hold and their load; in turn, to compare with."""
_ROUTERS: WeakValueDictionary[str, ReplicaRouter] = WeakValueDictionary()  # of this process, by application


class ReplicaRouter(RequestRouter):
    """Chooses a replica for each request to `Replica`.

    A request is an `EngineRequest` (its model, prompt and scope say where it is cheap), the id of the replica
    that is meant, or nothing: then any will do.
    """

    def initialize_state(self, zoo: str | None = None, policy: str = "held", **kwargs: Any) -> None:
        """Called by Ray with the deployment's settings.

        Args:
            zoo: path of the zoo whose models share KV with each other; None: they do not.
            policy: of `POLICIES`.
        """
        self._lanes, self._policy = Lanes(zoo), policy
        self._holdings = Holdings()
        self._chars_per_token = CHARS_PER_TOKEN  # of the last replica that told it
        self._turn = 0
        _ROUTERS[self.app_name] = self

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas, each a rank of its own, the best first."""
        candidates = list(candidate_replicas)
        if pending_request is None:
            return [candidates]
        pending_request.routing_context.should_backoff = True  # between two rounds in which none had room
        asked = pending_request.args[0] if pending_request.args else None
        if isinstance(asked, str):
            return [[one] for one in candidates if one.replica_id.unique_id == asked]
        if not isinstance(asked, EngineRequest):
            random.shuffle(candidates)
            return [[one] for one in candidates]
        return [[one] for one in self._rank(candidates, asked, pending_request)]

    def _rank(
        self, replicas: list[RunningReplica], request: EngineRequest, pending: PendingRequest
    ) -> list[RunningReplica]:
        serving = [one for one in replicas if request.model in one.routing_stats.get("models", ())]
        replicas = serving or replicas  # where none is known to: it says so itself
        if self._policy == "round-robin":
            self._turn += 1
            return [replicas[(self._turn + place) % len(replicas)] for place in range(len(replicas))]
        by_id = {one.replica_id: one for one in replicas}
        for name, one in by_id.items():
            if "kv_tokens" in one.routing_stats:
                told = one.routing_stats
                self._chars_per_token = told["chars_per_token"]
                self._holdings.set_capacity(name, told["kv_tokens"], self._chars_per_token)
        cold = {name for name, one in by_id.items() if request.model in one.routing_stats.get("cold", ())}
        prompt = self._prompt(request)
        order = list(by_id)
        random.shuffle(order)  # equal ones in turn
        ranked = self._holdings.rank(order, prompt, cold)
        self._expect(pending, ranked[0], prompt)
        return [by_id[name] for name in ranked]

    def _prompt(self, request: EngineRequest) -> Prompt:
        lanes = self._lanes.of(request.model)
        return Prompt(request.kv_scope, lanes, [*request.documents, request.prompt], self._chars_per_token)

    def _expect(self, pending: PendingRequest, replica: ReplicaID, prompt: Prompt) -> None:
        """Count a request where it is about to go: others are routed before it has got there."""
        request_id = pending.metadata.internal_request_id
        self._holdings.send(request_id, replica, prompt)
        pending.future.add_done_callback(partial(self._settle, request_id, replica, prompt))

    def _settle(
        self,
        request_id: str,
        expected: ReplicaID,
        prompt: Prompt,
        chosen: asyncio.Future[RunningReplica],
    ) -> None:
        if chosen.cancelled() or chosen.exception() is not None:
            self._holdings.end(request_id)
        elif chosen.result().replica_id != expected:  # that had no room
            self._holdings.send(request_id, chosen.result().replica_id, prompt)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray, however the request ended."""
        self._holdings.end(internal_request_id, replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Ray."""
        super().on_replica_actor_died(replica_id)
        self._holdings.forget(replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray with all that run."""
        super().update_replicas(replicas)
        here = {one.replica_id for one in replicas}
        for gone in set(self._holdings.replicas) - here:
            self._holdings.forget(gone)


def router_of(application: str) -> ReplicaRouter | None:
    """The router of this process; None before its handle has been used."""
    return _ROUTERS.get(application)
