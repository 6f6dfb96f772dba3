"""What a tenant's first token takes beside another's flood, to what it takes beside a polite one.

    python -m benchmarks.fairness --shape 110m

Polite is one running request at a time of each other tenant, of the same kind as the flood's. Both as served,
and as it was when all requests were counted under one tenant ("together": given up after `--patience`).
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.common import Samples, arguments, machine_facts, print_table, save_report
from benchmarks.families import make_family
from blockzoo.runtime import EngineConfig, EngineThread, RequestOutput, SamplingParams
from blockzoo.runtime.api.errors import OverloadedError

PROBE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Case:
    """A flood: so many requests at once of each of the first `tenants`."""

    count: int
    prompt_tokens: int
    new_tokens: int
    tenants: int = 1


CASES = {
    "100 x 64 tokens": Case(100, 32, 64),
    "600 x 64 tokens": Case(600, 32, 64),
    "64 prompts of 1024 tokens": Case(64, 1024, 16),
    "1100, more than may wait": Case(1100, 32, 64),
    "three tenants, 100 x 64 tokens each": Case(100, 32, 64, 3),
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=2)
    parser.add_argument("--probes", type=int, default=6, help="first tokens measured a round (6)")
    parser.add_argument("--patience", type=float, default=5.0, help="longest wait when together, s (5)")
    parser.add_argument("--context", type=int, default=1024, help="most tokens of a prompt (1024)")
    args = parser.parse_args()
    machine = machine_facts()
    bench = Bench(args)
    results = {}
    for name, case in CASES.items():
        length = min(case.prompt_tokens, args.context)
        results[name] = bench.compare(replace(case, prompt_tokens=length))
    bench.thread.close()
    columns = ("beside", "polite ms", "flood ms", "ratio", "p90 to p90", "refused", "together, ratio")
    rows = [
        (
            name,
            case["polite"]["median_ms"],
            case["flood"]["median_ms"],
            case["ratio"]["ratio"],
            case["p90_ratio"],
            f"{case['refused']} / {case['flood_refused']}",
            ("" if case["together_came"] else "> ") + f"{case['together_ratio']:.3g}",
        )
        for name, case in results.items()
    ]
    print_table("another tenant's first token; refused: of its requests / the flood's", columns, rows)
    print(save_report("fairness", args, machine, results))


class Bench:
    """One engine that is flooded and asked."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        family = make_family(args.workdir, args.shape, 4)
        *self._others, self._model = family.tenants
        config = EngineConfig(
            precision=args.precision,
            num_threads=args.threads,
            kv_cache_bytes=1 << 30,
            max_model_len=2048,
        )
        self.thread = EngineThread(family.zoo().path, config)
        self._rng = np.random.default_rng(0)
        self._vocab = family.shape.vocab_size
        self._ids = (f"r{number}" for number in itertools.count())
        self.refused = 0
        self._probe(None, 60.0)

    def compare(self, case: Case) -> dict[str, Any]:
        """Both sides in turn, and once all together."""
        sides: dict[str, list[tuple[float, ...]]] = {"polite": [], "flood": []}
        flood_refused = 0
        self.refused = 0
        for number in range(self._args.repeats):
            for side in list(sides)[:: 1 if number % 2 else -1]:
                load = Load(self, case, polite=side == "polite")
                sides[side].append(tuple(self._probe(None, 600.0)[0] for _ in range(self._args.probes)))
                flood_refused += load.end()
        samples = {name: Samples(tuple(rounds)) for name, rounds in sides.items()}
        refused = self.refused
        load = Load(self, case, polite=False, tenant="all")
        together, came = self._probe("all", self._args.patience)
        load.end()
        summaries = {name: taken.summary() for name, taken in samples.items()}
        return summaries | {
            "ratio": samples["flood"].ratio_to(samples["polite"]),
            "p90_ratio": round(summaries["flood"]["p90_ms"] / summaries["polite"]["p90_ms"], 3),
            "refused": refused,
            "flood_refused": flood_refused,
            "together_ms": round(together * 1e3, 1),
            "together_ratio": round(together / samples["polite"].median, 2),
            "together_came": came,
        }

    def prompt(self, num_tokens: int) -> list[int]:
        """Tokens that no other prompt begins with."""
        return self._rng.integers(2, self._vocab, num_tokens).tolist()

    def _probe(self, tenant: str | None, patience: float) -> tuple[float, bool]:
        """Seconds to the first token of a request at some time from now, and whether it came."""
        time.sleep(float(self._rng.uniform(0.0, 0.3)))
        first, done = threading.Event(), threading.Event()

        def on_output(output: RequestOutput) -> None:
            if output.token_ids:
                first.set()
            if output.finished:
                done.set()

        name, prompt = next(self._ids), self.prompt(PROBE_TOKENS)
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        try:
            self.thread.submit(name, self._model, prompt, params, on_output, tenant=tenant)
        except OverloadedError:
            self.refused += 1
            return patience, False
        came = first.wait(patience)
        seconds = time.perf_counter() - start
        if not came:
            self.thread.abort(name)
        done.wait(60)
        return seconds, came

    def other_models(self, count: int) -> list[str]:
        """Who floods."""
        return self._others[:count]

    def new_id(self) -> str:
        """Of a request."""
        return next(self._ids)


class Load:
    """Requests of other tenants: a flood at once, or one after the other. Begins when the first runs."""

    def __init__(self, bench: Bench, case: Case, polite: bool, tenant: str | None = None) -> None:
        self._bench, self._case, self._polite, self._tenant = bench, case, polite, tenant
        self._alive: set[str] = set()
        self._idle, self._begun = threading.Condition(), threading.Event()
        self._refused = 0
        self._ending = False
        for model in bench.other_models(case.tenants):
            for _ in range(1 if polite else case.count):
                self._submit(model)
        self._begun.wait(60)

    def _submit(self, model: str) -> None:
        case, name = self._case, self._bench.new_id()
        params = SamplingParams(max_tokens=case.new_tokens, temperature=0.0, ignore_eos=True)

        def on_output(output: RequestOutput) -> None:
            self._begun.set()
            if output.finished:
                if not self._ending:
                    self._submit(model)  # the flood goes on as well
                with self._idle:
                    self._alive.discard(name)
                    self._idle.notify()

        with self._idle:
            self._alive.add(name)
        try:
            prompt = self._bench.prompt(case.prompt_tokens)
            self._bench.thread.submit(name, model, prompt, params, on_output, tenant=self._tenant)
        except OverloadedError:
            self._refused += 1
            with self._idle:
                self._alive.discard(name)

    def end(self) -> int:
        """Abort what is left and wait for it; how many requests were refused."""
        self._ending = True
        with self._idle:
            for name in self._alive:
                self._bench.thread.abort(name)
            self._idle.wait_for(lambda: not self._alive, 60)
        return self._refused


if __name__ == "__main__":
    main()
