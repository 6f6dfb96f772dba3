"""The search for a placement in a process of its own, at the lowest priority: it holds up no step."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping

from blockzoo.zoo.placement import PlacementError, Plan, Task, adapt

MOST_SECONDS = 120.0
_MODULE = "blockzoo.runtime.serve.search_apart"


def adapt_apart(task: Task, routes: Mapping[str, tuple[int, ...]], least_gain: float) -> Plan:
    """`adapt`. Raises PlacementError where there is no plan, or none was found in time."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", _MODULE],
            input=pickle.dumps((task, dict(routes), least_gain)),
            stdout=subprocess.PIPE,
            timeout=MOST_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise PlacementError(f"the search took longer than {MOST_SECONDS:g} s") from None
    except subprocess.CalledProcessError as error:
        raise PlacementError(f"the search ended with {error.returncode}; what it said is above") from error
    found = pickle.loads(done.stdout)
    if isinstance(found, PlacementError):
        raise found
    plan: Plan = found
    return plan


def main() -> None:
    """A task from standard input, a plan to standard output; both pickled, between processes of ours."""
    os.nice(19)
    task, routes, least_gain = pickle.load(sys.stdin.buffer)
    found: Plan | PlacementError
    try:
        found = adapt(task, routes, least_gain)
    except PlacementError as error:
        found = error
    pickle.dump(found, sys.stdout.buffer)


if __name__ == "__main__":
    main()
