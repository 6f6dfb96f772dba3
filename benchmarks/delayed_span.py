"""A span that is far away: how much of its delay is hidden by guesses, which it checks many at a time.

    python -m benchmarks.delayed_span [--zoo ZOO] [--delays 0 2 10 50]

SmolLM2-135M, whose last span sleeps before it runs, as one would wait for that runs in another place.
Requests of the two sides take turns and differ in `speculate` alone; in f32 both must give the same tokens.
Left of a delay is what it adds to a token with speculation, of what it adds without.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, interleave, machine_facts, print_table, save_report
from benchmarks.families import made_once
from benchmarks.speculation import Ask, Bench, cases, compile_pair
from blockzoo.engines.base import Engine
from blockzoo.runtime import EngineConfig, LLMEngine

DELAYS_MS = (0, 2, 10, 50)
CASES = ("RAG that quotes", "edit of a file", "free chat")


class Delayed:
    """An engine in another place."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.seconds, self.num_runs = engine, 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self) -> None:
        """See Engine."""
        time.sleep(self.seconds)
        self.num_runs += 1
        self._engine.run()


def delay_last_span(engine: LLMEngine, model: str) -> Delayed:
    """Put the last span of a model's chain behind a delay, 0 at first."""
    zoo = engine._zoo
    chain = zoo.topology.chains[zoo.topology.chain_of_model[model]]
    engines, span = zoo.local_executors[chain.family]._engines, chain.uses[-1].span
    engines[span] = delayed = Delayed(engines[span])  # type: ignore[index]
    return delayed


def main() -> None:
    """Print and keep the table."""
    parser = arguments(__doc__ or "", shape="smollm2-135m", repeats=3)
    parser.add_argument("--zoo", type=Path, help="with base and extract of the family")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most (96)")
    parser.add_argument("--delays", type=int, nargs="+", default=DELAYS_MS, help="in ms")
    parser.add_argument("--cases", nargs="+", default=CASES, help="parts of their names")
    args = parser.parse_args()
    machine = machine_facts()
    zoo = args.zoo or made_once(args.workdir / "smollm2-family", compile_pair)
    config = EngineConfig(
        precision=args.precision, num_threads=args.threads, kv_cache_bytes=1 << 30, speculate="auto"
    )
    engine = LLMEngine(zoo, config)
    delayed = delay_last_span(engine, "base")
    del args.zoo
    wanted = {name: asks for name, asks in cases().items() if any(part in name for part in args.cases)}
    results: dict[str, Any] = {}
    for name, groups in wanted.items():
        results[name] = {ms: _measured(engine, delayed, groups, ms / 1e3, args) for ms in args.delays}
        path = save_report("delayed_span", args, machine, results)
    rows = []
    for name, of_delays in results.items():
        least = min(of_delays)
        for ms, found in of_delays.items():
            without = of_delays[least]
            more = {side: found[side] - without[side] for side in ("off", "auto")}
            left = found["left"] = more["auto"] / more["off"] if ms > least else 0.0
            rows.append((name, ms, found["off"], found["auto"], found["steps_a_token"], left))
    print_table("ms a token", ("", "delay", "off", "auto", "steps a token", "left of it"), rows)
    path = save_report("delayed_span", args, machine, results)
    print(path)


def _measured(
    engine: LLMEngine, delayed: Delayed, groups: list[list[Ask]], delay: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds a token of both sides, and how often the span ran for a token of the second."""
    bench, rounds = Bench(engine, args.tokens), itertools.count()
    answers: dict[str, list[list[tuple[int, ...]]]] = {"off": [], "auto": []}
    runs: list[float] = []
    delayed.seconds = delay

    def side(name: str) -> Callable[[], list[float]]:
        def turn() -> list[float]:
            scope, total, said, before = f"delay {delay}, {next(rounds)}", 0.0, [], delayed.num_runs
            for number, group in enumerate(groups):
                seconds, tokens = bench.run(group, f"{scope}, {number}", name == "auto")
                total += seconds
                said += tokens
            answers[name].append(said)
            count = sum(len(answer) - 1 for answer in said)
            if name == "auto":
                runs.append((delayed.num_runs - before) / count)
            return [total / count]

        return turn

    taken = interleave({name: side(name) for name in answers}, args.repeats)
    differ = any(said != answers["off"][0] for each in answers.values() for said in each)
    if differ and engine.engine_facts["precision"] == "f32":
        raise SystemExit("the two sides gave different tokens")
    ms = {name: taken[name].median * 1e3 for name in taken}
    return {**ms, "steps_a_token": sorted(runs)[len(runs) // 2]}


if __name__ == "__main__":
    main()
