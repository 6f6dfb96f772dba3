"""Approximate reuse on a real model: what each way keeps of a full prefill's answers, task by task.

    python -m benchmarks.reuse_suite ZOO [--models base ...] [--tasks ...] [--sides ...] [--samples N]

ZOO holds models of `benchmarks.smollm2_family`. Every side follows the full prefill's greedy answer, so that
its distributions can be compared; where one would have gone another way, it answers freely besides. Beside
them: a full prefill in bf16 (what users accept already), and one with the texts in another order (how much
order matters at all). `--held-out` takes the tasks on which no setting was chosen.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine_facts, print_table, save_report
from benchmarks.reuse_suite.held_out import HELD_OUT
from benchmarks.reuse_suite.judge import Judge, Verdict
from benchmarks.reuse_suite.sides import SIDES
from benchmarks.reuse_suite.tasks import TASKS
from benchmarks.reuse_suite.texts import CHARACTERS
from blockzoo.build.calibrate.follower import divergence
from blockzoo.build.calibrate.yardstick import Bf16
from blockzoo.zoo.store import Zoo

ALL = TASKS | HELD_OUT
Found = dict[str, dict[str, list[Verdict]]]
"""By task and side."""


def main() -> None:
    """The command line."""
    args = _parser().parse_args()
    machine, found = machine_facts(), run(args)
    results = {
        task: {side: summary(task_found, side) for side in task_found} for task, task_found in found.items()
    }
    show(results)
    args.shape = f"smollm2-135m, {' and '.join(map(str, args.tokens))} tokens, seed {args.seed}"
    for name in ("zoo", "cache"):  # where they lay is nobody's business
        delattr(args, name)
    if args.out is not None:
        print(save_report("reuse_suite_held_out" if args.held_out else "reuse_suite", args, machine, results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse_suite", description=__doc__)
    add = parser.add_argument
    add("zoo", type=Path, help="a zoo of the family")
    add("--models", nargs="+", default=["base", "extract", "support"], help="in turns")
    add("--held-out", action="store_true", help="the tasks on which no setting was chosen")
    add("--tasks", nargs="+", choices=list(ALL), help="default: all that settings may be chosen on")
    add(
        "--sides",
        nargs="+",
        choices=list(SIDES),
        default=["naive", "EPIC 15 %", "composed 20 %", "default"],
        metavar="SIDE",
        help="; ".join(SIDES),
    )
    add("--samples", type=int, default=15, help="a task (15)")
    add("--tokens", type=int, nargs="+", default=[640, 960], help="of prompts, about, in turns (640 960)")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="the sides alone: no yardsticks")
    add("--threads", type=int, help="compute threads; default: OpenVINO's")
    add("--cache", type=Path, default=Path("out/bench/reuse_suite"), help="for the yardstick's logits")
    add("--out", type=Path, help="folder for the report; default: none is kept")
    return parser


def run(args: argparse.Namespace) -> Found:
    """All samples of all tasks."""
    judge, bf16 = Judge(args.zoo, args.threads), Bf16(Zoo.open(args.zoo), args.cache)
    sides = {name: SIDES[name] for name in args.sides}
    found: Found = {}
    for task in args.tasks or (HELD_OUT if args.held_out else TASKS):
        found[task] = defaultdict(list)
        start = time.monotonic()
        for number in range(args.samples):
            model = args.models[number % len(args.models)]
            length = args.tokens[number // len(args.models) % len(args.tokens)]
            sample = ALL[task](random.Random(f"{task}/{args.seed}/{number}"), CHARACTERS * length)
            verdicts, ids, logits = judge.judge(model, sample, sides, args.quick)
            if not args.quick:
                rounded = bf16.logits(model, ids[:-1], len(logits))
                agrees = rounded.argmax(1) == logits.argmax(1)
                kl = divergence(logits, rounded)
                verdicts["bf16"] = Verdict(agrees, kl, bool(agrees.all()), None, 1.0)
            for name, verdict in verdicts.items():
                found[task][name].append(verdict)
        print(
            f"{task}: {args.samples} samples, {time.monotonic() - start:.0f} s, {len(ids)} tokens", flush=True
        )
        show({task: {side: summary(found[task], side) for side in found[task]}})
    return found


def summary(found: dict[str, list[Verdict]], side: str) -> dict[str, Any]:
    """Means of a side on a task; `score` as a share of what the context gives."""
    verdicts = found[side]

    def right(name: str) -> float | None:
        values = [v.right for v in found.get(name, ()) if v.right is not None]
        return float(np.mean(values)) if values else None

    score, full, bare = right(side), right("full"), right("bare")
    share = None
    if score is not None and full is not None and bare is not None and full > bare:
        share = (score - bare) / (full - bare)
    result: dict[str, Any] = {
        "samples": len(verdicts),
        "tokens": sum(v.agrees.size for v in verdicts),
        "agrees": float(np.concatenate([v.agrees for v in verdicts]).mean()),
        "kl": float(np.concatenate([v.kl for v in verdicts]).mean()),
        "same": float(np.mean([v.same for v in verdicts])),
        "right": score,
        "score": share,
        "recomputed": float(np.mean([v.recomputed for v in verdicts])),
    }
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}


def show(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """The tables."""
    for task, sides in results.items():
        rows = [
            (
                name,
                *(
                    s[key] if s[key] is not None else ""
                    for key in ("agrees", "kl", "same", "right", "score", "recomputed")
                ),
            )
            for name, s in sides.items()
        ]
        columns = ("", "equal top tokens", "KL, nats", "same answer", "right", "score", "computed")
        print_table(f"{task}, {sides['full']['samples']} samples", columns, rows)


if __name__ == "__main__":
    main()
