"""Steps of one model with its weights in bf16, int8 and int4, each as it is served.

    python -m benchmarks.quantized_speed [--shape 110m|0.5b] [--repeats N]

All sides are our whole engine (scheduler, chain, greedy sampling, text) over random weights of one shape.
They hold their own copy of the weights, run in one process and take turns. "int8 activations": products round
activations to 8 bits, everything else is f32, KV too; without: weights are unpacked to bf16.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.common import arguments, interleave, machine_facts, print_table, save_report, timed
from benchmarks.families import Family, make_family
from benchmarks.sides import EngineSide, Settings, decode_turn
from blockzoo.build.quantized_models import Weights
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.openvino.engine import multiplies_int8

BATCHES = (1, 8, 32)
CONTEXT = 512
STEPS = 5
_GIVEN = "bf16"


def main() -> None:
    """Print and keep the table."""
    parser = arguments(__doc__ or "", shape="110m", repeats=6)
    parser.add_argument(
        "--context", type=int, default=CONTEXT, help=f"before decode steps; also tokens of a step ({CONTEXT})"
    )
    args = parser.parse_args()
    machine = machine_facts()
    results = _measured(make_family(args.workdir, args.shape, 1), args)
    rows = [
        (f"{case}: {side}", numbers["median_ms"], numbers["p10_ms"], numbers["p90_ms"], numbers["ratio"])
        for case, sides in results.items()
        for side, numbers in sides.items()
    ]
    print_table("steps", ("", "median ms", "p10", "p90", f"to {_GIVEN}"), rows)
    print(save_report("quantized_speed", args, machine, results))


def _measured(family: Family, args: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(
        precision=OpenVINOEngines(args.precision).precision,
        num_threads=args.threads,
        max_seqs=max(BATCHES),
        context=args.context,
        max_tokens=args.context,
        longest_prompt=args.context,
    )
    rounded = replace(settings, precision="f32", int8_activations=True)
    model = family.tenants[:1]
    sides = {_GIVEN: EngineSide(family.zoo(), model, settings)}
    quantized: tuple[Weights, ...] = ("int8", "int4")
    for weights in quantized:
        sides[weights] = EngineSide(family.zoo(weights), model, settings)
        if multiplies_int8():
            sides[f"{weights}, int8 activations"] = EngineSide(family.zoo(weights), model, rounded)
    turns = {
        f"prefill {args.context}": {
            name: partial(timed, partial(side.prefill, args.context), 1) for name, side in sides.items()
        }
    }
    for batch in BATCHES:
        turns[f"decode, {batch} rows"] = {
            name: partial(decode_turn, side, batch, STEPS) for name, side in sides.items()
        }
    results: dict[str, Any] = {}
    for case, of_sides in turns.items():
        samples = interleave(of_sides, args.repeats)
        results[case] = {
            name: taken.summary() | taken.ratio_to(samples[_GIVEN]) for name, taken in samples.items()
        }
    for side in sides.values():
        side.close()
    return results


if __name__ == "__main__":
    main()
