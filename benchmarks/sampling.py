"""Times the choice of tokens from a step's logits against a full sort per row and against one argmax pass.

    python benchmarks/sampling.py [--rows 32] [--vocab 151936] [--repeats 15] [--output FILE]

The settings take turns in random order, each with an untimed run first, so that none starts from
the caches its predecessor left. Medians over the repeats are reported, in microseconds per row.
`peaked` rows are as those of a trained model (a few likely tokens over a wide bell); `flat` rows are
the worst case: most of the vocabulary is in the nucleus.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blockzoo.runtime.api.request import SamplingParams
from blockzoo.runtime.sampling.sampler import Sampler, SamplerState

Logits = npt.NDArray[np.float32]

FULL_SORT = "reference: full sort per row"
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "greedy, repetition penalty": {"temperature": 0, "repetition_penalty": 1.1},
    "greedy, 5 logprobs": {"temperature": 0, "logprobs": 5},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top_p 0.9 at temperature 100": {"temperature": 100, "top_p": 0.9},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "top_k 50, top_p 0.9, min_p 0.05": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def make_logits(rows: int, vocab: int, peaked: bool) -> Logits:
    rng = np.random.default_rng(0)
    if not peaked:
        return rng.standard_normal((rows, vocab), dtype=np.float32)
    logits = 2.5 * rng.standard_normal((rows, vocab), dtype=np.float32)
    for row in logits:
        likely = rng.choice(vocab, 20, replace=False)
        row[likely] = 18.0 - 6.0 * rng.random(20)
    return logits


def sort_rows(logits: Logits) -> None:
    """What top_k and top_p cost when written down plainly: the order of the row, then its mass."""
    for row in logits:
        ids = np.argsort(row)[::-1]
        weights = np.exp(row[ids] - row[ids[0]])
        np.cumsum(weights / weights.sum())


def sampler_run(logits: Logits, fields: dict[str, float]) -> Callable[[], object]:
    prompt = list(range(0, 4000, 8))
    params = SamplingParams(seed=1, **fields)  # type: ignore[arg-type]  # ints and floats by field
    states = [SamplerState(params, prompt, logits.shape[1], ()) for _ in logits]
    sampler = Sampler()
    return lambda: sampler.sample(logits, states)


def measure(runs: dict[str, Callable[[], object]], rows: int, repeats: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffler = random.Random(0)
    for _ in range(repeats):
        shuffler.shuffle(order)  # the long sort slows down whatever comes after it
        for name in order:
            run = runs[name]
            run()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    full_sort = statistics.median(seconds[FULL_SORT])
    return {
        name: {
            "median_us_per_row": round(1e6 * statistics.median(times) / rows, 1),
            "min_us_per_row": round(1e6 * min(times) / rows, 1),
            "max_us_per_row": round(1e6 * max(times) / rows, 1),
            "share_of_full_sort": round(statistics.median(times) / full_sort, 4),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = {}
    for shape in ("peaked", "flat"):
        logits = make_logits(args.rows, args.vocab, shape == "peaked")
        runs: dict[str, Callable[[], object]] = {
            "reference: one argmax pass": partial(logits.argmax, axis=1),
            FULL_SORT: partial(sort_rows, logits),
        }
        runs |= {name: sampler_run(logits, fields) for name, fields in SETTINGS.items()}
        results[shape] = measure(runs, args.rows, args.repeats)
    report = {
        "benchmark": "sampling",
        "rows": args.rows,
        "vocab": args.vocab,
        "repeats": args.repeats,
        "machine": platform.machine(),
        "numpy": np.__version__,
        "results": results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
