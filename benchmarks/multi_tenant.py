"""Eight tenants decode at once: one process that shares their blocks, against a pipeline for each.

    python -m benchmarks.multi_tenant [--shape 110m|0.5b] [--repeats N] [--weights int8|int4] [--llama FOLDER]

The tenants differ in their last two layers; each has one running request at a context of 512 tokens.
Tokens per second of all together:

    engine           our LLMEngine: with scheduler, greedy sampling and text
    executor         our executor alone
    genai in turn    a GenAI pipeline for each tenant, on the same cores, one step of each after the other
    genai threads    the same pipelines, each in a thread of its own
    llama in turn    a llama.cpp process for each tenant, one step of each after the other
    llama at once    the same processes, all at the same time
    separate chains  our executor with a chain for each tenant that shares nothing, one after the other

The sides take turns in one process. The separate chains have a run of their own with the executor, after
the pipelines are gone: all at once would not fit into the memory of small machines.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from benchmarks.families import Family, make_family, only
from benchmarks.sides import EngineSide, ExecutorSide, InTurn, Settings, Side, decode_turn, served_in
from blockzoo.engines.openvino import OpenVINOEngines

Turns = dict[str, Callable[[], Sequence[float]]]
STEPS = 8


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=8)
    parser.add_argument("--tenants", type=int, default=8, help="(8)")
    parser.add_argument("--own-layers", type=int, default=2, help="last layers that differ (2)")
    parser.add_argument("--context", type=int, default=512, help="(512)")
    add_bits(parser)
    args = parser.parse_args()
    machine = machine_facts()
    missing = genai_missing()
    if missing:
        print(f"without genai: {missing}")
    family = make_family(args.workdir, args.shape, args.tenants, args.own_layers)
    settings = Settings(
        precision=OpenVINOEngines(args.precision).precision,
        num_threads=args.threads,
        kv_precision=args.kv_precision,
        max_seqs=args.tenants,
        context=args.context,
        max_tokens=args.context,
        longest_prompt=args.context,
    )
    settings = served_in(settings, args.weights, args.int8_activations)
    results: dict[str, Any] = {"precision": settings.precision}
    results["pipelines"] = _against_pipelines(family, settings, args, with_genai=not missing)
    results["separate chains"] = _against_chains(family, settings, args)
    for title in ("pipelines", "separate chains"):
        rows = [
            (name, case["tokens_per_s"], case["median_ms"], case["p10_ms"], case["p90_ms"], case["ratio"])
            for name, case in results[title].items()
        ]
        columns = ("", "tokens/s", "median ms", "p10", "p90", "time to first")
        print_table(f"{args.tenants} tenants, {title}", columns, rows)
    print(save_report("multi_tenant", args, machine, results))


def _against_pipelines(
    family: Family, settings: Settings, args: argparse.Namespace, with_genai: bool
) -> dict[str, Any]:
    zoo = family.zoo(args.weights)
    sides: dict[str, Side] = {
        "engine": EngineSide(zoo, family.tenants, settings),
        "executor": ExecutorSide(zoo, family.tenants, settings),
    }
    turns: Turns = {}
    single = replace(settings, max_seqs=1)
    if with_genai:
        from benchmarks.peers.genai import GenAISide, decode_in_threads, ir_folder

        pipelines = [GenAISide(ir_folder(family, t, args.weights), single) for t in family.tenants]
        sides["genai in turn"] = InTurn(pipelines)

        def in_threads() -> list[float]:
            return [sum(timed(partial(decode_in_threads, pipelines, 2 * STEPS), 1)) / (2 * STEPS)]

        turns["genai threads"] = in_threads
    if args.llama:
        from benchmarks.peers.llama import LlamaSide, decode_at_once, gguf_file

        processes = [
            LlamaSide(args.llama, gguf_file(family, t, args.weights), single) for t in family.tenants
        ]
        sides["llama in turn"] = InTurn(processes)

        def at_once() -> list[float]:
            return [sum(timed(partial(decode_at_once, processes, 2 * STEPS), 1)) / (2 * STEPS)]

        turns["llama at once"] = at_once
    turns = {
        name: partial(decode_turn, side, family.num_tenants, STEPS) for name, side in sides.items()
    } | turns
    samples = interleave(turns, args.repeats)
    for side in sides.values():
        side.close()
    return _cases(samples, "engine", family.num_tenants)


def _against_chains(family: Family, settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    zoo, single = family.zoo(args.weights), replace(settings, max_seqs=1)
    sides: dict[str, Side] = {
        "executor": ExecutorSide(zoo, family.tenants, settings),
        "separate chains": InTurn([ExecutorSide(only(zoo, t), [t], single) for t in family.tenants]),
    }
    turns: Turns = {
        name: partial(decode_turn, side, family.num_tenants, STEPS) for name, side in sides.items()
    }
    samples = interleave(turns, args.repeats)
    for side in sides.values():
        side.close()
    return _cases(samples, "executor", family.num_tenants)


def _cases(samples: Mapping[str, Samples], reference: str, tenants: int) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for name, taken in samples.items():
        ratio = taken.ratio_to(samples[reference])
        cases[name] = {
            "tokens_per_s": round(tenants / taken.median, 1),
            **taken.summary(),
            "ratio": ratio["ratio"],
            "ratio_p10": ratio["p10"],
            "ratio_p90": ratio["p90"],
        }
    return cases


if __name__ == "__main__":
    main()
