"""The search for a placement in a process of its own, at the lowest priority: it holds up no step."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from threading import Event

from blockzoo.zoo.placement import PlacementError, Plan, Task, adapt

MOST_SECONDS = 120.0
NICENESS = 19
_LOOK_EVERY_S = 0.2
_MODULE = "blockzoo.runtime.serve.search_apart"


def adapt_apart(task: Task, routes: Mapping[str, tuple[int, ...]], least_gain: float, stop: Event) -> Plan:
    """`adapt`. Raises PlacementError where there is no plan, or none was found in time, or before `stop`."""
    command = [sys.executable, "-m", _MODULE, str(NICENESS)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    given: bytes | None = pickle.dumps((task, dict(routes), least_gain))
    deadline = time.monotonic() + MOST_SECONDS
    with process:
        while True:
            try:
                said, _ = process.communicate(given, _LOOK_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                given = None
                if stop.is_set() or time.monotonic() > deadline:
                    process.kill()
                    raise PlacementError(f"none was found within {MOST_SECONDS:g} s") from None
    if process.returncode:
        raise PlacementError(f"the search ended with {process.returncode}; what it said is above")
    found = pickle.loads(said)
    if isinstance(found, PlacementError):
        raise found
    plan: Plan = found
    return plan


def main() -> None:
    """A task from standard input, a plan to standard output; both pickled, between processes of ours."""
    os.nice(int(sys.argv[1]))
    seconds = int(MOST_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # should nobody be there to end it
    task, routes, least_gain = pickle.load(sys.stdin.buffer)
    found: Plan | PlacementError
    try:
        found = adapt(task, routes, least_gain)
    except PlacementError as error:
        found = error
    pickle.dump(found, sys.stdout.buffer)


if __name__ == "__main__":
    main()
