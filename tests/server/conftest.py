"""A zoo served by zoo-serve, as a user starts it: a process of its own on free loopback ports."""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from served import Served, free_port


class ServedZoo(Served):
    """A zoo-serve process and the simplest clients for it."""

    def __init__(self, zoo: Path, scratch: Path, *options: str) -> None:
        ports = [f"--{kind}-port={free_port()}" for kind in ("http", "grpc", "metrics")]
        super().__init__(zoo, *ports, "--no-openai", *options, TMPDIR=str(scratch))

    def wait_until_serving(self) -> None:
        self.wait_until_told()
        text = "".join(self.out)
        self.http_port = int(re.search(r"HTTP +http://127.0.0.1:(\d+)", text)[1])
        self.grpc = re.search(r"gRPC +(\S+)", text)[1]
        openai = re.search(r"OpenAI +(\S+)/v1", text)
        self.openai = None if openai is None else openai[1]
        self.metrics_port = int(re.search(r"metrics +http://127.0.0.1:(\d+)", text)[1])
        self.curl = next(line.strip() for line in self.out if "curl" in line)

    # ---- clients

    def post(
        self, model: str, body: Any, endpoint: str = "generate", timeout: float = PATIENCE_S
    ) -> tuple[int, Any]:
        """One HTTP request: status and JSON answer."""
        connection = self.open(model, body, endpoint, timeout)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text)

    def open(
        self, model: str, body: Any, endpoint: str = "generate_stream", timeout: float = PATIENCE_S
    ) -> http.client.HTTPConnection:
        """An HTTP request that is sent but not yet answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=timeout)
        payload = body if isinstance(body, bytes) else json.dumps(body)
        try:
            connection.request("POST", f"/v2/models/{model}/{endpoint}", payload, {"Connection": "close"})
        except BaseException:
            connection.close()
            raise
        return connection

    def generate(self, model: str, text: str, max_tokens: int = 16, /, **inputs: Any) -> dict[str, Any]:
        """The answer of the generate endpoint without the prompt; it must be one."""
        body = {
            "text_input": text,
            "max_tokens": max_tokens,
            "exclude_input_in_output": True,
            **inputs,
        }
        status, answer = self.post(model, body)
        assert status == 200, answer
        return answer

    def stream(self, model: str, body: dict[str, Any], timeout: float = PATIENCE_S) -> list[dict[str, Any]]:
        """All events of a stream."""
        connection = self.open(model, {"stream": True, **body}, timeout=timeout)
        events = connection.getresponse().read().decode().split("\n\n")
        connection.close()
        return [json.loads(event.removeprefix("data: ")) for event in events if event.strip()]

    def metrics(self) -> dict[str, float]:
        """blockzoo's samples on /metrics by name and labels."""
        samples = (line.rsplit(" ", 1) for line in self.metrics_text().splitlines())
        return {key: float(value) for key, value in samples if key.startswith("blockzoo_")}

    def metrics_text(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=PATIENCE_S)
        connection.request("GET", "/metrics", headers={"Connection": "close"})
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    # ---- processes

    def server_pid(self) -> int:
        """tritonserver itself."""
        return next(pid for pid, command in _children(self.process.pid) if "tritonserver" in command)

    def model_pid(self, model: str) -> int:
        """The Python process of a model; none while it is being restarted."""
        return next(pid for pid, command in _children(self.server_pid()) if f"/{model}/1/model.py" in command)

    def openai_pid(self) -> int:
        """The process of the OpenAI endpoint."""
        return next(pid for pid, command in _children(self.process.pid) if "openai.server" in command)

    def processes(self) -> dict[str, int]:
        """Process ids by role: "launcher", "tritonserver", and the models that run now."""
        found = {"launcher": self.process.pid, "tritonserver": self.server_pid()}
        for pid, command in _children(found["tritonserver"]):
            if match := re.search(r"/(\w+)/1/model\.py", command):
                found[match[1]] = pid
        return found

    def shared_memory(self) -> list[str]:
        """Regions of this launcher's servers."""
        return [name for name in os.listdir("/dev/shm") if name.startswith(f"blockzoo-{self.process.pid}-")]


def _children(parent: int) -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == parent:
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found.append((int(folder.name), command))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@pytest.fixture(scope="module")
def serve_zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServedZoo]]:
    """Start zoo-serve on a zoo and wait until it serves; all are stopped after the module.

    In f32 unless an option says otherwise: answers are compared, and in bf16 two likely tokens may change
    places with what else is in their step.
    """
    started: list[ServedZoo] = []

    def start(zoo: Path, *options: str, scratch: Path | None = None) -> ServedZoo:
        served = ServedZoo(zoo, scratch or tmp_path_factory.mktemp("serve"), "--precision=f32", *options)
        started.append(served)
        served.wait_until_serving()
        return served

    yield start
    for served in started:
        if served.process.returncode is None:
            served.stop()
