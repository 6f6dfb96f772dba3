"""What it costs and gives to spread a zoo's blocks over workers, against one process.

    python -m benchmarks.workers [--shape 110m] [--context 512]

Engines whole, with scheduler and greedy sampling, in turns:

    one worker     engines in one other process, against engines here; the same threads
    two workers    a thread each, against one process with two threads; prompts and decode steps
    two in turn    with two threads each, so that steps are not cut and each has both cores in its turn
    a kill         of one of two workers under streams of the demo family: seconds until tokens come again
    a small limit  a zoo that does not fit into one worker's memory: whether answers are those of one process
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.common import (
    Samples,
    arguments,
    interleave,
    machine_facts,
    print_table,
    save_report,
    timed,
)
from benchmarks.families import Family, make_family
from benchmarks.sides import EngineSide, Settings, decode_turn
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.zoo.demo.assemble import assemble

BATCHES = (1, 8, 32)
CONTEXT = 512
STEPS = 5
GREEDY = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=6)
    parser.add_argument(
        "--context", type=int, default=CONTEXT, help=f"before decode steps; also tokens of a step ({CONTEXT})"
    )
    parser.add_argument(
        "--cases", nargs="*", default=["one", "two", "faults"], choices=("one", "two", "faults")
    )
    args = parser.parse_args()
    machine = machine_facts()
    family = make_family(args.workdir, args.shape, 1)
    results: dict[str, Any] = {}
    threads = args.threads or len(os.sched_getaffinity(0))
    if "one" in args.cases:
        results |= _compare(family, args, {"local": (None, threads), "one worker": (1, threads)})
    if "two" in args.cases:
        results |= _compare(family, args, {"one process": (None, 2), "two workers": (2, 1)})
        results |= _compare(family, args, {"one process": (None, 2), "two in turn": (2, 2)})
    _print(results)
    if "faults" in args.cases:
        results |= _faults(args.repeats)
    print(save_report("workers", args, machine, results))


def _compare(
    family: Family, args: argparse.Namespace, ways: Mapping[str, tuple[int | None, int]]
) -> dict[str, Any]:
    """Prompts and decode steps of two ways: workers, and threads of each process."""
    zoo, context = family.zoo(), args.context
    sides = {}
    for name, (workers, threads) in ways.items():
        settings = Settings(
            precision=OpenVINOEngines(args.precision).precision,
            num_threads=threads,
            max_seqs=max(BATCHES),
            context=context,
            max_tokens=context,
            longest_prompt=4 * context,
        )
        sides[name] = EngineSide(zoo, family.tenants, settings, workers=workers)
    title = " / ".join(reversed(list(ways)))
    results: dict[str, Any] = {}
    for length in (context, 4 * context):
        turns = {name: partial(timed, partial(side.prefill, length), 1) for name, side in sides.items()}
        results[f"{title}: prefill {length}"] = _case(interleave(turns, args.repeats))
    for batch in BATCHES:
        turns = {name: partial(decode_turn, side, batch, STEPS) for name, side in sides.items()}
        results[f"{title}: decode, batch {batch}"] = _case(interleave(turns, args.repeats))
    for side in sides.values():
        side.close()
    return results


def _case(samples: Mapping[str, Samples]) -> dict[str, Any]:
    """Besides medians the least times, which other work has not disturbed."""
    first, second = samples.values()
    least = {name: float(np.concatenate(taken.rounds).min()) for name, taken in samples.items()}
    found: dict[str, Any] = {
        name: taken.summary() | {"least_ms": round(1e3 * least[name], 2)} for name, taken in samples.items()
    }
    before, after = least.values()
    return found | {"time": second.ratio_to(first) | {"least": round(after / before, 3)}}


def _print(results: Mapping[str, Any]) -> None:
    rows = []
    for case, found in results.items():
        (_, first), (_, second), (_, time_of) = found.items()
        medians = first["median_ms"], second["median_ms"], time_of["ratio"], time_of["p10"], time_of["p90"]
        rows.append((case, *medians, first["least_ms"], second["least_ms"], time_of["least"]))
    columns = ("", "first ms", "second ms", "ratio", "p10", "p90", "first least", "second least", "ratio")
    print_table("workers", columns, rows)


# ---- the demo family


def _faults(repeats: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        family = assemble(Path(folder) / "family")
        zoo = Path(folder) / "zoo"
        compile_models(family, zoo, CompileOptions(verify=False, profile=False))
        settings: dict[str, Any] = {"precision": "f32", "kv_cache_bytes": 16 << 20, "num_threads": 1}
        expected = _answers(LLMEngine(zoo, EngineConfig(**settings)))
        results = {"kill": _recovery(zoo, settings, expected, repeats)}
        results["limit"] = _limit(zoo, settings, expected)
    print(results)
    return results


def _jobs(engine: LLMEngine) -> list[tuple[str, list[int]]]:
    rng = np.random.default_rng(0)
    return [(model, rng.integers(2, 2000, 100).tolist()) for model in engine.models * 2]


def _answers(engine: LLMEngine, kill_at: int | None = None) -> tuple[dict[str, list[int]], float]:
    """Tokens by request; with a step at which a worker is killed, the longest time without any token."""
    found: dict[str, list[int]] = {}
    for index, (model, prompt) in enumerate(_jobs(engine)):
        engine.add_request(str(index), model, prompt, GREEDY)
    steps, killed, silent = 0, 0.0, 0.0
    while engine.has_unfinished():
        if (steps := steps + 1) == kill_at:
            os.kill(engine.worker_pids[steps % 2], signal.SIGKILL)
            killed = time.monotonic()
        outputs = engine.step()
        for output in outputs:
            if output.error is not None:
                raise SystemExit(output.error)
            found.setdefault(output.request_id, []).extend(output.token_ids)
        if killed and not silent and outputs:
            silent = time.monotonic() - killed
    return found, silent


def _recovery(
    zoo: Path, settings: Mapping[str, Any], expected: tuple[dict[str, list[int]], float], repeats: int
) -> dict[str, Any]:
    engine = LLMEngine(zoo, EngineConfig(workers=2, **settings))
    seconds, equal = [], True
    for index in range(repeats):
        found, silent = _answers(engine, kill_at=5 + 3 * index)
        seconds.append(silent)
        equal = equal and found == expected[0]
    engine.close()
    return {
        "seconds_until_tokens_come": {"median": float(np.median(seconds)), "most": max(seconds)},
        "kills": repeats,
        "requests_each": len(expected[0]),
        "equal_tokens": equal,
    }


def _limit(
    zoo: Path, settings: Mapping[str, Any], expected: tuple[dict[str, list[int]], float]
) -> dict[str, Any]:
    limits = {"worker_memory_bytes": 34 << 20, **settings}
    refused = ""
    try:
        LLMEngine(zoo, EngineConfig(workers=1, **limits)).close()
    except InvalidRequestError as error:
        refused = str(error)
    engine = LLMEngine(zoo, EngineConfig(workers=2, **limits))
    found, _ = _answers(engine)
    engine.close()
    return {"one_worker": refused, "two_workers_equal_tokens": found == expected[0]}


if __name__ == "__main__":
    main()
