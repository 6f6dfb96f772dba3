"""What the OpenAI endpoint costs: the same streams over it and over gRPC, both from perf_analyzer.

    python -m benchmarks.openai_load --shape 110m

Eight tenants, completions of equal prompts and lengths, 64 streams at once in a closed loop; the sides take
turns on one server. No answer may end early, so that all have the same length.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, machine_facts, print_table, save_report
from benchmarks.demo_server import Server
from benchmarks.families import make_family
from benchmarks.perf_analyzer import request_times, stream, stream_openai

Request = dict[str, Any]


def main() -> int:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=5)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="least length of one measurement")
    args = parser.parse_args()
    machine = machine_facts()
    family = make_family(args.workdir, args.shape, 8)
    requests = _requests(family.tenants, args.prompt_tokens, args.new_tokens)
    options = ["--kv-cache-gb", "1", "--max-num-seqs", str(args.concurrency)]
    options += [] if args.precision is None else ["--precision", args.precision]
    options += [] if args.threads is None else ["--threads", str(args.threads)]
    with Server(family.zoo().path, *options, openai=True) as server:
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "openai": lambda: _openai(server, requests, args),
            "grpc": lambda: _grpc(server, requests, args),
        }
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(1 + args.repeats):  # the first is not counted
            names = list(sides) if number % 2 else list(sides)[::-1]
            rounds.append({name: sides[name]() for name in names})
    results = _results(rounds[1:])
    _print(results, args.concurrency)
    print("wrote", save_report("openai_load", args, machine, results))
    return 0


def _requests(tenants: list[str], prompt_tokens: int, new_tokens: int) -> list[Request]:
    """With prompts that no other shares, so that the prefix cache plays no part."""
    rng = np.random.default_rng(0)
    return [
        {
            "model": tenant,
            "prompt": "".join(chr(c) for c in rng.integers(97, 123, prompt_tokens)),
            "max_tokens": new_tokens,
        }
        for tenant in tenants
        for _ in range(32)
    ]


def _grpc(server: Server, requests: list[Request], args: argparse.Namespace) -> dict[str, float]:
    data = [
        {
            "model": [request["model"]],
            "text_input": [request["prompt"]],
            "max_tokens": [request["max_tokens"]],
            "min_length": [request["max_tokens"]],
            "temperature": [0.0],
            "stream": [True],
        }
        for request in requests
    ]
    _, profile = stream(server.grpc, data, args.concurrency, args.seconds)
    return _figures(request_times(profile), args)


def _openai(server: Server, requests: list[Request], args: argparse.Namespace) -> dict[str, float]:
    extra = {"temperature": 0, "ignore_eos": True, "stream": True}
    bodies = [{**request, **extra} for request in requests]
    pid = _openai_pid(server)
    before = _cpu_seconds(pid)
    _, profile = stream_openai(server.openai, "v1/completions", bodies, args.concurrency, args.seconds)
    sent = request_times(profile)
    cpu_ms = 1e3 * (_cpu_seconds(pid) - before)
    return {**_figures(sent, args), "openai_cpu_ms_per_token": cpu_ms / (len(sent) * args.new_tokens)}


def _figures(requests: list[tuple[int, list[int]]], args: argparse.Namespace) -> dict[str, float]:
    """Of those of `request_times` that came to their end in one measurement."""
    # texts may come together, but a stream that was cut off has far fewer
    whole = [(sent, times) for sent, times in requests if len(times) > args.new_tokens // 2]
    seconds = np.array([times[-1] - sent for sent, times in whole]) / 1e9
    first = np.array([times[0] - sent for sent, times in whole]) / 1e9
    return {
        "requests": len(whole),
        "tokens_per_s": args.concurrency * args.new_tokens / float(seconds.mean()),
        "ttft_p50_ms": float(np.percentile(first, 50)) * 1e3,
        "ttft_p99_ms": float(np.percentile(first, 99)) * 1e3,
        "request_p50_ms": float(np.percentile(seconds, 50)) * 1e3,
        "request_p99_ms": float(np.percentile(seconds, 99)) * 1e3,
    }


def _openai_pid(server: Server) -> int:
    """The launcher's child that is the endpoint."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == server.pid and b"blockzoo.server_config.openai.server" in command:
                return int(folder.name)
    raise SystemExit("zoo-serve has no process of the OpenAI endpoint")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _results(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians of the rounds with their spread, and the ratio of the sides round by round."""
    ratios = [sides["openai"]["tokens_per_s"] / sides["grpc"]["tokens_per_s"] for sides in rounds]
    results: dict[str, Any] = {
        side: {name: _spread([sides[side][name] for sides in rounds]) for name in rounds[0][side]}
        for side in ("openai", "grpc")
    }
    return {**results, "tokens_per_s_to_grpc": _spread(ratios)}


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = (float(f"{v:.4g}") for v in np.percentile(values, (10, 50, 90)))
    return {"median": middle, "p10": low, "p90": high}


def _print(results: dict[str, Any], concurrency: int) -> None:
    columns = ("side", "tokens/s", "TTFT p50", "p99", "request p50", "p99", "to gRPC", "CPU ms a token")
    names = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "request_p50_ms", "request_p99_ms")
    rows: list[tuple[object, ...]] = []
    for side in ("openai", "grpc"):
        own = results[side]
        ratio = results["tokens_per_s_to_grpc"]["median"] if side == "openai" else 1.0
        cpu = own["openai_cpu_ms_per_token"]["median"] if side == "openai" else ""
        rows.append((side, *(own[name]["median"] for name in names), ratio, cpu))
    print_table(f"{concurrency} streams of eight tenants (ms, medians of rounds)", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
