"""A model with layers of its own comes to a running server, and goes again, while others stream.

    python -m benchmarks.live_addition --models out/demo/models
    python -m benchmarks.live_addition --shape 110m

A round, after one that is not counted: some seconds of quiet; `zoo-compile` adds a model; from its end on the
seconds until the model answers (`blockzoo` takes it; then its own ensemble); `zoo-compile` removes it; some
seconds of rest. All the while streams of the first model run, whose longest gap between two tokens is told
for each phase, and the memory of the engine's process, sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, machine_facts, print_table, save_report
from benchmarks.demo_server import Server
from benchmarks.families import make_family
from benchmarks.memory import memory_of

PHASES = ("quiet", "zoo-compile adds", "until it answers", "zoo-compile removes", "until it is gone", "rest")
PROMPT = "def parse(line):\n    key, value = line."


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=3)
    parser.add_argument("--models", type=Path, help="checkpoints of the demo family, instead of a shape")
    parser.add_argument("--context", type=int, default=400, help="tokens of a stream (400)")
    parser.add_argument("--streams", type=int, default=4, help="that run all the while (4)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of quiet and of rest (5)")
    args = parser.parse_args()
    if args.models is not None:
        base, comes = args.models / "base", args.models / "solver"
        args.shape, args.models = "demo", str(args.models)
    else:
        family = make_family(args.workdir, args.shape, 2)
        base, comes = map(family.checkpoint, family.tenants)
    machine = machine_facts()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder) / "zoo", base, comes, args)
    rows = [(phase, *results["phases"][phase].values()) for phase in PHASES]
    print_table(
        f"{args.streams} streams, {args.repeats} rounds",
        ("phase", "s", "longest gap ms", "peak RSS MiB"),
        rows,
    )
    print(f"answers {results['answers_after_s']['max']} s after zoo-compile at most")
    print("RSS, MiB, by round: " + ", ".join(f"{key} {sizes}" for key, sizes in results["rss_mib"].items()))
    print(save_report("live_addition", args, machine, results))


def run(zoo: Path, base: Path, comes: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one server; figures of a phase are the largest of all rounds."""
    compile_zoo(zoo, f"base={base}")
    options = ["--kv-cache-gb", "0.0625"]  # the pool is soon full, so that it hides nothing
    options += ["--threads", str(args.threads)] if args.threads else []
    options += ["--precision", args.precision] if args.precision else []
    with Server(zoo, *options) as server:
        engine = engine_pid(server)
        streams = [Stream(server.http, args.context) for _ in range(args.streams)]
        watch = Watch(engine)
        rounds = [one_round(server, zoo, comes, watch, args.seconds) for _ in range(1 + args.repeats)][1:]
        for stream in streams:
            stream.stop()
        watch.stop()
    gaps = [gap for stream in streams for gap in stream.gaps()]
    phases = {}
    for index, phase in enumerate(PHASES):
        times = [(each["times"][index], each["times"][index + 1]) for each in rounds]
        within = [b - a for a, b in gaps for begin, end in times if a < end and b > begin]
        seen = [size for when, size in watch.samples for begin, end in times if begin <= when < end]
        phases[phase] = {
            "seconds": round(float(np.median([end - begin for begin, end in times])), 3),
            "longest_gap_ms": round(max(within, default=0.0) * 1e3, 1),
            "peak_rss_mib": max(seen, default=0) >> 20,
        }
    return {
        "phases": phases,
        "streamed_tokens": sum(len(own) for stream in streams for own in stream.times),
        "median_gap_ms": round(float(np.median([b - a for a, b in gaps])) * 1e3, 1),
        "answers_after_s": summary([each["answers_after_s"] for each in rounds]),
        "ensemble_after_s": summary([each["ensemble_after_s"] for each in rounds]),
        "gone_after_s": summary([each["gone_after_s"] for each in rounds]),
        "rss_mib": {key: [each["rss"][key] >> 20 for each in rounds] for key in ("before", "with", "after")},
    }


def one_round(server: Server, zoo: Path, comes: Path, watch: Watch, rest_s: float) -> dict[str, Any]:
    """The ends of its phases, seconds, and resident bytes."""
    times, rss = [time.monotonic()], {}

    def ended() -> float:
        times.append(time.monotonic())
        return times[-1]

    time.sleep(rest_s)
    rss["before"] = watch.now()
    ended()
    compile_zoo(zoo, f"new={comes}")
    compiled = ended()
    until(lambda: status(server.http, "blockzoo", {"model": "new"}) == 200)
    answers = ended() - compiled
    until(lambda: status(server.http, "new", {}) == 200)
    ensemble = time.monotonic() - compiled
    time.sleep(rest_s)
    rss["with"] = watch.now()
    compile_zoo(zoo, "--remove", "new")
    removed = ended()
    until(lambda: status(server.http, "blockzoo", {"model": "new"}) != 200)
    until(lambda: status(server.http, "new", {}) != 200)
    gone = ended() - removed
    time.sleep(rest_s)
    rss["after"] = watch.now()
    ended()
    return {
        "times": times,
        "rss": rss,
        "answers_after_s": answers,
        "ensemble_after_s": ensemble,
        "gone_after_s": gone,
    }


class Stream(threading.Thread):
    """A client that lets the base stream all the time."""

    def __init__(self, port: int, num_tokens: int) -> None:
        super().__init__(daemon=True)
        self._port, self._num_tokens = port, num_tokens
        self._over = threading.Event()
        self.times: list[list[float]] = []
        """Of the tokens of each request."""
        self.start()

    def run(self) -> None:
        """Ask, again and again."""
        while not self._over.is_set():
            own: list[float] = []
            self.times.append(own)
            for _ in events(self._port, "blockzoo", {"model": "base", "max_tokens": self._num_tokens}):
                own.append(time.monotonic())

    def stop(self) -> None:
        """Return when the last request has ended."""
        self._over.set()
        self.join(120)

    def gaps(self) -> list[tuple[float, float]]:
        """Pairs of neighbouring tokens of a request."""
        return [pair for own in self.times for pair in pairwise(own)]


class Watch(threading.Thread):
    """Samples the resident memory of a process."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._over = pid, threading.Event()
        self.samples: list[tuple[float, int]] = []
        self.start()

    def run(self) -> None:
        """Sample until it is stopped."""
        while not self._over.wait(0.05):
            self.samples.append((time.monotonic(), self.now()))

    def now(self) -> int:
        """Resident bytes."""
        return memory_of(self._pid)["rss"]

    def stop(self) -> None:
        """Sample no more."""
        self._over.set()
        self.join(10)


def compile_zoo(zoo: Path, *arguments: str) -> None:
    tool = [str(Path(sys.executable).parent / "zoo-compile"), *arguments, "-o", str(zoo)]
    subprocess.run([*tool, "--no-verify", "--no-profile"], check=True, capture_output=True)


def engine_pid(server: Server) -> int:
    """The process of the engine model of a server."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "/blockzoo/1/model.py" in command and parents(folder.name) & {str(server.pid)}:
                return int(folder.name)
    raise SystemExit("the engine's process was not found")


def parents(pid: str) -> set[str]:
    found: set[str] = set()
    while pid not in ("0", "1"):
        found.add(pid)
        pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return found


def events(port: int, model: str, inputs: dict[str, Any]) -> Any:
    """The events of a stream, as they come."""
    body = {"text_input": PROMPT, "stream": True, "sampling_parameters": '{"ignore_eos": true}', **inputs}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(body))
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                yield line
    finally:
        connection.close()


def status(port: int, model: str, inputs: dict[str, Any]) -> int:
    """Of a request for one token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        body = {"text_input": PROMPT, "max_tokens": 1, **inputs}
        connection.request("POST", f"/v2/models/{model}/generate", json.dumps(body))
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {timeout_s:g} s")
        time.sleep(0.02)


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median": round(float(np.median(seconds)), 3), "max": round(max(seconds), 3)}


if __name__ == "__main__":
    main()
