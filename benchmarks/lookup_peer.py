"""Speculation beside llama.cpp's own prompt lookup: greedy answers to one request at a time, of one file.

    python -m benchmarks.lookup_peer --llama ENVIRONMENT [--weights int8|int4]

SmolLM2-135M-Instruct, compiled from the file that llama.cpp reads (python -m benchmarks.peers.llama makes its
environment). All sides take turns; each answers in its own arithmetic, so answers may part, and times are
those of a token. llama.cpp guesses 10 tokens, its default, or 2, which its documentation advises for CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import add_bits, arguments, interleave, machine_facts, print_table, save_report
from benchmarks.families import made_once
from benchmarks.smollm2 import smollm2
from benchmarks.smollm2_family import extract, samples
from benchmarks.speculation import Ask, Bench, cases
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.quantized_models import Weights
from blockzoo.runtime import EngineConfig, LLMEngine

GUESSES = (0, 2, 10)
CONTEXT = 1024
_WORKER = Path(__file__).with_name("peers") / "llama_lookup.py"


class Lookup:
    """llama.cpp in a process of its own."""

    def __init__(self, environment: Path, model: Path, threads: int | None) -> None:
        cores = threads or len(os.sched_getaffinity(0))
        command = [environment / "bin/python", _WORKER, model, cores, CONTEXT]
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._said() == "ready", "llama.cpp does not start"

    def run(self, prompt: list[int], most: int, ends: list[int], guesses: int) -> tuple[float, int]:
        """Seconds of decoding, and tokens behind the first."""
        asked = {"prompt": prompt, "most": most, "ends": ends, "guesses": guesses}
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        found = json.loads(self._said())
        return found["seconds"], len(found["tokens"]) - 1

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def main() -> None:
    """Print and keep the table."""
    parser = arguments(__doc__ or "", shape="smollm2-135m", repeats=3)
    add_bits(parser)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most (96)")
    args = parser.parse_args()
    if args.llama is None:
        parser.error("--llama ENVIRONMENT is what this compares with")
    machine = machine_facts()
    model = smollm2()
    zoo = made_once(args.workdir / f"smollm2-gguf-{args.weights}", partial(_compile, model, args.weights))
    precision = args.precision if args.weights is None else None
    config = EngineConfig(
        precision=precision, num_threads=args.threads, kv_cache_bytes=1 << 29, speculate="auto"
    )
    bench = Bench(LLMEngine(zoo, config), args.tokens)
    peer = Lookup(args.llama, model, args.threads)
    wanted = {name: [group[0] for group in groups] for name, groups in cases().items() if len(groups[0]) == 1}
    notices = samples.held_out(extract, 3)
    wanted["JSON with a schema"] = [Ask("base", notice.messages) for notice in notices]
    wanted = {name.replace(" with a schema", ""): asks for name, asks in wanted.items()}
    results = {name: _measured(bench, peer, name, asks, args) for name, asks in wanted.items()}
    peer.close()
    sides = list(next(iter(results.values())))
    rows = [(name, *(found[side]["median_ms"] for side in sides)) for name, found in results.items()]
    print_table("ms a token", ("", *sides), rows)
    print(save_report("lookup_peer", args, machine, results))


def _measured(
    bench: Bench, peer: Lookup, name: str, asks: list[Ask], args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds a token of all sides of one case."""
    rounds = iter(range(1 << 30))

    def ours(speculate: bool) -> Callable[[], list[float]]:
        def turn() -> list[float]:
            total, count = 0.0, 0
            for ask in asks:
                seconds, (tokens,) = bench.run([ask], f"{name}, {next(rounds)}", speculate)
                total, count = total + seconds, count + len(tokens) - 1
            return [total / count]

        return turn

    def theirs(guesses: int) -> Callable[[], list[float]]:
        def turn() -> list[float]:
            found = [peer.run(bench.prompt_ids(ask), args.tokens, bench.end_ids, guesses) for ask in asks]
            return [sum(seconds for seconds, _ in found) / sum(count for _, count in found)]

        return turn

    sides = {"off": ours(False), "auto": ours(True)}
    sides |= {f"llama.cpp, {n} guesses": theirs(n) for n in GUESSES}
    taken = interleave(sides, args.repeats)
    best = min((taken[f"llama.cpp, {n} guesses"] for n in GUESSES), key=lambda samples: samples.median)
    results: dict[str, Any] = {side: samples.summary() for side, samples in taken.items()}
    results["auto"]["times_as_fast_as_best_of_llama"] = best.ratio_to(taken["auto"])
    print(name, results, flush=True)
    return results


def _compile(model: Path, weights: Weights | None, folder: Path) -> None:
    options = CompileOptions(verify=False, profile=False, weights=weights, calibration_texts=0)
    compile_models({"base": model}, folder, options)


if __name__ == "__main__":
    main()
