"""A Ray of this machine, in a process of its own, for those who join one."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_CODE = """
import sys
import ray
ray.init(num_cpus=int(sys.argv[1]), object_store_memory=100 << 20, include_dashboard=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
# on loopback alone. No token: who has imported ray without one, as other tests may have, cannot take one up
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


class RunningRay:
    """It runs until it is stopped; `address` is where it is joined."""

    def __init__(self, num_cpus: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(num_cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()

    def workers(self) -> list[int]:
        """Process ids of the actors that are workers."""
        all_of_them = _processes()
        raylets = {pid for pid, (parent, _) in all_of_them.items() if parent == self._process.pid}
        return [
            pid
            for pid, (parent, command) in all_of_them.items()
            if parent in raylets and command.startswith("ray::WorkerActor")
        ]

    def stop(self) -> None:
        """End it, and all that runs on it."""
        self._process.communicate(timeout=200)


def is_there(pid: int) -> bool:
    """Whether a process runs, or is stopped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _processes() -> dict[int, tuple[int, str]]:
    """Parents and command lines, by process id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(folder.name)] = parent, (folder / "cmdline").read_bytes().decode()
    return found
