"""What the front costs: perf_analyzer and genai-perf against zoo-serve, beside the bare engine.

    python -m benchmarks.serving --shape 110m

Eight tenants on the shared endpoint, gRPC streaming, closed loop at several concurrencies; the same
requests through an EngineThread in this process, in turn with the server. No request may end early,
so that all have the same length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, machine_facts, print_table, save_report
from benchmarks.demo_server import Server
from benchmarks.families import make_family
from benchmarks.perf_analyzer import OPERATOR_KEY, perf_analyzer_command, request_times, stream
from blockzoo.runtime import EngineConfig, EngineThread, RequestOutput, SamplingParams

Timeline = list[float]  # seconds: start of the request, then each of its tokens


def main() -> int:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=6.0, help="least length of one measurement")
    parser.add_argument("--genai-perf", help="folder of a venv with genai-perf; made if missing")
    args = parser.parse_args()
    machine = machine_facts()
    family = make_family(args.workdir, args.shape, 8)
    zoo = family.zoo()
    requests = _requests(family.tenants, args.prompt_tokens, args.new_tokens)
    config = EngineConfig(precision=args.precision, num_threads=args.threads, kv_cache_bytes=1 << 30)
    engine = EngineThread(zoo.path, config)
    results: dict[str, Any] = {"perf_analyzer": {}}
    with Server(zoo.path, "--kv-cache-gb", "1") as server:
        for concurrency in args.concurrency:
            served: list[Timeline] = []
            direct: list[Timeline] = []
            for _ in range(args.repeats):
                served += _perf_analyzer(server, requests, concurrency, args.seconds)
                direct += _direct(engine, requests, concurrency, args.seconds)
            row = {"served": _summary(served, concurrency), "engine": _summary(direct, concurrency)}
            of_a_token = 1 - row["engine"]["token_ms"]["p50"] / row["served"]["token_ms"]["p50"]
            row["front_share_of_a_token"] = round(of_a_token, 3)
            results["perf_analyzer"][str(concurrency)] = row
        engine.close()
        if args.genai_perf:
            results["genai_perf"] = _genai_perf(
                args, server, family.tenants[0], family.checkpoint("tenant-0")
            )
    _print(results["perf_analyzer"])
    print("wrote", save_report("serving", args, machine, results))
    return 0


def _requests(tenants: list[str], prompt_tokens: int, new_tokens: int) -> list[dict[str, Any]]:
    """Requests with prompts that no other shares, so that the prefix cache plays no part."""
    rng = np.random.default_rng(0)
    return [
        {
            "model": tenant,
            "text_input": "".join(chr(c) for c in rng.integers(97, 123, prompt_tokens)),
            "max_tokens": new_tokens,
        }
        for tenant in tenants
        for _ in range(8)
    ]


def _perf_analyzer(
    server: Server, requests: list[dict[str, Any]], concurrency: int, seconds: float
) -> list[Timeline]:
    data = [
        {
            **{name: [value] for name, value in request.items()},
            "temperature": [0.0],
            "stream": [True],
            "min_length": [request["max_tokens"]],
        }
        for request in requests
    ]
    _, profile = stream(server.grpc, data, concurrency, seconds)
    new_tokens = requests[0]["max_tokens"]
    return [
        [stamp / 1e9 for stamp in (sent, *times[:new_tokens])]
        for sent, times in request_times(profile)
        if len(times) >= new_tokens  # cut off at the end of the measurement
    ]


def _direct(
    engine: EngineThread, requests: list[dict[str, Any]], concurrency: int, seconds: float
) -> list[Timeline]:
    """A closed loop of `concurrency` callers on the engine itself."""
    timelines: list[Timeline] = []
    deadline = time.perf_counter() + seconds
    counter = iter(range(10**9))

    def caller() -> None:
        while time.perf_counter() < deadline:
            index = next(counter)
            request = requests[index % len(requests)]
            params = SamplingParams(max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True)
            prompt = f"{request['text_input']}{index}"
            timelines.append(_ask(engine, f"direct-{time.monotonic_ns()}", request["model"], prompt, params))

    callers = [threading.Thread(target=caller) for _ in range(concurrency)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    return timelines


def _ask(engine: EngineThread, request_id: str, model: str, prompt: str, params: SamplingParams) -> Timeline:
    done, stamps = threading.Event(), [time.perf_counter()]

    def on_output(output: RequestOutput) -> None:
        stamps.append(time.perf_counter())
        if output.finished:
            done.set()

    engine.submit(request_id, model, prompt, params, on_output)
    done.wait()
    return stamps


def _summary(timelines: list[Timeline], concurrency: int) -> dict[str, Any]:
    first = np.array([stamps[1] - stamps[0] for stamps in timelines])
    between = np.concatenate([np.diff(stamps[1:]) for stamps in timelines])
    # of a request: responses may reach the client in bunches, which moves single gaps but not their mean
    per_token = np.array([(stamps[-1] - stamps[1]) / (len(stamps) - 2) for stamps in timelines])
    whole = np.array([stamps[-1] - stamps[0] for stamps in timelines])
    tokens = sum(len(stamps) - 1 for stamps in timelines) / len(timelines)
    return {
        "requests": len(timelines),
        "tokens_per_s": round(concurrency * tokens / float(whole.mean()), 1),
        "ttft_ms": _percentiles(first),
        "token_ms": _percentiles(per_token),
        "inter_token_ms": _percentiles(between),
        "request_ms": _percentiles(whole),
    }


def _percentiles(seconds: np.ndarray) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(seconds, p)) * 1e3, 3) for p in (50, 90, 99)}


def _genai_perf(args: argparse.Namespace, server: Server, tenant: str, tokenizer: Path) -> dict[str, Any]:
    """One run of genai-perf in an environment of its own (it wants numpy 2)."""
    venv = Path(args.genai_perf).absolute()
    if not (venv / "bin/genai-perf").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin/pip"), "install", "-q", "genai-perf==0.0.16"], check=True)
    (perf_analyzer,), env = perf_analyzer_command()
    env["PATH"] = f"{venv / 'bin'}:{Path(perf_analyzer).parent}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        (venv / "bin/perf_analyzer").unlink(missing_ok=True)  # PyPI's package of that name is empty
        command = [str(venv / "bin/genai-perf"), "profile", "-m", tenant, "--endpoint-type", "kserve"]
        command += ["--backend", "tensorrtllm", "--streaming", "-u", f"127.0.0.1:{server.grpc}"]
        command += ["--tokenizer", str(tokenizer.absolute()), "--concurrency", "8", "--num-prompts", "32"]
        command += ["--synthetic-input-tokens-mean", str(args.prompt_tokens)]
        command += ["--output-tokens-mean", str(args.new_tokens), "--request-count", "48"]
        command += ["--artifact-dir", folder, "-H", f"triton-grpc-protocol-locked:{OPERATOR_KEY}"]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=600)
        exported = sorted(Path(folder).rglob("profile_export_genai_perf.json"))
        if done.returncode or not exported:
            raise SystemExit(f"genai-perf failed ({done.returncode}):\n{done.stdout}{done.stderr}")
        report: dict[str, Any] = json.loads(exported[0].read_text())
    print(done.stdout)
    return {key: value for key, value in report.items() if isinstance(value, dict) and "unit" in value}


def _print(rows: dict[str, Any]) -> None:
    columns = ("concurrency", "tokens/s", "TTFT p50", "p99", "token p50", "p99", "gap p99", "engine", "front")
    table = []
    for concurrency, row in rows.items():
        served, alone = row["served"], row["engine"]["token_ms"]["p50"]
        ttft, token, gap = served["ttft_ms"], served["token_ms"], served["inter_token_ms"]["p99"]
        share = f"{row['front_share_of_a_token']:.1%}"
        cells = (
            served["tokens_per_s"],
            ttft["p50"],
            ttft["p99"],
            token["p50"],
            token["p99"],
            gap,
            alone,
            share,
        )
        table.append((concurrency, *cells))
    print_table("zoo-serve under perf_analyzer, gRPC streaming, eight tenants (ms)", columns, table)


if __name__ == "__main__":
    sys.exit(main())
