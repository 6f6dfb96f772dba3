"""zoo-serve with replicas, as a user starts it, on a Ray of its own."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from patience import PATIENCE_S
from served import Served, free_port

START_S = 300.0  # Ray's processes, on a machine that has other work


class ServedReplicas(Served):
    """A zoo-serve process with replicas, and clients for it."""

    def __init__(self, zoo: Path, *options: str, key: str = "none", **environment: str) -> None:
        self.port = free_port()
        own = (f"--openai-port={self.port}", "--kv-cache-gb=0.05", "--precision=f32")
        super().__init__(zoo, *own, *options, **environment)
        self.key = key
        self.client = self.client_of(key)

    def client_of(self, key: str) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE_S)

    def wait_until_serving(self) -> None:
        self.wait_until_told(START_S)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            headers = {"authorization": f"Bearer {self.key}"}
            headers |= {} if body is None else {"content-type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def complete(self, model: str, prompt: str, max_tokens: int = 8, **options: Any) -> Any:
        return self.client.completions.create(
            model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, **options
        )

    def metrics(self) -> dict[str, float]:
        samples = (line.rsplit(" ", 1) for line in self.ask("GET", "/metrics")[1].splitlines())
        return {key: float(value) for key, value in samples if key.startswith("blockzoo_")}

    def by_replica(self, name: str) -> dict[str, float]:
        """A figure of each replica, by its id."""
        pattern = re.compile(rf'blockzoo_replica_{name}{{replica="(\w+)"}}')
        return {match[1]: value for key, value in self.metrics().items() if (match := pattern.match(key))}

    def processes(self) -> dict[int, str]:
        """Command lines of all below the launcher, by process id."""
        return descendants(self.process.pid)

    def replica_pids(self) -> list[int]:
        return [pid for pid, command in self.processes().items() if "ServeReplica" in command]

    def workers_of(self, replica: int) -> list[int]:
        """Of a replica's process."""
        module = "runtime.workers.worker"
        return [pid for pid, command in descendants(replica).items() if module in command]

    def listening(self, pid: int) -> list[tuple[str, int]]:
        """Addresses, in hex as Linux writes them, and ports on which a process takes connections."""
        inodes = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
        found = []
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A" and rest[5] in inodes:
                    address, _, port = local.partition(":")
                    found.append((address, int(port, 16)))
        return found

    def stop(self, number: int | None = signal.SIGTERM, timeout: float = PATIENCE_S) -> int:
        try:
            return super().stop(number, timeout)
        finally:
            self.client.close()


def descendants(parent: int) -> dict[int, str]:
    """Command lines of the processes below one."""
    children: dict[int, list[int]] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(above, []).append(int(folder.name))
            commands[int(folder.name)] = command
    found: dict[int, str] = {}
    below = [parent]
    while below:
        below = [child for pid in below for child in children.get(pid, [])]
        found |= {pid: commands[pid] for pid in below}
    return found


@pytest.fixture(scope="module")
def serve_replicas() -> Iterator[Callable[..., ServedReplicas]]:
    """Start zoo-serve with replicas and wait until it serves; all are stopped after the module."""
    pytest.importorskip("ray", reason="the extra cluster is not installed")
    started: list[ServedReplicas] = []

    def start(zoo: Path, *options: str, **more: str) -> ServedReplicas:
        served = ServedReplicas(zoo, *options, **more)
        started.append(served)
        served.wait_until_serving()
        return served

    yield start
    for served in started:
        if served.process.returncode is None:
            served.stop()
