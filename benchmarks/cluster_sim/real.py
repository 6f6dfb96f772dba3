"""The simulator against the real engine: the same requests, with costs of steps fitted to other ones.

A burst gives the rate at which the engine is saturated, and with requests at random times the costs of steps;
then three loads run on the engine and in the simulation, all in one process, a step after the other, arrivals
between them. Simulated is twice: with those costs, and with how far the load's own steps were off them, as
a shared machine is not always as fast.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster_sim.events import Clock
from benchmarks.cluster_sim.lanes import Lane, work_of
from benchmarks.cluster_sim.traffic import App, Mix, Request, make_requests
from benchmarks.families import make_family
from blockzoo.engines.base import pages_for
from blockzoo.runtime.api.request import SamplingParams
from blockzoo.runtime.exec.topology import Family
from blockzoo.runtime.serve.config import EngineConfig
from blockzoo.runtime.serve.llm_engine import LLMEngine
from blockzoo.runtime.serve.scheduler import Scheduled
from blockzoo.runtime.serve.step_pace import StepPace

MIX = Mix(prompt=96.0, answer=24.0, sigma=0.5, turns=1.0, system=0)
LOADS = (0.3, 0.6, 0.9)
_HINGES = (4, 8, 16, 32, 128)  # rows at which a step's cost may bend
_BURST = 120  # requests at once
_LEAST_S = 1e-4  # of a step


class Features:
    """What a step's time depends on, as seen from the schedule."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] = ()

    def of(self, items: Sequence[Scheduled]) -> np.ndarray:
        """Float [n]: 1, whether its shape is new, chains, rows and their hinges, attention, logits."""
        works = [work_of(item) for item in items]
        shape = tuple(
            sorted(
                (i.seq.model, i.num_tokens, pages_for(i.seq.num_computed + i.num_tokens) // 8) for i in items
            )
        )
        is_new, self._last = shape != self._last, shape
        rows = sum(work.rows for work in works)
        by_chain = Counter[str]()
        for item, work in zip(items, works, strict=True):
            by_chain[item.seq.model] += work.rows
        return np.array(
            [
                1.0,
                is_new,
                len(by_chain),
                rows,
                *(max(0, rows - hinge) for hinge in _HINGES),
                sum(max(0, count - 8) for count in by_chain.values()),
                sum(work.attended for work in works) / 1e3,
                sum(work.logit_rows for work in works),
            ]
        )


@dataclass(frozen=True, slots=True)
class Steps:
    """Of a run on the engine."""

    features: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step: a weight for each feature; and how far steps were off, as ratios."""

    weights: np.ndarray
    ratios: np.ndarray

    @classmethod
    def fitted(cls, features: np.ndarray, seconds: np.ndarray) -> StepCosts:
        """Least squares on relative errors, no weight of a cost below 0 (hinges may bend either way)."""
        used = list(range(features.shape[1]))
        free = set(range(4, 4 + len(_HINGES)))
        while True:
            scale = 1 / np.sqrt(seconds)
            found = np.linalg.lstsq(features[:, used] * scale[:, None], seconds * scale, rcond=None)[0]
            bad = [
                place for place, weight in zip(used, found, strict=True) if weight < 0 and place not in free
            ]
            if not bad:
                break
            used.remove(bad[0])
        weights = np.zeros(features.shape[1])
        weights[used] = found
        return cls(weights, np.ones(1)).as_in(Steps(features, seconds))

    def predicted(self, features: np.ndarray) -> np.ndarray:
        """Seconds of steps [n, features]."""
        return np.maximum(features @ self.weights, _LEAST_S)

    def as_in(self, steps: Steps) -> StepCosts:
        """The costs as the machine was in a run: steps are off as they were there, and take as long in all,
        though the largest ratios are of small ones."""
        predicted = self.predicted(steps.features)
        ratios = steps.seconds / predicted
        return replace(self, ratios=ratios * steps.seconds.sum() / predicted.sum() / ratios.mean())

    def seconds(self, features: np.ndarray, rng: np.random.Generator) -> float:
        """Of a step, with what such steps are off by at random."""
        return float(self.predicted(features)) * float(rng.choice(self.ratios))


class Recorded(LLMEngine):
    """The engine, noting of each step what it had to do."""

    def __init__(self, zoo: Path, config: EngineConfig) -> None:
        super().__init__(zoo, config)
        self.features = Features()
        self.last: np.ndarray | None = None

    def _execute(self, family: Family, items: list[Scheduled]) -> Any:
        self.last = self.features.of(items)
        return super()._execute(family, items)


def on_engine(engine: Recorded, requests: Sequence[Request]) -> Steps:
    """Serve requests at their times; notes in them when tokens came."""
    left, by_id = list(requests)[::-1], {str(request.number): request for request in requests}
    features: list[np.ndarray] = []
    seconds: list[float] = []
    gc.collect()
    start = time.monotonic()
    while left or engine.has_unfinished():
        begin = time.monotonic()
        while left and left[-1].arrival <= begin - start:
            request = left.pop()
            params = SamplingParams(max_tokens=len(request.answer), temperature=0.0, ignore_eos=True)
            engine.add_request(str(request.number), request.app, request.tokens, params)
        if not engine.has_unfinished():
            time.sleep(max(0.0, left[-1].arrival - (time.monotonic() - start)))
            continue
        engine.last = None
        outputs = engine.step()
        now = time.monotonic()
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            request = by_id[output.request_id]
            request.first_token = now - start if request.first_token is None else request.first_token
            if output.finished:
                request.end = now - start
        if engine.last is not None:
            features.append(engine.last)
            seconds.append(now - begin)
    return Steps(np.array(features), np.array(seconds))


def in_simulation(engine: Recorded, requests: Sequence[Request], costs: StepCosts, seed: int) -> None:
    """The same in simulated time, with the engine's settings and as many pages."""
    clock, features, rng = Clock(), Features(), np.random.default_rng([seed, 5])
    layers = {chain.num_layers for chain in engine._zoo.topology.chains}
    (cache,) = engine._zoo.caches.values()
    lane = Lane(
        clock,
        lambda _, items, done: clock.after(costs.seconds(features.of(items), rng), done),
        cache.pool.num_pages,
        engine.config.scheduler(),
        layers=layers.pop(),
        pace=StepPace(),
    )
    for request in requests:
        clock.after(request.arrival, partial(lane.submit, request))
    clock.run()
    assert all(request.end is not None for request in requests)


def validate(workdir: Path, shape: str, seconds: float, threads: int | None, seed: int = 0) -> dict[str, Any]:
    """The comparison, as it is saved."""
    family = make_family(workdir, shape, 8)
    config = EngineConfig(num_threads=threads, max_waiting=1 << 16, kv_cache_bytes=512 << 20)
    engine = Recorded(family.zoo().path, config)
    apps = [App(name, shape, "top", 1 / len(family.tenants)) for name in family.tenants]
    vocab = family.shape.vocab_size

    def requests(rate: float, duration: float, number: int) -> list[Request]:
        return make_requests(apps, MIX, rate, duration, 100 * seed + number, vocab)

    burst = [replace(request, arrival=0.0) for request in requests(_BURST / 10.0, 10.0, 1)]
    on_engine(engine, burst[: len(burst) // 3])  # until shapes are known, and memory has been touched
    for number, request in enumerate(burst):
        request.number += 10_000 + number
        request.first_token = request.end = None
    taken = [on_engine(engine, burst)]
    saturated = len(burst) / max(request.end or 0.0 for request in burst)
    traces: dict[float, tuple[list[Request], Steps]] = {}
    for number, load in enumerate(LOADS):
        taken.append(on_engine(engine, requests(load * saturated, seconds / 2, 2 + number)))
        trace = requests(load * saturated, seconds, 20 + number)
        traces[load] = trace, on_engine(engine, trace)
    taken.append(on_engine(engine, requests(LOADS[0] * saturated, seconds / 2, 10)))
    costs = StepCosts.fitted(
        np.concatenate([steps.features for steps in taken]),
        np.concatenate([steps.seconds for steps in taken]),
    )
    loads = {}
    for load, (trace, steps) in traces.items():
        real = _figures(trace)
        own = costs.as_in(steps)
        slowdown = float(steps.seconds.sum() / costs.predicted(steps.features).sum())
        found = {
            name: {"real": _round(seconds), "simulated": 0.0, "off": 0.0, "off at its speed": 0.0}
            for name, seconds in real.items()
        }
        for off, used in (("off", costs), ("off at its speed", own)):
            simulated = []
            for repeat in range(5):
                for request in trace:
                    request.first_token = request.end = None
                in_simulation(engine, trace, used, repeat)
                simulated.append(_figures(trace))
            for name, case in found.items():
                middle = float(np.median([figures[name] for figures in simulated]))
                case["simulated"] = case["simulated"] if case["simulated"] else _round(middle)
                case[off] = _round(middle / real[name] - 1)
        loads[str(load)] = {**found, "requests": len(trace), "slowdown": _round(slowdown)}
    return {
        "saturated_requests_per_s": _round(saturated),
        "step_weights_ms": [_round(1e3 * weight) for weight in costs.weights],
        "step_ratio_p10_p90": [_round(float(x)) for x in np.percentile(costs.ratios, (10, 90))],
        "steps": sum(len(steps.seconds) for steps in taken),
        "loads": loads,
    }


def _figures(requests: Sequence[Request]) -> dict[str, float]:
    """Seconds."""
    found = {}
    for name, ends in (
        ("request", [r.end for r in requests]),
        ("first token", [r.first_token for r in requests]),
    ):
        took = [end - r.arrival for r, end in zip(requests, ends, strict=True) if end is not None]
        assert len(took) == len(requests)
        for share in (50, 95):
            found[f"{name} p{share}"] = float(np.percentile(took, share))
    return found


def _round(value: float) -> float:
    return float(f"{value:.4g}")
