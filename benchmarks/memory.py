"""Resident memory of eight tenants: one process that shares their blocks, against a GenAI pipeline for each.

    python -m benchmarks.memory [--shape 110m]

Every side runs in new processes, loads its models, serves one request of every tenant (512 tokens of
prompt, 8 generated) and is then looked at from outside:

    blockzoo                   our LLMEngine
    genai, one process         a GenAI pipeline for each tenant in one process
    genai, a process each      a GenAI pipeline for each tenant, each in its own process

PSS is the memory the kernel keeps for the processes, shared pages counted once; `file` is the part that
lies over files and can be read again, `anonymous` the rest; `unloaded` is the PSS of the same processes
before they load a model. Beside ours stands what it cannot do without: the bytes of the distinct blocks,
the pages in use, and the engines' scratch (what they give back on request).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import arguments, genai_missing, machine_facts, print_table, save_report
from benchmarks.families import Family, make_family
from benchmarks.sides import EngineSide, Settings
from blockzoo.engines.openvino import OpenVINOEngines

_FIELDS = {"rss": "Rss", "peak_rss": "VmHWM", "pss": "Pss", "anonymous": "Pss_Anon", "file": "Pss_File"}
_GENERATED = 8


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=1)
    parser.add_argument("--tenants", type=int, default=8, help="(8)")
    parser.add_argument("--own-layers", type=int, default=2, help="last layers that differ (2)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a prompt (512)")
    parser.add_argument("--child", choices=("blockzoo", "genai"), help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    family = make_family(args.workdir, args.shape, args.tenants, args.own_layers)
    settings = Settings(
        precision=OpenVINOEngines(args.precision).precision,
        num_threads=args.threads,
        max_seqs=args.tenants if args.only is None and args.child == "blockzoo" else 1,
        context=args.context,
        max_tokens=args.context,
        longest_prompt=args.context,
    )
    if args.child:
        _serve(args.child, family, settings, args.only)
    else:
        _report(args, family, settings)


# ---- the measuring process


def _report(args: argparse.Namespace, family: Family, settings: Settings) -> None:
    machine = machine_facts()
    zoo = family.zoo()
    sides: dict[str, list[list[str]]] = {"blockzoo": [["--child", "blockzoo"]]}
    missing = genai_missing()
    if missing:
        print(f"without genai: {missing}")
    else:
        from benchmarks.peers.genai import ir_folder

        for tenant in family.tenants:
            ir_folder(family, tenant)
        sides["genai, one process"] = [["--child", "genai"]]
        sides["genai, a process each"] = [
            ["--child", "genai", "--only", str(i)] for i in range(family.num_tenants)
        ]
    results: dict[str, Any] = {"precision": settings.precision}
    for name, children in sides.items():
        runs = [_measure(children) for _ in range(args.repeats)]
        results[name] = {field: round(median(run[field] for run in runs)) for field in runs[0]}
    ours = results["blockzoo"]
    needed = {"unique_blocks": sum(block.num_bytes for block in zoo.manifest.blocks.values())}
    needed |= {name: ours.pop(name) for name in ("pages_in_use", "scratch")}
    needed["sum"] = sum(needed.values())
    ours |= {"needed": needed, "pss_to_needed": round(ours["pss"] / needed["sum"], 3)}
    fields = (*_FIELDS, "unloaded")
    rows = []
    for name in sides:
        results[name]["pss_to_blockzoo"] = round(results[name]["pss"] / ours["pss"], 3)
        values = [round(results[name][field] / 2**20) for field in fields]
        rows.append((name, *values, results[name]["pss_to_blockzoo"]))
    print_table(f"{args.tenants} tenants, MiB", ("", *fields, "to blockzoo"), rows)
    print_table("needed by blockzoo, MiB", ("", "MiB"), [(k, round(v / 2**20)) for k, v in needed.items()])
    print(f"pss / needed: {ours['pss_to_needed']}")
    print(save_report("memory", args, machine, results))


def _measure(children: Sequence[Sequence[str]]) -> dict[str, int]:
    """Sums over the child processes when all have served: memory, and what they say of themselves."""
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]]
    processes: list[subprocess.Popen[str]] = []
    total: Counter[str] = Counter()
    try:
        for arguments_of in children:
            process = subprocess.Popen(
                [*command, *arguments_of], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            processes.append(process)
            total.update(json.loads(_line(process)))
        for process in processes:
            total.update(memory_of(process.pid))
        for process in processes:
            assert process.stdin is not None, "asked for a pipe"
            process.stdin.write("\n")
            process.stdin.flush()
            total.update(json.loads(_line(process)))
            process.wait()
    finally:
        for process in processes:
            process.kill()
    return dict(total)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None, "asked for a pipe"
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{' '.join(map(str, process.args))} ended with status {process.wait()}")  # type: ignore[arg-type]
    return line


def memory_of(pid: int | str) -> dict[str, int]:
    """Bytes by field of `_FIELDS`."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    lines += Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return {field: kib[name] * 1024 for field, name in _FIELDS.items()}


# ---- a measured process


def _serve(side: str, family: Family, settings: Settings, only: int | None) -> None:
    tenants = family.tenants if only is None else [family.tenants[only]]
    unloaded = memory_of("self")["pss"]
    if side == "blockzoo":
        engine = EngineSide(family.zoo(), tenants, settings)
        engine.generate_each(_GENERATED)
        _say({"unloaded": unloaded})
        sys.stdin.readline()
        _say({"pages_in_use": engine.pages_in_use(), "scratch": _given_back(engine)})
    else:
        from benchmarks.peers.genai import GenAISide, ir_folder

        pipelines = [GenAISide(ir_folder(family, tenant), settings) for tenant in tenants]
        for pipeline in pipelines:
            pipeline.decode(_GENERATED)
        _say({"unloaded": unloaded})
        sys.stdin.readline()
        _say({})


def _say(facts: dict[str, int]) -> None:
    print(json.dumps(facts), flush=True)


def _given_back(engine: EngineSide) -> int:
    """Bytes that the engines' scratch takes: what is gone once they have released it."""
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    trim(0)
    before = memory_of("self")["pss"]
    engine.release_memory()
    trim(0)
    return before - memory_of("self")["pss"]


if __name__ == "__main__":
    main()
