"""What a chain of engines costs against the same model as one graph, OpenVINO GenAI and llama.cpp.

    python -m benchmarks.chain_overhead [--shape 110m|0.5b] [--weights int8|int4] [--llama FOLDER]

One model, so that nothing is shared: what is left is the price of the chain. The sides:

    fused     our executor, one engine for the whole chain
    layers    our executor, one engine per layer: the most that sharing could cut a chain into
    graph     the model as one OpenVINO graph called directly, nothing around it
    engine    our LLMEngine: fused, with scheduler, greedy sampling and text
    given     with --weights: the engine with weights as they were given
    genai     OpenVINO GenAI continuous batching: with scheduler and greedy sampling
    llama     llama.cpp with greedy sampling, in a process of its own that is told each step

All hold their own copy of the weights, in the same number of bits, and take turns. Decode steps start
after 514 tokens; engine, genai and llama keep the prompts cached, so that each turn starts there again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Samples,
    add_bits,
    arguments,
    genai_missing,
    interleave,
    machine_facts,
    print_table,
    save_report,
    timed,
)
from benchmarks.families import Family, make_family
from benchmarks.sides import (
    EngineSide,
    ExecutorSide,
    Settings,
    Side,
    WholeGraphSide,
    decode_turn,
    served_in,
)
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.zoo.packing import GROUPS

BATCHES = (1, 8, 32)
CONTEXT = 512
STEPS = 5
REFERENCES = ("graph", "genai", "given", "llama")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=6)
    parser.add_argument(
        "--context", type=int, default=CONTEXT, help=f"before decode steps; also tokens of a step ({CONTEXT})"
    )
    parser.add_argument("--skip", nargs="*", default=[], help="sides to leave out")
    add_bits(parser)
    parser.add_argument(
        "--group-size", type=int, choices=sorted(GROUPS), help="of ours (as zoo-compile has it)"
    )
    args = parser.parse_args()
    machine = machine_facts()
    missing = {"genai": genai_missing(), "llama": _llama_missing(args.llama)}
    missing["given"] = None if args.weights else "weights are as given"
    for side, why in missing.items():
        if why and side not in args.skip:
            print(f"without {side}: {why}")
            args.skip.append(side)
    family = make_family(args.workdir, args.shape, 1)
    given = Settings(
        precision=OpenVINOEngines(args.precision).precision,
        num_threads=args.threads,
        kv_precision=args.kv_precision,
        max_seqs=max(BATCHES),
        context=args.context,
        max_tokens=args.context,
        longest_prompt=4 * args.context,
    )
    settings = served_in(given, args.weights, args.int8_activations)
    results: dict[str, Any] = {"precision": settings.precision}
    results |= _one_step(family, settings, args)
    results |= _chunks_and_decode(family, settings, given, args)
    for case in ("prefill", "decode"):
        _print(case, {name: value for name, value in results.items() if name.startswith(case)})
    print(save_report("chain_overhead", args, machine, results))


def _one_step(family: Family, settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """A long prompt in one step. One sequence only, so that pools and scratch stay small."""
    length = settings.longest_prompt
    settings = replace(settings, max_seqs=1, max_tokens=length)
    zoo, model = family.zoo(args.weights, args.group_size), family.tenants[0]
    makers: dict[str, Callable[[], Side]] = {
        "fused": lambda: ExecutorSide(zoo, [model], settings),
        "layers": lambda: ExecutorSide(zoo, [model], settings, max_span_layers=1),
        "graph": lambda: WholeGraphSide(zoo, model, settings),
        "genai": lambda: _genai(family, settings, args),
        "llama": lambda: _llama(family, settings, args),
    }
    sides = {name: make() for name, make in makers.items() if name not in args.skip}
    if not sides:
        return {}
    turns = {name: partial(timed, partial(side.prefill, length), 1) for name, side in sides.items()}
    samples = interleave(turns, max(1, args.repeats // 3))
    for side in sides.values():
        side.close()
    return {f"prefill {length}, one step": _case(samples)}


def _chunks_and_decode(
    family: Family, settings: Settings, given: Settings, args: argparse.Namespace
) -> dict[str, Any]:
    zoo, model = family.zoo(args.weights, args.group_size), family.tenants[0]
    makers: dict[str, Callable[[], Side]] = {
        "fused": lambda: ExecutorSide(zoo, [model], settings),
        "layers": lambda: ExecutorSide(zoo, [model], settings, max_span_layers=1),
        "graph": lambda: WholeGraphSide(zoo, model, settings),
        "engine": lambda: EngineSide(zoo, [model], settings),
        "given": lambda: EngineSide(family.zoo(), [model], given),
        "genai": lambda: _genai(family, settings, args),
        "llama": lambda: _llama(family, settings, args),
    }
    sides = {name: make() for name, make in makers.items() if name not in args.skip}
    results: dict[str, Any] = {}
    chunk, length = settings.max_tokens, settings.longest_prompt
    turns = {name: partial(timed, partial(side.prefill, chunk), 1) for name, side in sides.items()}
    results[f"prefill {chunk}"] = _case(interleave(turns, args.repeats))
    turns = {name: partial(timed, partial(side.prefill, length), 1) for name, side in sides.items()}
    samples = interleave(turns, max(1, args.repeats // 3), untimed_rounds=0)
    results[f"prefill {length}, chunks of {chunk}"] = _case(samples)
    for batch in BATCHES:
        turns = {name: partial(decode_turn, side, batch, STEPS) for name, side in sides.items()}
        results[f"decode, batch {batch}"] = _case(interleave(turns, args.repeats))
    for side in sides.values():
        side.close()
    return results


def _genai(family: Family, settings: Settings, args: argparse.Namespace) -> Side:
    from benchmarks.peers.genai import GenAISide, ir_folder

    return GenAISide(ir_folder(family, family.tenants[0], args.weights), settings)


def _llama(family: Family, settings: Settings, args: argparse.Namespace) -> Side:
    from benchmarks.peers.llama import LlamaSide, gguf_file

    return LlamaSide(args.llama, gguf_file(family, family.tenants[0], args.weights), settings)


def _llama_missing(environment: Path | None) -> str | None:
    if environment is None:
        return "--llama names no environment"
    from benchmarks.peers.llama import missing

    return missing(environment)


def _case(samples: Mapping[str, Samples]) -> dict[str, Any]:
    return {
        name: taken.summary()
        | {f"to_{other}": taken.ratio_to(samples[other]) for other in REFERENCES if other in samples}
        for name, taken in samples.items()
    }


def _print(title: str, results: Mapping[str, Any]) -> None:
    rows = []
    for case, sides in results.items():
        for side, numbers in sides.items():
            ratios = [numbers.get(f"to_{other}", {}).get("ratio", "") for other in REFERENCES]
            rows.append(
                (f"{case}: {side}", numbers["median_ms"], numbers["p10_ms"], numbers["p90_ms"], *ratios)
            )
    print_table(title, ("", "median ms", "p10", "p90", *(f"to {other}" for other in REFERENCES)), rows)


if __name__ == "__main__":
    main()
