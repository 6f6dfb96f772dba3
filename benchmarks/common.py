"""What the benchmarks have in common: arguments, interleaved timing, facts of the machine, reports."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.families import SHAPES

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
_PACKAGES = ("blockzoo", "openvino", "openvino-genai", "numpy")
_PLACES = ("out", "workdir", "llama", "zoo", "family")  # where files lie is nobody's business


def arguments(description: str, *, shape: str, repeats: int) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes, with this benchmark's defaults.

    A `shape` that is none of `SHAPES` names the only models that the benchmark has.
    """
    parser = argparse.ArgumentParser(description=description)
    shapes = sorted(SHAPES) if shape in SHAPES else [shape]
    parser.add_argument("--shape", choices=shapes, default=shape, help=f"of the models ({shape})")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds over all sides ({repeats})")
    parser.add_argument("--precision", choices=("bf16", "f32"), help="default: bf16 where the CPU has it")
    parser.add_argument("--threads", type=int, help="compute threads of every side; default: OpenVINO's")
    out = Path("benchmarks/results")
    parser.add_argument("--out", type=Path, default=out, help=f"folder for the report ({out})")
    workdir = Path("out/bench")
    parser.add_argument("--workdir", type=Path, default=workdir, help=f"for checkpoints ({workdir})")
    return parser


def add_bits(parser: argparse.ArgumentParser) -> None:
    """The arguments of benchmarks that compare in any number of bits, and with llama.cpp."""
    parser.add_argument("--weights", choices=("int8", "int4"), help="of all sides; default: as given, bf16")
    parser.add_argument("--kv-precision", choices=("u8",), help="of ours and GenAI (as it is served)")
    parser.add_argument(
        "--int8-activations",
        action="store_true",
        help="round ours and GenAI's beside quantized weights where AMX is too (with "
        "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 that is not used)",
    )
    parser.add_argument(
        "--llama", type=Path, help="environment with llama.cpp (python -m benchmarks.peers.llama FOLDER)"
    )


def genai_missing() -> str | None:
    """Why the sides of OpenVINO GenAI cannot run here, or None."""
    for package in ("openvino-genai", "openvino-tokenizers", "transformers"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{package} is not installed (pip install -e .[bench])"
    return None


# ---- timing


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds that one side took, by round; rounds of all sides are neighbours in time."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(np.concatenate(self.rounds)))

    def summary(self) -> dict[str, float]:
        """Median and spread in milliseconds."""
        low, middle, high = np.percentile(np.concatenate(self.rounds), (10, 50, 90)) * 1e3
        count = sum(map(len, self.rounds))
        return {"median_ms": _round(middle), "p10_ms": _round(low), "p90_ms": _round(high), "samples": count}

    def ratio_to(self, other: Samples) -> dict[str, float]:
        """Time relative to another side's, round by round: what disturbs a round disturbs both."""
        ratios = [np.median(a) / np.median(b) for a, b in zip(self.rounds, other.rounds, strict=True)]
        low, middle, high = np.percentile(ratios, (10, 50, 90))
        return {"ratio": _round(middle), "p10": _round(low), "p90": _round(high)}


def interleave(
    sides: Mapping[str, Callable[[], Sequence[float]]], rounds: int, untimed_rounds: int = 1
) -> dict[str, Samples]:
    """Let the sides take turns; each call of a side gives its samples in seconds.

    Every round starts with another side, so that none always follows the same one.
    """
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in sides}
    names = list(sides)
    for index in range(untimed_rounds + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            samples = tuple(sides[name]())
            if index >= untimed_rounds:
                taken[name].append(samples)
    return {name: Samples(tuple(rounds_of)) for name, rounds_of in taken.items()}


def timed(run: Callable[[], object], times: int, untimed: int = 0) -> list[float]:
    """Seconds of each of `times` calls, after `untimed` ones that refill the caches."""
    for _ in range(untimed):
        run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def _round(value: float) -> float:
    return float(f"{value:.4g}")


# ---- reports


def machine_facts() -> dict[str, Any]:
    """The hardware and the versions behind a number."""
    cpuinfo = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    cpu = {key.strip(): value.strip() for key, value in cpuinfo.items()}
    flags = set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "held_to": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save_report(name: str, args: argparse.Namespace, machine: Mapping[str, Any], results: Any) -> Path:
    """Put the results of a shape into `<out>/<name>.json`, of int8 into `<name>_int8.json` (with a group size
    `<name>_int8_64.json`, with KV in 8 bits `<name>_int8_kv_u8.json`, where oneDNN may not use all of the CPU
    `..._held.json`); those of other shapes there stay."""
    if getattr(args, "weights", None) in ("int8", "int4", "auto"):
        name = f"{name}_{args.weights}"
        if getattr(args, "group_size", None) is not None:
            name = f"{name}_{args.group_size}"
    if getattr(args, "kv_precision", None) == "u8":
        name = f"{name}_kv_u8"
    if machine.get("held_to"):
        name = f"{name}_held"
    path: Path = args.out / f"{name}.json"
    report: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"benchmark": name, "shapes": {}}
    )
    report["shapes"][args.shape] = {
        "machine": machine,
        "arguments": {k: v for k, v in sorted(vars(args).items()) if k not in _PLACES},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.rename(path)
    return path


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output; the first column is left-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=140).print(table)
