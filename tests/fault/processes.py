"""What the processes of a served zoo hold: memory, threads, open files; and reports as JSON."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import machine_facts


class Held(NamedTuple):
    """Of one process: resident bytes, threads, open file descriptors."""

    resident: int
    threads: int
    files: int


def held(pid: int) -> Held:
    folder = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Held(int(fields["VmRSS"].split()[0]) << 10, int(fields["Threads"]), len(os.listdir(folder / "fd")))


def held_by_role(server: Any) -> dict[str, Held]:
    return {role: held(pid) for role, pid in server.processes().items()}


class MemoryWatch(threading.Thread):
    """Samples the resident memory of every process of the server."""

    def __init__(self, server: Any, every_s: float) -> None:
        super().__init__(daemon=True)
        self._server, self._every_s = server, every_s
        self._over = threading.Event()
        self.samples: list[tuple[float, dict[str, int]]] = []  # seconds, bytes by role

    def run(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                found = held_by_role(self._server)
            except (OSError, KeyError, StopIteration):  # a model is loaded again at this moment
                continue
            self.samples.append((time.monotonic(), {role: one.resident for role, one in found.items()}))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def quarters(self) -> dict[str, list[float]]:
        """Median MiB of each quarter of the time, by role and in all."""
        roles = sorted({role for _, sample in self.samples for role in sample})
        parts = np.array_split(np.arange(len(self.samples)), 4)

        def median(part: np.ndarray, role: str | None) -> float:
            values = [
                sum(sample.values()) if role is None else sample.get(role, 0)
                for _, sample in (self.samples[i] for i in part)
            ]
            return round(float(np.median(values)) / 2**20, 2)

        named = {role: [median(part, role) for part in parts] for role in roles}
        return named | {"all": [median(part, None) for part in parts]}


def save_json(variable: str, default: Path, report: dict[str, Any]) -> Path:
    """Write a report where the environment variable says."""
    path = Path(os.environ.get(variable) or default)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine_facts(), **report}, indent=1) + "\n")
    print(f"report: {path}")
    return path
