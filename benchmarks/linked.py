"""Decoding over a slow link, with guesses against without: one of two workers is some milliseconds away.

    python -m benchmarks.linked [--delays 0 10]

The demo family over two workers, whose second one is that far from the head and from the first, one way, so
that a step of any rows waits for the link at least twice. Requests of the two sides take turns and differ in
`speculate` alone; tokens must be the same, and those of one process. Timed is one request at a time, from its
first token to its last:

    quotes      text that stands in its prompt, greedily
    free text   sampled, with seeds
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import arguments, interleave, machine_facts, print_table, save_report
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.zoo.demo.assemble import assemble
from blockzoo.zoo.demo.tasks import facts

DELAYS_MS = (0, 10)
TOKENS = 128
NUM_PROMPTS = 3
FREE = ("import os\n\n\ndef walk(folder):\n", "class Reader:\n    def __init__(self", "Q: In full: b?\nA:")
Answers = list[tuple[int, ...]]


def quoting(seed: int) -> str:
    """Notes, which begin again behind their end."""
    notes = facts(random.Random(seed), 6).context
    return notes + notes + notes[:40]


class Bench:
    """One engine, of which all is asked."""

    def __init__(self, engine: LLMEngine, num_tokens: int) -> None:
        self.engine, self._num_tokens = engine, num_tokens
        self._ids = itertools.count()

    def run(self, prompts: tuple[str, ...], temperature: float, speculate: bool) -> tuple[float, Answers]:
        """Seconds of decoding, and the answers; each request has a scope of its own."""
        seconds, answers = 0.0, list[tuple[int, ...]]()
        for seed, prompt in enumerate(prompts):
            name = f"{next(self._ids)}"
            params = SamplingParams(
                max_tokens=self._num_tokens,
                temperature=temperature,
                seed=seed,
                ignore_eos=True,
                speculate=speculate,
            )
            self.engine.add_request(name, "base", prompt, params, scope=name)
            found: tuple[int, ...] = ()
            start = 0.0
            while self.engine.has_unfinished():
                if found and not start:
                    start = time.perf_counter()
                for output in self.engine.step():
                    if output.error is not None:
                        raise SystemExit(output.error)
                    found += output.token_ids
            seconds += time.perf_counter() - start
            answers.append(found)
        return seconds, answers


def measured(bench: Bench, prompts: tuple[str, ...], temperature: float, repeats: int) -> dict[str, Any]:
    """Both sides in turns."""
    answers: dict[str, list[Answers]] = {"off": [], "auto": []}

    def turn(side: str) -> list[float]:
        seconds, found = bench.run(prompts, temperature, side == "auto")
        answers[side].append(found)
        return [seconds / sum(len(answer) - 1 for answer in found)]

    turns: dict[str, Callable[[], list[float]]] = {side: partial(turn, side) for side in answers}
    before = _counts(bench.engine)
    taken = interleave(turns, repeats)
    drafted, accepted = (now - then for now, then in zip(_counts(bench.engine), before, strict=True))
    if any(found != answers["off"][0] for rounds in answers.values() for found in rounds):
        raise SystemExit("the two sides gave different tokens")
    return {
        "off": taken["off"].summary() | {"tokens_per_s": round(1 / taken["off"].median, 1)},
        "auto": taken["auto"].summary() | {"tokens_per_s": round(1 / taken["auto"].median, 1)},
        "speedup": taken["off"].ratio_to(taken["auto"]),
        "drafted": drafted,
        "accepted": accepted,
        "answers": [list(answer) for answer in answers["off"][0]],
    }


def _counts(engine: LLMEngine) -> tuple[int, int]:
    metrics = engine.metrics()
    return sum(metrics.drafted_tokens_total.values()), sum(metrics.accepted_tokens_total.values())


def main() -> None:
    """Print and keep the table."""
    parser = arguments(__doc__ or "", shape="demo", repeats=5)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of an answer ({TOKENS})")
    parser.add_argument("--delays", type=float, nargs="+", default=DELAYS_MS, help="in ms (0 10)")
    args = parser.parse_args()
    machine = machine_facts()
    cases = {
        "quotes": (tuple(quoting(seed) for seed in range(NUM_PROMPTS)), 0.0),
        "free text": (FREE, 1.0),
    }
    settings: dict[str, Any] = {
        "precision": "f32",
        "kv_cache_bytes": 64 << 20,
        "num_threads": args.threads or 1,
        "speculate": "auto",
    }
    results: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        zoo = Path(folder) / "zoo"
        compile_models(assemble(Path(folder) / "family"), zoo, CompileOptions(verify=False, profile=False))
        here = Bench(LLMEngine(zoo, EngineConfig(**settings)), args.tokens)
        expected = {name: list(map(list, here.run(*case, False)[1])) for name, case in cases.items()}
        for delay in args.delays:
            engine = LLMEngine(zoo, EngineConfig(workers=2, worker_delays_ms=(0.0, delay), **settings))
            bench = Bench(engine, args.tokens)
            for name, case in cases.items():
                found = results[f"{name}, {delay:g} ms"] = measured(bench, *case, args.repeats)
                if found.pop("answers") != expected[name]:
                    raise SystemExit(f"{name}: not the tokens of one process")
            engine.close()
    rows = [
        (
            name,
            *(r[side]["tokens_per_s"] for side in ("off", "auto")),
            *r["speedup"].values(),
            r["drafted"],
            r["accepted"],
        )
        for name, r in results.items()
    ]
    columns = ("", "off", "auto", "speed-up", "p10", "p90", "drafted", "accepted")
    print_table("tokens a second", columns, rows)
    print(save_report("linked", args, machine, results))


if __name__ == "__main__":
    main()
