"""Approximate KV reuse: what it saves until the first token and under load, and what it costs in answers.

    python -m benchmarks.kv_reuse [--shape 110m|0.5b] [--parts quality,time,edits,load] [--model FOLDER]

Prompts are made of known documents in another order, between words of their own, so that no prefix is known:

    full                    no reuse: the ceiling of quality, the price of it
    exact prefix            what is exact: nothing here
    naive                   K and V taken over as they are, K rotated to its new place
    query                   the lines that the question points at are computed anew
    query, pages            the pages that it points at
    ... and heads of 8      of them the first eight tokens of each run in any case
    head of run (EPIC)      the first tokens of each run
    deviation (CacheBlend)  where V deviates the most after two layers that run in full
    DHD                     that times the attention from the question (KVShare), prefill stage, in pages
    random                  the control
    ..., N n                n tokens are computed anew beside each generated one (DHD's decode stage)

Quality is taken on trained weights, each side following the same answer: are all its tokens the likeliest,
are the likeliest those of the full prefill, and KL from its distributions. Time is taken on random weights of
a shape; matching, copying, looking and computing count; `edits` takes only that of prompts with one line
changed, which "time" does too. Tables, JSON and pictures.
"""

from __future__ import annotations

import argparse
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.common import arguments, machine_facts, print_table, save_report
from benchmarks.families import made_once, make_family
from benchmarks.kv_load import under_load
from benchmarks.kv_plots import draw
from benchmarks.kv_quality import Judge, quality
from benchmarks.kv_speed import time_to_first_token
from benchmarks.kv_tasks import Tasks
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.zoo.demo.assemble import assemble

PARTS = ("quality", "time", "edits", "load")
TASKS = ("facts", "chains", "text")


def main() -> None:
    args = _parser().parse_args()
    model: Path | None = vars(args).pop("model")
    machine = machine_facts()
    results: dict[str, Any] = {}
    if "quality" in args.parts:
        results["quality"] = all_quality(args, model)
    if {"time", "edits"} & set(args.parts):
        family = make_family(args.workdir, args.shape, 1)
        results["first token"] = time_to_first_token(family, args, "time" not in args.parts)
    if "load" in args.parts:
        results["load"] = under_load(make_family(args.workdir, args.shape, 1), args)
    show(results)
    print(save_report("kv_reuse", args, machine, results))
    for path in draw(results, args.out, args.shape):
        print(path)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=5)
    add = parser.add_argument
    add("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    add("--samples", type=int, default=100, help="prompts a task of which quality is taken (100)")
    add("--tasks", type=lambda text: text.split(","), default=list(TASKS), help=",".join(TASKS))
    add("--sides", type=lambda text: text.split(";"), help="of quality, by name, between ';' (all)")
    add("--prompt", type=int, default=1024, help="tokens of a prompt of which quality is taken (1024)")
    add(
        "--model",
        type=Path,
        help="what blockzoo.zoo.demo.train_chains wrote; without: the demo base, and no chains",
    )
    add("--length", type=int, default=2048, help="tokens of a timed prompt (2048)")
    add(
        "--loads", type=float, nargs="+", default=[0.5, 2.0, 4.0], help="arrivals, in full prefills at a time"
    )
    add(
        "--traffic",
        nargs="+",
        choices=("documents", "edits"),
        default=["documents", "edits"],
        help="under load: known documents in another order, by --share and --refresh; a prompt with one line "
        "of its first quarter changed, by the defaults",
    )
    add("--requests", type=int, default=48, help="under each load (48)")
    add("--answer", type=int, default=16, help="tokens of an answer under load (16)")
    add("--running", type=int, default=8, help="requests that run at once (8)")
    share, refresh = 0.2, ReuseConfig().refresh
    add("--share", type=float, default=share, help=f"computed anew under load ({share})")
    add("--refresh", type=int, default=refresh, help=f"... beside each generated token ({refresh})")
    return parser


def all_quality(args: argparse.Namespace, model: Path | None) -> dict[str, dict[str, dict[str, float]]]:
    """By task and side."""
    tasks = list(args.tasks)
    if model is None:
        print(
            "no chains, and prompts longer than the demo base was trained for: no --model was given; train "
            "one with python -m blockzoo.zoo.demo.train_chains (two hours and a half), and name its folder",
            file=sys.stderr,
        )
        tasks = [task for task in tasks if task != "chains"]
        zoo = made_once(args.workdir / "demo", _make_demo) / "zoo"
    else:
        zoo = made_once(args.workdir / "chains", partial(_compile, {"chains": model})) / "zoo"
    folder = model or args.workdir / "demo" / "models" / "base"
    made = Tasks(Tokenizer.from_file(str(folder / "tokenizer.json")), args.prompt)
    samples = {"facts": made.facts, "chains": made.chains, "text": made.text}
    judge = Judge(zoo, "base" if model is None else "chains", args.threads, args.sides)
    return {task: quality(judge, samples[task](random.Random(task)), args.samples) for task in tasks}


def show(results: dict[str, Any]) -> None:
    """The tables."""
    for task, sides in results.get("quality", {}).items():
        rows = [(name, s["correct"], s["agrees"], s["kl"]) for name, s in sides.items()]
        print_table(f"{task}: trained weights", ("", "all right", "top-1 as full", "KL, nats"), rows)
    if "first token" in results:
        timed = [
            (name, s["median_ms"], 1 / s["to_full"]["ratio"], *s["parts_ms"].values())
            for name, s in results["first token"].items()
        ]
        columns = ("", "first token ms", "times faster", "match ms", "copy ms", "compute ms")
        print_table("one request, known documents in another order; medians", columns, timed)
    for kind, loads in results.get("load", {}).items():
        for load, sides in loads.items():
            served = [
                (name, *(s[key] for key in ("tokens_per_s", "first_token_p50_ms", "first_token_p99_ms")))
                for name, s in sides.items()
            ]
            headings = ("", "tokens/s", "first token p50 ms", "p99 ms")
            print_table(f"{kind}, arrivals at {load}", headings, served)
            for name, side in sides.items():
                print(f"  {name}: p99 wait in s by percent spared: {side['wait_p99_s_by_spared_percent']}")


def _compile(checkpoints: dict[str, Path], folder: Path) -> None:
    compile_models(checkpoints, folder / "zoo", CompileOptions(profile=False, verify=False))


def _make_demo(folder: Path) -> None:
    _compile({"base": assemble(folder / "models")["base"]}, folder)


if __name__ == "__main__":
    main()
