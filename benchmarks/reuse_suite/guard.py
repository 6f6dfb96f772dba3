"""What a guard of approximate reuse catches, and what it costs (`ReuseConfig.guard`).

    python -m benchmarks.reuse_suite.guard ZOO RECORDS [--samples N] [--seed S] [--out DIR]

Every side runs along the full prefill's answer without a guard, alone, in turns with the full prefill, timed
by what the process has of the processor. RECORDS (JSON lines) keeps how sure it was and what went wrong; a
run goes on where one before has ended. Then a threshold is chosen on every other sample of the tasks that
settings may be chosen on, the lowest that catches so many of their wrong first tokens (`--catch`), and judged
on the others, and on tasks that are held out. What it holds back costs a full prefill more, and agrees.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine_facts, print_table, save_report
from benchmarks.kv_sides import ENGINE
from benchmarks.reuse_suite.held_out import HELD_OUT
from benchmarks.reuse_suite.judge import MEBIBYTE
from benchmarks.reuse_suite.sides import SIDES
from benchmarks.reuse_suite.tasks import TASKS, Sample
from benchmarks.reuse_suite.texts import CHARACTERS, Messages
from blockzoo.build.calibrate.follower import Follower, Run, agreement
from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.approx.state import margin

CHOSEN_ON = ("facts in one", "facts in two", "examples", "gist")
HELD = ("tables", "source files")
ALL = TASKS | HELD_OUT
ANSWER_TOKENS = 8
CURVE = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
Record = dict[str, Any]
"""Of a side on a sample: `task`, `number`, `side`; `margin`, by how much its likeliest first token leads, in
nats; `agrees`, of each token; `cost`, processor time to the first token, in full prefills'."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse_suite.guard", description=__doc__)
    add = parser.add_argument
    add("zoo", type=Path, help="a zoo of the family")
    add("records", type=Path, help="JSON lines, begun or gone on with")
    add("--models", nargs="+", default=["base", "extract", "support"], help="in turns")
    add("--sides", nargs="+", choices=list(SIDES), default=["composed 20 %"], metavar="SIDE")
    add("--samples", type=int, default=20, help="a task (20); half as many of those held out")
    add("--start", type=int, default=0, help="number of the first sample, where several runs share the work")
    add("--tokens", type=int, default=640, help="of prompts, about (640)")
    add("--seed", type=int, default=9)
    add("--catch", type=float, default=0.8, help="share of wrong first tokens (0.8)")
    add("--threads", type=int, help="compute threads; default: OpenVINO's")
    add("--out", type=Path, help="folder for the report; default: none is kept")
    args = parser.parse_args()
    machine = machine_facts()
    run(args)
    records = [json.loads(line) for line in args.records.read_text().splitlines()]
    results = {side: judged([r for r in records if r["side"] == side], args.catch) for side in args.sides}
    show(results)
    args.shape = f"smollm2-135m, {args.tokens} tokens, seed {args.seed}"
    for name in ("zoo", "records"):  # where they lay is nobody's business
        delattr(args, name)
    if args.out is not None:
        print(save_report("reuse_guard", args, machine, results))


# ---- runs


def run(args: argparse.Namespace) -> None:
    """All samples that are not there yet, of all tasks in turns."""
    done = set()
    if args.records.exists():
        known = [json.loads(line) for line in args.records.read_text().splitlines()]
        done = {(record["task"], record["number"]) for record in known}
    config = EngineConfig(
        precision="f32",
        num_threads=args.threads,
        kv_cache_bytes=1024 * MEBIBYTE,
        max_num_batched_tokens=1024,
        max_step_seconds=None,
        approximate=ENGINE,
    )
    follower: Follower | None = None
    for number in range(args.start, args.start + args.samples):
        for task in (*CHOSEN_ON, *(HELD if number % 2 == 0 else ())):
            if (task, number) in done:
                continue
            follower = follower or Follower(LLMEngine(args.zoo, config), time.process_time)
            model = args.models[number % len(args.models)]
            sample = ALL[task](random.Random(f"{task}/{args.seed}/{number}"), CHARACTERS * args.tokens)
            found = _records(follower, model, sample, args.sides, f"{task}/{number}")
            with args.records.open("a") as file:
                for record in found:
                    file.write(json.dumps({"task": task, "number": number, "model": model} | record) + "\n")


def _records(
    follower: Follower, model: str, sample: Sample, sides: Sequence[str], scope: str
) -> list[Record]:
    def text(messages: Messages) -> str:
        return follower.render(model, messages.as_dicts())

    def go(each: Run, max_tokens: int = ANSWER_TOKENS) -> Run:
        follower.run(model, [each], max_tokens, scope)
        return each

    for donor in sample.donors:
        go(Run(text(donor), "exact"), 1)
    prompt = text(sample.prompt)
    full = go(Run(prompt))
    records = []
    for side in sides:
        along = go(Run(prompt, "approx", SIDES[side], full.tokens), len(full.tokens))
        records.append(
            {
                "side": side,
                "agrees": agreement(full, along).tolist(),
                "margin": margin(along.logits[0]),
                "computed": along.recomputed,
                "cost": along.first_s / full.first_s,
            }
        )
    return records


# ---- what came of it


def judged(records: Sequence[Record], catch: float) -> dict[str, Any]:
    """The threshold that half of the samples give, and what it does to the others and to what is held out."""
    own = [record for record in records if record["task"] in CHOSEN_ON]
    fit = [record for record in own if record["number"] % 2 == 0]
    groups = {
        "chosen on": fit,
        "others": [record for record in own if record["number"] % 2],
        "held out": [record for record in records if record["task"] in HELD],
    }
    guard = threshold(fit, catch)
    found = {name: summary(group, guard) for name, group in groups.items() if group}
    tasks = {task: [record for record in records if record["task"] == task] for task in (*CHOSEN_ON, *HELD)}
    found |= {task: summary(group, guard) for task, group in tasks.items() if group}
    curve = {f"{each:g}": summary(records, each) for each in CURVE}
    return {"guard": guard, "groups": found, "all, by guard": curve}


def threshold(records: Sequence[Record], catch: float) -> float:
    """The lowest, in hundredths, that holds back so many of those with a wrong first token; 0 without any."""
    wrong = sorted(record["margin"] for record in records if not record["agrees"][0])
    return math.floor(100 * wrong[math.ceil(catch * len(wrong)) - 1] + 1) / 100 if wrong else 0.0


def summary(records: Sequence[Record], guard: float) -> dict[str, Any]:
    """Shares, with and without the guard."""
    back = np.array([record["margin"] < guard for record in records])
    first = np.array([not record["agrees"][0] for record in records])
    some = np.array([not all(record["agrees"]) for record in records])
    cost = np.array([record["cost"] for record in records])
    agrees = [np.array(record["agrees"]) for record in records]
    guarded = [np.ones_like(a) if b else a for a, b in zip(agrees, back, strict=True)]

    def share(of: np.ndarray, among: np.ndarray) -> float | None:
        return round(float(of[among].mean()), 3) if among.any() else None

    return {
        "samples": len(records),
        "held back": share(back, np.ones_like(back)),
        "first token wrong": int(first.sum()),
        "of these caught": share(back, first),
        "some token wrong": int(some.sum()),
        "of these caught too": share(back, some),
        "false alarms (first token right)": share(back, ~first),
        "false alarms (all right)": share(back, ~some),
        "area (first token)": area([-r["margin"] for r in records], first),
        "area (some token)": area([-r["margin"] for r in records], some),
        "equal top tokens": round(float(np.concatenate(agrees).mean()), 4),
        "equal top tokens, guarded": round(float(np.concatenate(guarded).mean()), 4),
        "cost": round(float(cost.mean()), 3),
        "cost, guarded": round(float((cost + back).mean()), 3),
    }


def area(signs: Sequence[float], wrong: np.ndarray) -> float | None:
    """Under the curve of what is caught over false alarms; None: all are alike."""
    values = np.array(signs)
    bad, good = values[wrong], values[~wrong]
    if not bad.size or not good.size:
        return None
    above = (bad[:, None] > good).mean() + 0.5 * (bad[:, None] == good).mean()
    return round(float(above), 2)


def show(results: dict[str, dict[str, Any]]) -> None:
    """The tables."""
    for side, found in results.items():
        for title, groups in (
            (f"{side}, guard {found['guard']} nats", found["groups"]),
            (f"{side}, all samples, by guard", found["all, by guard"]),
        ):
            names = list(next(iter(groups.values())))
            rows = [(name, *("" if g[name] is None else g[name] for g in groups.values())) for name in names]
            print_table(title, ("", *groups), rows)


if __name__ == "__main__":
    main()
