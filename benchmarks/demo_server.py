"""A zoo-serve process for the demo and the benchmarks: started on free ports, asked, weighed, stopped."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.perf_analyzer import OPERATOR_KEY


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Server:
    """A zoo-serve process on free ports, ready when entered, stopped cleanly when left."""

    def __init__(self, zoo: Path, *options: str, openai: bool = False, quiet: bool = False) -> None:
        self.http, self.grpc, self.metrics, self.openai = free_ports(4)
        ports = {"http-port": self.http, "grpc-port": self.grpc, "metrics-port": self.metrics}
        ports["openai-port"] = self.openai if openai else 0
        serve = Path(sys.executable).parent / "zoo-serve"
        flags = (f"--{name}={port}" for name, port in ports.items())
        self._command = [str(serve), str(zoo), *flags, *options]
        self._say = (lambda text: None) if quiet else print

    def __enter__(self) -> Server:
        start = time.monotonic()
        env = os.environ | {"BLOCKZOO_OPERATOR_KEY": OPERATOR_KEY}
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=env)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._say(f"  {line.rstrip()}")
            if "curl" in line:
                self._say(f"  ready after {time.monotonic() - start:.1f} s")
                return self
        raise SystemExit(f"zoo-serve ended with exit code {self._process.wait()} before it was ready")

    @property
    def pid(self) -> int:
        """Of zoo-serve."""
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(timeout=60)
        self._say(f"\nserver stopped, exit code {code}")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """One request to the OpenAI endpoint over HTTP, as any client of OpenAI sends it; the JSON answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.openai}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def stream(self, model: str, prompt: str, max_tokens: int) -> list[str]:
        """One request over Triton's gRPC stream, greedy; the pieces of text as they come."""
        import numpy as np
        import tritonclient.grpc as triton

        answers: queue.Queue[Any] = queue.Queue()
        inputs = []
        for name, value, dtype in (
            ("text_input", np.array([[prompt.encode()]], object), "BYTES"),
            ("max_tokens", np.array([[max_tokens]], np.int32), "INT32"),
            ("temperature", np.array([[0.0]], np.float32), "FP32"),
            ("stream", np.array([[True]]), "BOOL"),
        ):
            tensor = triton.InferInput(name, list(value.shape), dtype)
            tensor.set_data_from_numpy(value)
            inputs.append(tensor)
        pieces: list[str] = []
        with triton.InferenceServerClient(f"127.0.0.1:{self.grpc}") as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(model, inputs, enable_empty_final_response=True)
            while True:
                result, error = answers.get(timeout=120)
                if error:
                    raise error
                response = result.get_response()
                if response.parameters["triton_final_response"].bool_param:
                    return pieces
                pieces.append(result.as_numpy("text_output").reshape(-1)[0].decode())

    def memory(self) -> int:
        """Bytes that the kernel keeps for all processes of the server; of shared pages their share (PSS)."""
        return sum(_pss(pid) for pid in descendants(self._process.pid))


def descendants(root: int) -> Iterator[int]:
    """A process and all those it started that still run."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += [child for child, parent in parents.items() if parent == pid]


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
