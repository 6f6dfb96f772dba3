"""What is run: the published setting by load and mix, what each part of it brings, a far head, 1000 GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.cluster_sim.devices import H200, PUBLISHED, Link, Machines
from benchmarks.cluster_sim.drift import HORIZON_S, changing
from benchmarks.cluster_sim.runs import Outcome, Setting, run
from benchmarks.cluster_sim.sides import (
    BLOCKS_SIDE,
    PER_MODEL,
    Side,
    make_plan,
    make_task,
    pieces_and_chains,
    token_rates,
)
from benchmarks.cluster_sim.traffic import Mix, make_apps
from blockzoo.zoo.placement import PlacementError

SLOWER = 3.0  # times what tokens take (p95) in a nearly idle cluster: where a side is at its capacity
_IDLE = 2.0  # requests a second
RATES = (16.0, 32.0, 48.0, 64.0, 80.0)  # requests a second
PUBLISHED_SETTING = Setting(PUBLISHED, 30, Mix(), 40.0)
MIXES: Mapping[str, Mix] = {
    "as above": Mix(),
    "LoRAs alone": Mix(kinds={"lora": 1.0}),
    "last quarter alone": Mix(kinds={"top": 1.0}),
    "full fine-tunes alone": Mix(kinds={"full": 1.0}),
    "grouped-query base (8B)": Mix(bases={"8B": 1.0}),
}
ABLATIONS: Mapping[str, Side] = {
    "all of it": BLOCKS_SIDE,
    "placed without regard to links": replace(BLOCKS_SIDE, placement="blind"),
    "placed at random": replace(BLOCKS_SIDE, placement="random"),
    "no replicas": replace(BLOCKS_SIDE, replicas=False),
    "KV: stay with the owner": replace(BLOCKS_SIDE, coordination="stay"),
    "KV: move pages": replace(BLOCKS_SIDE, coordination="move"),
    "KV: compute anew": replace(BLOCKS_SIDE, coordination="anew"),
    "no batches over applications": replace(BLOCKS_SIDE, per_block=False),
    "speculation, half the guesses right": replace(BLOCKS_SIDE, chance=0.5),
    "speculation, 0.8 of them": replace(BLOCKS_SIDE, chance=0.8),
}


def capacity(setting: Setting, side: Side, limit_s: float, seed: int) -> float:
    """Requests a second at which a token takes so long (p95), to about 10 %; 0 where none can be placed."""
    low, high = 0.0, 64.0
    while _p95(setting, side, high, seed) <= limit_s and high < 1e4:
        low, high = high, 2 * high
    for _ in range(3):
        middle = (low + high) / 2
        low, high = (middle, high) if _p95(setting, side, middle, seed) <= limit_s else (low, middle)
    return low


def _p95(setting: Setting, side: Side, rate: float, seed: int) -> float:
    try:
        return run(setting, side, rate, seed).token_p95_s
    except PlacementError:
        return float("inf")


def published(seeds: Sequence[int], num_apps: int = 30) -> dict[str, Any]:
    """Against per-model serving, by load."""
    setting = replace(PUBLISHED_SETTING, num_apps=num_apps)
    loads = {
        f"{rate:g}": against(setting, BLOCKS_SIDE, PER_MODEL, [rate] * len(seeds), seeds) for rate in RATES
    }
    return {"applications": num_apps, "loads": loads}


def capacities(seeds: Sequence[int]) -> dict[str, Any]:
    """The requests a second at which tokens take thrice as long as in a nearly idle per-model cluster, and
    the arithmetic that is done there."""
    limits = [SLOWER * run(PUBLISHED_SETTING, PER_MODEL, _IDLE, seed).token_p95_s for seed in seeds]
    found = {
        name: [
            capacity(PUBLISHED_SETTING, side, limit, seed) for limit, seed in zip(limits, seeds, strict=True)
        ]
        for name, side in (("per-model", PER_MODEL), ("blocks", BLOCKS_SIDE))
    }
    return {
        "limit_token_p95_s": spread(limits),
        **{name: spread(rates) for name, rates in found.items()},
        "ratio": spread(np.array(found["blocks"]) / np.array(found["per-model"])),
        "useful_ratio": spread(_useful_ratios(PUBLISHED_SETTING, found, seeds)),
    }


def room(seed: int) -> dict[str, int]:
    """Applications that the solver finds room for on the published cluster, in tens."""
    return {"per-model": _most_apps(PER_MODEL, seed), "blocks": _most_apps(BLOCKS_SIDE, seed)}


def _most_apps(side: Side, seed: int, rate: float = 4.0) -> int:
    count = 10
    while count < 200:
        apps = make_apps(count, PUBLISHED_SETTING.mix, seed)
        pieces, chains = pieces_and_chains(apps, side.shared)
        rates = token_rates(apps, PUBLISHED_SETTING.mix, rate)
        try:
            make_plan(make_task(PUBLISHED, pieces, chains, rates, PUBLISHED_SETTING.mix, side), side, seed)
        except PlacementError:
            break
        count += 10
    return count - 10


def _useful_ratios(
    setting: Setting, found: Mapping[str, Sequence[float]], seeds: Sequence[int]
) -> list[float]:
    """Arithmetic of all GPUs, each side at its capacity."""
    ratios = []
    for place, seed in enumerate(seeds):
        blocks = run(setting, BLOCKS_SIDE, found["blocks"][place], seed)
        models = run(setting, PER_MODEL, found["per-model"][place], seed)
        ratios.append(blocks.useful / models.useful)
    return ratios


def against(
    setting: Setting, side: Side, other: Side, rates: Sequence[float], seeds: Sequence[int]
) -> dict[str, Any]:
    """Two sides at the same rates: medians over the seeds, and of the ratios their spread."""
    ours = [run(setting, side, rate, seed) for rate, seed in zip(rates, seeds, strict=True)]
    theirs = [run(setting, other, rate, seed) for rate, seed in zip(rates, seeds, strict=True)]

    def ratio(get: Callable[[Outcome], float]) -> dict[str, float]:
        return spread([get(a) / get(b) for a, b in zip(ours, theirs, strict=True)])

    return {
        "requests_per_s": spread(rates),
        "ours": medians(ours),
        "theirs": medians(theirs),
        "p50": ratio(lambda o: o.p50_s),
        "p95": ratio(lambda o: o.p95_s),
        "first_p95": ratio(lambda o: o.first_p95_s),
        "token_p95": ratio(lambda o: o.token_p95_s),
        "tokens_per_s": ratio(lambda o: o.tokens_per_s),
        "busy": ratio(lambda o: o.busy),
        "useful_busy": ratio(lambda o: o.useful_busy),
    }


def ablations(seeds: Sequence[int], rate: float) -> dict[str, Any]:
    """What each part brings, at a rate: against all of it."""
    full = [run(PUBLISHED_SETTING, BLOCKS_SIDE, rate, seed) for seed in seeds]
    results: dict[str, Any] = {"requests_per_s": rate, "sides": {}}
    for name, side in ABLATIONS.items():
        outcomes = [run(PUBLISHED_SETTING, side, rate, seed) for seed in seeds]
        results["sides"][name] = {
            **medians(outcomes),
            "p50": spread([a.p50_s / b.p50_s for a, b in zip(outcomes, full, strict=True)]),
            "p95": spread([a.p95_s / b.p95_s for a, b in zip(outcomes, full, strict=True)]),
        }
    return results


def mixes(seeds: Sequence[int], rate: float) -> dict[str, Any]:
    """Against per-model serving at a rate, for other fine-tunes."""
    found = {}
    for name, mix in MIXES.items():
        setting = replace(PUBLISHED_SETTING, mix=mix)
        found[name] = against(setting, BLOCKS_SIDE, PER_MODEL, [rate] * len(seeds), seeds)
    return {"requests_per_s": rate, "mixes": found}


def far(seeds: Sequence[int], rate: float = 4.0) -> dict[str, Any]:
    """Speculation where the head is 10 ms away from all workers: what is hidden of the link."""
    setting = replace(PUBLISHED_SETTING, head_link=Link(10e-3, float("inf")))
    sides = {
        f"{chance:g} of guesses right": replace(BLOCKS_SIDE, chance=chance or None)
        for chance in (0.0, 0.5, 0.8)
    }
    bare = [run(setting, BLOCKS_SIDE, rate, seed) for seed in seeds]
    found = {}
    for name, side in sides.items():
        outcomes = [run(setting, side, rate, seed) for seed in seeds]
        found[name] = {
            **medians(outcomes),
            "p50": spread([a.p50_s / b.p50_s for a, b in zip(outcomes, bare, strict=True)]),
        }
    return {"requests_per_s": rate, "sides": found}


DRIFTS: Mapping[str, dict[str, Any]] = {
    "the plan stays": {"horizon_s": None},
    f"it follows, what moves pays within {HORIZON_S:g} s": {"horizon_s": HORIZON_S},
    "it follows, whatever moves": {"horizon_s": float("inf")},
    "the later rates are known": {"horizon_s": None, "known": True},
}


def drift(seeds: Sequence[int], rate: float) -> dict[str, Any]:
    """Popularity is dealt anew in the middle of a run: requests behind that."""
    setting = replace(PUBLISHED_SETTING, seconds=120.0)
    runs = {name: [changing(setting, rate, seed, **how) for seed in seeds] for name, how in DRIFTS.items()}
    bare = [outcome for outcome, _ in next(iter(runs.values()))]
    found = {}
    for name, outcomes in runs.items():
        found[name] = {
            **medians([outcome for outcome, _ in outcomes]),
            "weights_moved_gb": spread([moved for _, moved in outcomes]),
            "p50": spread([a.p50_s / b.p50_s for (a, _), b in zip(outcomes, bare, strict=True)]),
            "p95": spread([a.p95_s / b.p95_s for (a, _), b in zip(outcomes, bare, strict=True)]),
        }
    return {"requests_per_s": rate, "sides": found}


def scale(seed: int, gpus: int = 1000, apps: int = 2000, seconds: float = 10.0) -> dict[str, Any]:
    """Many H200 in servers of eight, a head in each server."""
    machines = Machines(H200, (8,) * (gpus // 8))
    mix = Mix(bases={"7B": 0.4, "13B": 0.2, "8B": 0.4})
    setting = Setting(machines, apps, mix, seconds)
    start = time.perf_counter()
    outcome = run(setting, BLOCKS_SIDE, 3.0 * gpus, seed)
    took = time.perf_counter() - start
    return {
        "gpus": gpus,
        "applications": apps,
        "simulated_s": seconds,
        "took_s": round(took, 1),
        **outcome.numbers(),
    }


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, least and most."""
    low, middle, high = (float(f"{x:.4g}") for x in (min(values), np.median(values), max(values)))
    return {"median": middle, "least": low, "most": high}


def medians(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of each figure."""
    numbers = [outcome.numbers() for outcome in outcomes]
    return {name: float(f"{np.median([n[name] for n in numbers]):.4g}") for name in numbers[0]}
