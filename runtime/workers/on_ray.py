"""Workers as actors of Ray, which says where they run and ends them with the head. No data goes through it.

A placement group holds what workers take; of each worker the actors, one after the other, are in its bundle,
which may be made anew on another machine where its own is lost. A process that takes another's place starts
beside it in the same bundle.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any

from blockzoo.runtime.workers.processes import WorkerStartError

START_S = 60.0
"""That Ray may take to place workers, and to start a process."""


class WorkerActor:
    """The process of a worker."""

    def __init__(self) -> None:
        self._told: SimpleQueue[Any] = SimpleQueue()

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def tell(self, what: Any) -> None:
        """What it is to do next."""
        self._told.put(what)

    def run(self) -> None:
        """Do it; never returns."""
        from blockzoo.runtime.workers.worker_process import serve

        serve(self._told.get)


class RayProcess:
    """An actor that runs. See `WorkerProcess`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._pid: Future[int] = actor.pid.remote().future()
        self._done: Future[None] = actor.run.remote().future()
        self._deadline = time.monotonic() + START_S

    @property
    def pair(self) -> None:
        """None, wherever it runs."""
        return None

    @property
    def pid(self) -> int:
        """See `WorkerProcess`."""
        try:
            return self._pid.result(max(0.0, self._deadline - time.monotonic()))
        except Exception as error:  # of many kinds
            raise WorkerStartError(f"Ray did not start a worker: {error}") from None

    @property
    def ended(self) -> bool:
        """See `WorkerProcess`."""
        return self._done.done() or (not self._pid.done() and time.monotonic() > self._deadline)

    @property
    def why(self) -> str:
        """See `WorkerProcess`."""
        if not self._done.done():
            return f"was not started by Ray within {START_S:g} s"
        error = self._done.exception()
        cause = getattr(error, "cause", error)  # what its code raised, or what Ray knows
        return f"ended: {type(cause).__name__}: {str(cause).splitlines()[0]}"

    def tell(self, what: object) -> None:
        """See `WorkerProcess`."""
        self._actor.tell.remote(what)

    def kill(self) -> None:
        """See `WorkerProcess`."""
        import ray

        with suppress(Exception):  # Ray is gone, and it with it
            ray.kill(self._actor)


class RayProcesses:
    """Starts actors, for as long as somebody refers to it.

    Args:
        address: of the Ray that is joined, which sees this package and the zoo under the same paths.
        count: of workers.
        num_threads: that each computes with, and CPUs that it takes of Ray's.
        memory: bytes of Ray's that each takes; None: it takes none of them.

    Raises:
        WorkerStartError: Ray cannot be used, or has no room for so many.
    """

    def __init__(self, address: str, count: int, num_threads: int, memory: int | None) -> None:
        if find_spec("ray") is None:
            raise WorkerStartError("ray_address needs Ray: pip install 'blockzoo[cluster]'")
        _connect(address)
        import ray
        from ray.util import placement_group, remove_placement_group

        bundle: dict[str, float] = {"CPU": num_threads}
        if memory is not None:
            bundle["memory"] = memory
        self._bundles = placement_group([bundle] * count, strategy="PACK")  # the fewer links, the better
        if not self._bundles.wait(START_S):
            remove_placement_group(self._bundles)
            raise WorkerStartError(
                f"Ray has no room for {count} workers of {bundle} in {START_S:g} s; it has "
                f"{ray.available_resources()}"
            )
        weakref.finalize(self, _remove, self._bundles)

    def start(self, index: int) -> RayProcess:
        """See `Processes`."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._bundles, placement_group_bundle_index=index)
        options = {
            "num_cpus": 0,
            "max_concurrency": 3,
            "scheduling_strategy": place,
        }  # a thread each, and one
        return RayProcess(ray.remote(WorkerActor).options(**options).remote())


def _connect(address: str) -> None:
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": False}
    connected: Future[object] = Future()

    def connect() -> None:
        try:
            connected.set_result(ray.init(**options))
        except BaseException as error:
            connected.set_exception(error)

    # in the main thread Ray would take over the process's signals; with another Ray's token it never ends
    threading.Thread(target=connect, daemon=True).start()
    try:
        connected.result(START_S)
    except FutureTimeout:
        raise WorkerStartError(f"Ray at {address} did not answer within {START_S:g} s") from None
    except Exception as error:  # of many kinds, from its processes
        raise WorkerStartError(f"Ray at {address} cannot be used: {error}") from None


def _remove(bundles: Any) -> None:
    from ray.util import remove_placement_group

    with suppress(Exception):  # Ray is gone
        remove_placement_group(bundles)
