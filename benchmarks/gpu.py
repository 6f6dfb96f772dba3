"""What an NVIDIA GPU does with chains, as a share of what the same GPU can do: one command, one JSON file.

    python3 -m benchmarks.gpu [--shapes 0.5b,8b] [--out FOLDER]            on a GPU: torch and triton
    python3 -m benchmarks.gpu --shapes tiny --device cpu                   dry run, no figure means anything

Random weights, made on the device. Ceilings (copy and read bandwidth, matrix rate) are measured first; every
time is the median of repeated runs after warm-up, with the device waited for. Needs nothing but this source
tree, torch, triton, numpy, safetensors and tokenizers.

On a GPU each part runs in a process of its own, so that one that fails, faults or takes too long (`--minutes`
in all) leaves the others alone; what is known is in the JSON file after each figure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.source_tree import use_source_tree

use_source_tree()

import torch  # noqa: E402

from benchmarks.gpu_parts import OWN, Bench, Facts, ceilings  # noqa: E402
from benchmarks.gpu_peers import PEERS  # noqa: E402
from benchmarks.random_chains import SHAPES  # noqa: E402

CEILINGS = "ceilings"
PARTS: dict[str, Callable[[Bench, str, Facts], None]] = {CEILINGS: ceilings} | OWN | PEERS
_PACKAGES = ("torch", "triton", "tensorrt", "tensorrt_rtx", "transformers", "flashinfer-python", "numpy")
_FACT = "fact: "  # begins what a part's process tells
_PART_SECONDS = 300.0  # at most of a part


class Told(dict[str, Any]):
    """Facts that are told to somebody as they come."""

    def __init__(self, tell: Callable[[str, Any], None]) -> None:
        super().__init__()
        self._tell = tell

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._tell(name, value)

    def __ior__(self, other: Any) -> Told:  # type: ignore[override,misc]
        for name, value in dict(other).items():
            self[name] = value
        return self


def run_part(bench: Bench, shape: str, name: str, tell: Callable[[str, Any], None]) -> None:
    """Run a part here and tell its facts; how it failed is one of them."""
    facts = Told(tell)
    try:
        PARTS[name](bench, shape, facts)
    except Exception as error:  # one part's failure is a result too
        traceback.print_exc()
        facts["error"] = f"{type(error).__name__}: {error}"
    bench.free()


def run_part_apart(
    args: argparse.Namespace,
    bench: Bench,
    shape: str,
    name: str,
    limit: float,
    tell: Callable[[str, Any], None],
) -> None:
    """The same in a process of its own, which is ended after `limit` seconds."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--shapes", shape, "--parts", name]
    command += ["--device", args.device, "--repeats", str(args.repeats)]
    command += ["--told-ceilings", json.dumps(bench.ceilings)]
    command += ["--tensorrt-llm", args.tensorrt_llm] if args.tensorrt_llm else []
    late = threading.Event()
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root, start_new_session=True
    ) as process:

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(_FACT):
                    ((fact, value),) = json.loads(line.removeprefix(_FACT)).items()
                    tell(fact, value)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
    if late.is_set():
        tell("error", f"ended after {limit:.0f} s")
    elif process.returncode:
        tell("error", f"its process ended with {process.returncode}")


def machine(device: str) -> Facts:
    """What the figures were taken on."""
    facts: Facts = {"device": device, "time": time.strftime("%F %T"), "python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="0.5b,8b", help=f"of {', '.join(SHAPES)} (0.5b,8b)")
    parts = ",".join(name for name in PARTS if name != CEILINGS)
    parser.add_argument("--parts", default=parts, help=f"all: {parts}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=15.0, help="of all parts together (15)")
    parser.add_argument("--apart", action="store_true", help="a process for each part, as always on a GPU")
    parser.add_argument(
        "--tensorrt-llm", metavar="PYTHON", help="interpreter of TensorRT-LLM's environment (this one)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--told-ceilings", help=argparse.SUPPRESS)  # of the process that runs one part
    args = parser.parse_args(argv)
    for given, known in ((args.shapes, SHAPES), (args.parts, PARTS)):
        if unknown := set(given.split(",")) - known.keys():
            parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    return args


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    args = arguments(argv)
    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no GPU; --shapes tiny --device cpu is a dry run", file=sys.stderr)
        return 2
    bench = Bench(args.device, args.repeats, args.tensorrt_llm)
    if args.told_ceilings:
        bench.ceilings = json.loads(args.told_ceilings)
        run_part(bench, args.shapes, args.parts, lambda k, v: print(_FACT + json.dumps({k: v}), flush=True))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{args.device.replace(':', '')}.json"
    report: Facts = machine(args.device)

    def run(name: str, shape: str, facts: Facts) -> None:
        def tell(fact: str, value: Any) -> None:
            facts[fact] = value
            path.write_text(json.dumps(report, indent=1))  # what there is, whatever comes next

        began, left = time.monotonic(), args.minutes * 60 - (time.monotonic() - start)
        if left <= 0:
            tell("skipped", f"the {args.minutes:g} minutes were over")
        elif on_gpu or args.apart:
            run_part_apart(args, bench, shape, name, min(left, _PART_SECONDS), tell)
        else:
            run_part(bench, shape, name, tell)
        print(f"{shape} {name} ({time.monotonic() - began:.0f} s): {json.dumps(facts)}", flush=True)

    shapes = args.shapes.split(",")
    bench.ceilings = report[CEILINGS] = {}
    run(CEILINGS, shapes[0], bench.ceilings)
    # a part of all shapes before the next part: what matters most comes first
    for name in args.parts.split(","):
        for shape in shapes:
            run(name, shape, report.setdefault(shape, {}).setdefault(name, {}))
    print(f"wrote {path}")
    return int("error" in bench.ceilings)


if __name__ == "__main__":
    sys.exit(main())
