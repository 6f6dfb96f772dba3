"""Time to the first token of a prompt that another tenant has just run.

    python -m benchmarks.boundary [--shape 110m|0.5b] [--repeats N] [--length N]

Two tenants share all but their last two layers. In every round tenant A runs a new prompt; then the
first token of tenant B is timed, whose prefill enters where the two part:

    cold        B has no cache: a full prefill
    boundary    B after A, starting at the boundary layer
    own hit     B again: its own KV, in all layers

All take turns in one process, with a new prompt in every round. B's tokens must be those of the cold run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import arguments, interleave, machine_facts, print_table, save_report
from benchmarks.families import Family, make_family
from benchmarks.sides import first_token
from blockzoo.runtime import LLMEngine, SamplingParams
from blockzoo.runtime.serve.config import EngineConfig

LENGTH = 2048
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=6)
    parser.add_argument("--length", type=int, default=LENGTH, help=f"prompt tokens ({LENGTH})")
    args = parser.parse_args()
    machine = machine_facts()
    family = make_family(args.workdir, args.shape, 2)
    results = run(family, args)
    columns = ("", "median ms", "p10", "p90", "to cold")
    rows = [
        (name, side["median_ms"], side["p10_ms"], side["p90_ms"], side["to_cold"]["ratio"])
        for name, side in results["ttft"].items()
    ]
    layers = f"{results['own_layers']} of {results['layers']} layers differ"
    print_table(f"first token of tenant B, {args.length} tokens, {layers}", columns, rows)
    print(f"tokens equal to the cold run in {results['rounds_equal']} of {results['rounds']} rounds")
    print(save_report("boundary", args, machine, results))


def run(family: Family, args: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn. Two engines: `cold` has no cache, `warm` keeps KV and hidden states."""
    tenant_a, tenant_b = family.tenants
    cold, warm = (
        LLMEngine(
            family.zoo().path,
            EngineConfig(
                precision=args.precision,
                num_threads=args.threads,
                kv_cache_bytes=4 * args.length * family.shape.kv_bytes_per_token * 2,
                max_model_len=args.length + GREEDY.max_tokens,
                max_num_seqs=4,
                prefix_caching=caching,
                kv_sharing="scope",
            ),
        )
        for caching in (False, True)
    )
    rng = np.random.default_rng(0)
    equal = 0

    def side(engine: LLMEngine, *before: str) -> Callable[[], list[float]]:
        def once() -> list[float]:
            prompt = rng.integers(2, family.shape.vocab_size, args.length).tolist()
            for model in before:
                first_token(engine, model, prompt, GREEDY)
            seconds, found = first_token(engine, tenant_b, prompt, GREEDY)
            if engine is not cold:
                nonlocal equal
                _, expected = first_token(cold, tenant_b, prompt, GREEDY)
                equal += found == expected
            return [seconds]

        return once

    samples = interleave(
        {
            "cold": side(cold),
            "boundary": side(warm, tenant_a),
            "own hit": side(warm, tenant_b),
        },
        args.repeats,
    )
    metrics = warm.metrics()
    return {
        "length": args.length,
        "layers": family.shape.num_layers,
        "own_layers": 2,
        "precision": warm.engine_facts["precision"],
        "ttft": {
            name: taken.summary() | {"to_cold": taken.ratio_to(samples["cold"])}
            for name, taken in samples.items()
        },
        "rounds": 2 * (args.repeats + 1),
        "rounds_equal": equal,
        "prefix_hit_tokens": dict(metrics.prefix_hit_tokens),
    }


if __name__ == "__main__":
    main()
