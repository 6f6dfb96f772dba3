"""Simulated clusters: the real scheduler, KV bookkeeping and placement over computed block times.

    python -m benchmarks.cluster_sim validate [--shape 110m]     against the real engine, on this machine
    python -m benchmarks.cluster_sim published [--apps N]        against per-model serving, by load
    python -m benchmarks.cluster_sim capacities                  ... and how much each side can do
    python -m benchmarks.cluster_sim ablations|mixes --rate R    what its parts do; other fine-tunes
    python -m benchmarks.cluster_sim far|drift                   a head 10 ms away; rates that change
    python -m benchmarks.cluster_sim room                        how many applications fit
    python -m benchmarks.cluster_sim scale [--gpus N]            many GPUs

All but `validate` need no model and no GPU. What is assumed is printed first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.cluster_sim import assumptions, parts, real
from benchmarks.common import machine_facts, print_table, save_report

PARTS = ("validate", "published", "capacities", "ablations", "mixes", "far", "drift", "room", "scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, default=5, help="(5)")
    parser.add_argument("--apps", type=int, help="applications (30; scale: 2000)")
    parser.add_argument("--gpus", type=int, default=1000, help="of scale (1000)")
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second (40)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load on the engine (30)")
    parser.add_argument("--shape", default="110m", help="of the models on the engine (110m)")
    parser.add_argument("--threads", type=int, help="compute threads of the engine")
    parser.add_argument("--workdir", type=Path, default=Path("out/bench"), help="(out/bench)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="(benchmarks/results)")
    args = parser.parse_args()
    machine = machine_facts()
    for line in assumptions.LINES if args.part != "validate" else assumptions.OF_VALIDATION:
        print(f"- {line}")
    seeds = range(args.seeds)
    results: dict[str, Any]
    if args.part == "validate":
        results = real.validate(args.workdir, args.shape, args.seconds, args.threads)
        _print_validation(results)
    elif args.part == "published":
        results = parts.published(seeds, args.apps or 30)
        _print_ratios(results["loads"], "requests a second")
    elif args.part == "capacities":
        results = parts.capacities(seeds)
        _print_capacities(results)
    elif args.part == "ablations":
        results = parts.ablations(seeds, args.rate)
        _print_sides(results["sides"])
    elif args.part == "mixes":
        results = parts.mixes(seeds, args.rate)
        _print_ratios(results["mixes"], "fine-tunes")
    elif args.part == "far":
        results = parts.far(seeds)
        _print_sides(results["sides"])
    elif args.part == "drift":
        results = parts.drift(seeds, args.rate)
        _print_sides(results["sides"])
    elif args.part == "room":
        results = {**parts.room(0)}
        print_table("applications that there is room for, in tens", ("", ""), list(results.items()))
    else:
        results = parts.scale(0, args.gpus, args.apps or 2000)
        print_table("scale", ("", "value"), [(name, value) for name, value in results.items()])
    results["assumptions"] = list(assumptions.LINES if args.part != "validate" else assumptions.OF_VALIDATION)
    name = f"{args.part}-{args.apps}" if args.part == "published" and args.apps else args.part
    print(save_report("cluster_sim", argparse.Namespace(**vars(args) | {"shape": name}), machine, results))


def _print_validation(results: dict[str, Any]) -> None:
    rows = [
        (f"{load} of {results['saturated_requests_per_s']:.3g} a second", name, *figures.values())
        for load, loads in results["loads"].items()
        for name, figures in loads.items()
        if isinstance(figures, dict)
    ]
    print_table("engine and simulation, s", ("load", "", "engine", "simulated", "off", "at its speed"), rows)


def _print_capacities(results: dict[str, Any]) -> None:
    print_table(
        "requests a second at the limit of a token's time",
        ("", "median", "least", "most"),
        [(name, *values.values()) for name, values in results.items()],
    )


def _print_ratios(results: dict[str, Any], title: str) -> None:
    names = ("p50", "p95", "token_p95", "busy", "useful_busy")
    rows = [
        (
            case,
            found["ours"]["p95_s"],
            found["theirs"]["p95_s"],
            *(f"{found[n]['median']:.2f} ({found[n]['least']:.2f}-{found[n]['most']:.2f})" for n in names),
        )
        for case, found in results.items()
    ]
    print_table("blocks relative to per-model serving", (title, "p95 s", "per-model", *names), rows)


def _print_sides(sides: dict[str, Any]) -> None:
    names = ("p50_s", "p95_s", "first_p95_s", "busy", "moved_gb")
    rows = [
        (
            side,
            *(found[name] for name in names),
            *(
                f"{found[n]['median']:.2f} ({found[n]['least']:.2f}-{found[n]['most']:.2f})"
                if n in found
                else ""
                for n in ("p50", "p95")
            ),
        )
        for side, found in sides.items()
    ]
    titles = ("p50 s", "p95 s", "first token", "busy", "KV moved", "p50", "p95")
    print_table("sides, and p50 and p95 relative to the first", ("", *titles), rows)


if __name__ == "__main__":
    main()
