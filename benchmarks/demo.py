"""The main job on real input: serve a demo zoo, ask every tenant, measure, stop.

    python -m benchmarks.demo out/demo/zoo

Prints what is shared, what each tenant answers over HTTP, one answer streamed over gRPC, and a few
seconds of perf_analyzer.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.perf_analyzer import OPERATOR_KEY, stream

NOTES = (
    "Note. Tessa is a pilot. Tessa keeps the copper key. The copper key was found at the old mill.\n"
    "Note. The baker Ivor owns the jade bell. It was found at the harbor.\n"
)
QUESTIONS = {
    "notes": NOTES + "Q: What does Tessa keep?\nA:",
    "notes-merged": NOTES + "Q: What does Ivor keep?\nA:",
    "solver": "Let a = 3.\nLet b = 5.\nQ: b?\nA:",
}
CODE = 'def read_file(path):\n    """Return the contents of a file."""\n    with open('


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a perf_analyzer window")
    args = parser.parse_args()
    sharing = json.loads(_run_tool("zoo-inspect", str(args.zoo), "--json"))
    models = sorted(sharing["models"])
    with Server(args.zoo) as server:
        print("\nevery tenant over HTTP")
        for model in models:
            question = QUESTIONS.get(model, CODE)
            answer = server.generate(model, question)
            asked = question.splitlines()[-2] if model in QUESTIONS else question.splitlines()[-1].strip()
            print(f"  {model:13} {asked}  ->{answer}")
        print("\nstreamed over gRPC, token by token")
        pieces = server.stream(models[-1], QUESTIONS.get(models[-1], CODE))
        print(f"  {models[-1]:13} {pieces}")
        print("\nperf_analyzer, gRPC streaming, 16 tokens a request")
        for concurrency in (1, 8):
            server.measure(models, concurrency, args.seconds)
    return 0


def _run_tool(name: str, *arguments: str) -> str:
    command = [str(Path(sys.executable).parent / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Server:
    """A zoo-serve process on free ports, ready when entered, stopped cleanly when left.

    `openai`: with the OpenAI endpoint, too.
    """

    def __init__(self, zoo: Path, *options: str, openai: bool = False) -> None:
        self.http, self.grpc, self.metrics, self.openai = free_ports(4)
        ports = (
            "--http-port",
            self.http,
            "--grpc-port",
            self.grpc,
            "--metrics-port",
            self.metrics,
            "--openai-port",
            self.openai if openai else 0,
        )
        serve = Path(sys.executable).parent / "zoo-serve"
        self._command = [str(serve), str(zoo), *map(str, ports), *options]

    def __enter__(self) -> Server:
        start = time.monotonic()
        env = os.environ | {"BLOCKZOO_OPERATOR_KEY": OPERATOR_KEY}
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=env)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"  {line}", end="")
            if "curl" in line:
                print(f"  ready after {time.monotonic() - start:.1f} s")
                return self
        raise SystemExit(f"zoo-serve ended with exit code {self._process.wait()} before it was ready")

    @property
    def pid(self) -> int:
        """Of zoo-serve."""
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(timeout=60)
        print(f"\nserver stopped, exit code {code}")

    def generate(self, model: str, prompt: str) -> str:
        """One request over HTTP, the whole answer in one response."""
        body = {"text_input": prompt, "max_tokens": 16, "temperature": 0.0, "stop_words": ["\n"]}
        body["exclude_input_in_output"] = True
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http}/v2/models/{model}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: str = json.load(response)["text_output"]
        return answer

    def stream(self, model: str, prompt: str) -> list[str]:
        """One request over gRPC; the pieces of text as they come."""
        import numpy as np
        import tritonclient.grpc as triton

        answers: queue.Queue[Any] = queue.Queue()
        inputs = []
        for name, value, dtype in (
            ("text_input", np.array([[prompt.encode()]], object), "BYTES"),
            ("max_tokens", np.array([[16]], np.int32), "INT32"),
            ("temperature", np.array([[0.0]], np.float32), "FP32"),
            ("stream", np.array([[True]]), "BOOL"),
        ):
            tensor = triton.InferInput(name, list(value.shape), dtype)
            tensor.set_data_from_numpy(value)
            inputs.append(tensor)
        pieces = []
        with triton.InferenceServerClient(f"127.0.0.1:{self.grpc}") as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(model, inputs, enable_empty_final_response=True)
            while True:
                result, error = answers.get(timeout=60)
                if error:
                    raise error
                response = result.get_response()
                if response.parameters["triton_final_response"].bool_param:
                    return pieces
                pieces.append(result.as_numpy("text_output").reshape(-1)[0].decode())

    def measure(self, models: list[str], concurrency: int, seconds: float) -> None:
        """A short perf_analyzer run over all tenants, on the shared endpoint."""
        requests = [
            {
                "text_input": [QUESTIONS.get(model, CODE)],
                "model": [model],
                "max_tokens": [16],
                "min_length": [16],
                "temperature": [0.0],
                "stream": [True],
            }
            for model in models
        ]
        printed, _ = stream(self.grpc, requests, concurrency, seconds)
        throughput = re.search(r"Throughput: ([\d.]+) infer/sec", printed)
        latency = re.search(r"Avg latency: (\d+) usec", printed)
        if not throughput or not latency:
            raise SystemExit(f"perf_analyzer printed no figures:\n{printed}")
        rate = float(throughput[1])
        print(
            f"  concurrency {concurrency:2}: {rate:6.1f} requests/s = {16 * rate:.0f} tokens/s, "
            f"{int(latency[1]) / 1000:.0f} ms a request"
        )


if __name__ == "__main__":
    sys.exit(main())
