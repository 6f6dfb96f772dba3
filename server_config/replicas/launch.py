"""zoo-serve with replicas: what the launcher does. Ray Serve starts, checks, replaces and drains them.

The launcher starts or joins Ray, deploys, keeps the process of the OpenAI endpoint, and brings changes of the
zoo to one replica after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockzoo.runtime.serve.reload import Reloaded
from blockzoo.server_config.environment import ServerError
from blockzoo.server_config.follow import in_thread
from blockzoo.server_config.replicas.host import ReplicaSettings, Told
from blockzoo.server_config.supervisor import NOT_ALL_SERVED, StopSignal, say
from blockzoo.zoo.store import Zoo, manifest_stamp

if TYPE_CHECKING:
    from blockzoo.server_config.openai.process import OpenAIProcess

_LOOK_EVERY_S = 1.0
_ASK_S = 10.0
_LOST_S = 60.0  # without an answer of Ray itself it counts as gone
_FAILURES = 3  # of a replica's start, in a row, before the deployment counts as failed
_HEALTH_S = (2.0, 10.0)  # between two checks, and for the answer; three that fail replace a replica


@dataclass(frozen=True, slots=True)
class Plan:
    """How many replicas, and how they are used.

    Attributes:
        least, most: replicas; as many as there are requests for in between.
        threads: compute threads of each, and CPUs that it takes of Ray's.
        target: requests under way in a replica, on average, above which there are to be more of them.
        drain_s: seconds that requests of a replica have that ends.
        policy: of `router.POLICIES`.
        shares_models: whether models share KV with each other.
    """

    least: int
    most: int
    threads: int
    target: float
    drain_s: float
    policy: str = "held"
    shares_models: bool = False


class ReplicaServer:
    """Serves a zoo with replicas until a signal comes. Runs in the main thread.

    Args:
        name: of the application in Ray Serve.
        ray: starts or joins Ray for a while; gives its address.
        make_front: makes the OpenAI endpoint's process, of the address.
    """

    def __init__(
        self,
        name: str,
        settings: ReplicaSettings,
        plan: Plan,
        ray: AbstractContextManager[str],
        make_front: Callable[[str], OpenAIProcess],
    ) -> None:
        self._name, self._settings, self._plan = name, settings, plan
        self._ray, self._make_front = ray, make_front
        self._zoo = Path(settings.zoo)
        self._handle: Any = None
        self._reloading: tuple[str, Future[Reloaded]] | None = None
        self._told: dict[str, str] = {}  # last of what was said, by what it is about

    def run(self, on_ready: Callable[[tuple[str, ...]], None]) -> int:
        """Serve; the exit status.

        Args:
            on_ready: called with the names of the models.

        Raises:
            ServerError, ZooError: it does not start.
        """
        Zoo.open(self._zoo)  # what is wrong with it is said at once
        stop = StopSignal()
        with self._ray as address, stop.listening():  # Ray has handlers of its own
            try:
                self._deploy()
                front = self._make_front(address)
                try:
                    front.start()
                    models = sorted({name for told in self._ask() for name in told.state.models})
                    on_ready(tuple(models))
                    return self._watch(stop)
                finally:
                    front.stop()
            except KeyboardInterrupt:
                return 130
            finally:
                self._delete()

    def _deploy(self) -> None:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, RequestRouterConfig

        from blockzoo.server_config.replicas.client import DEPLOYMENT
        from blockzoo.server_config.replicas.replica import Replica

        plan = self._plan
        if plan.least == plan.most:
            number: dict[str, Any] = {"num_replicas": plan.most}
        else:
            scaling = AutoscalingConfig(
                min_replicas=plan.least, max_replicas=plan.most, target_ongoing_requests=plan.target
            )
            number = {"autoscaling_config": scaling}
        router = RequestRouterConfig(
            # by a name in another module: Ray copies a class whose own module it is given, globals and all
            request_router_class=f"{__package__}.client.ReplicaRouter",
            request_router_kwargs={
                "zoo": self._settings.zoo if plan.shares_models else None,
                "policy": plan.policy,
            },
            request_routing_stats_period_s=1.0,
        )
        every_s, timeout_s = _HEALTH_S
        deployment = serve.deployment(
            Replica,
            name=DEPLOYMENT,
            ray_actor_options={"num_cpus": plan.threads},
            max_ongoing_requests=4096,  # the endpoint bounds them, and the engine's queue
            health_check_period_s=every_s,
            health_check_timeout_s=timeout_s,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=plan.drain_s,
            max_constructor_retry_count=_FAILURES,
            request_router_config=router,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            **number,
        )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        try:
            self._handle = serve.run(deployment.bind(self._settings), name=self._name, route_prefix=None)
        except RuntimeError as error:
            raise ServerError(
                f"the replicas did not start: {_last_error(error, serve, self._name)}"
            ) from None

    def _watch(self, stop: StopSignal) -> int:
        """Until a signal comes, or Ray is gone; the exit status."""
        answered = time.monotonic()
        left_out: set[str] = set()
        while not stop.wait(_LOOK_EVERY_S):
            try:
                told = self._ask()
                self._say_state(told)
            except ServerError as error:
                self._say("replicas", str(error))
                if self._ray_answers():
                    answered = time.monotonic()
                elif time.monotonic() - answered > _LOST_S:
                    say(f"stopping: Ray has not answered for {_LOST_S:.0f} s")
                    return 1
                continue
            answered = time.monotonic()
            left_out = {name for one in told for name in one.state.left_out}
            self._follow(told)
        say("stopping: running requests finish first, a second signal ends them")
        drained = self._undeploy()
        if left_out:
            say(f"not all models were served; left out: {', '.join(sorted(left_out))}")
        return 1 if not drained else NOT_ALL_SERVED if left_out else 0

    def _ask(self) -> list[Told]:
        """What the replicas say. Raises ServerError where none answers."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            answers = self._handle.broadcast("tell").results(timeout_s=_ASK_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ServerError(f"no replica answers: {_first_line(error)}") from None
        told = [answer for answer in answers if isinstance(answer, Told)]
        if not told:
            raise ServerError("no replica answers")
        return told

    def _ray_answers(self) -> bool:
        import ray
        from ray.exceptions import RayError

        try:
            return bool(ray.nodes())
        except (RayError, OSError, RuntimeError):
            return False

    def _say_state(self, told: list[Told]) -> None:
        number = len(told)
        wanted = str(self._plan.least) + (
            "" if self._plan.least == self._plan.most else f" to {self._plan.most}"
        )
        self._say("replicas", f"{number} of {wanted} replicas serve")
        for one in told:
            for name, why in one.state.left_out.items():
                self._say(name, f"left out: {why}")

    def _say(self, about: str, message: str) -> None:
        """Once."""
        if self._told.get(about) != message:
            self._told[about] = message
            say(message)

    def _follow(self, told: list[Told]) -> None:
        """Bring a change of the zoo to one replica that has not taken it over; the next follows when that
        has."""
        if self._reloading is None:
            stamp = manifest_stamp(self._zoo)
            late = [one for one in told if one.state.retry or one.state.stamp != stamp]
            if stamp is None or not late:
                return
            replica = late[0].replica
            answer = self._handle.reload.remote(replica)
            self._reloading = replica, in_thread(answer.result)
        replica, done = self._reloading
        if not wait([done], _LOOK_EVERY_S).done:
            return
        self._reloading = None
        error = done.exception()
        if error is not None:  # it is asked again, where it still runs
            self._say("reload", f"replica {replica} did not take over the change: {_first_line(error)}")
            return
        found = done.result()
        for key in ("added", "replaced", "removed"):
            if getattr(found, key):
                say(f"replica {replica}: {key} {', '.join(getattr(found, key))}")

    def _delete(self) -> None:
        """Have Ray end the replicas, where it has not been asked to."""
        from ray import serve

        with suppress(Exception):  # Ray is gone, and they with it
            if self._name in serve.status().applications:
                serve.delete(self._name, _blocking=False)

    def _undeploy(self) -> bool:
        """Let requests finish and end the replicas; whether they ended in time."""
        from ray import serve

        deadline = time.monotonic() + self._plan.drain_s
        self._delete()
        while self._name in serve.status().applications:
            if time.monotonic() > deadline + _ASK_S:
                return False
            time.sleep(0.1)
        return time.monotonic() < deadline


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _last_error(error: RuntimeError, serve: Any, name: str) -> str:
    """What a replica said, out of what Ray makes of it."""
    found = serve.status().applications.get(name)
    messages = [each.message for each in found.deployments.values()] if found is not None else []
    lines = [line for message in [*messages, str(error)] for line in message.splitlines() if line.strip()]
    kinds = ("Error: ", "Error:")
    errors = [line for line in lines if any(kind in line for kind in kinds)]
    return (errors or lines)[-1].strip()
