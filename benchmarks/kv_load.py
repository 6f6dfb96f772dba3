"""Throughput and waits under approximate reuse, on random weights of a shape."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.families import Family
from benchmarks.kv_speed import Prompts, engine_for, line_end_of
from benchmarks.kv_tasks import NUM_DOCUMENTS
from benchmarks.sides import first_token
from blockzoo.runtime import SamplingParams
from blockzoo.runtime.api.request import KVReuse
from blockzoo.runtime.approx.config import ReuseConfig

SIDES: dict[str, KVReuse] = {"full": "off", "exact prefix": "exact", "approximate": "approx"}


def under_load(family: Family, args: argparse.Namespace) -> dict[str, Any]:
    """Requests that arrive at random (Poisson), below and beyond what full prefills can keep up with.

    Returns:
        By traffic, load and side: tokens/s (prompts and answers), first tokens (p50, p99), and the p99 wait
        by the share of a prompt's work that reuse spared.
    """
    given = ReuseConfig(
        recompute=args.share, edit_recompute=args.share, refresh=args.refresh, max_deviation=1e9
    )
    traffic: dict[str, tuple[ReuseConfig, Callable[[Prompts], list[int]]]] = {
        "documents": (given, Prompts.draw),
        "edits": (ReuseConfig(), Prompts.edited_early),
    }
    full_s = _full_prefill_s(family, args)
    return {
        kind: {
            f"{load:g} of full prefill": {
                name: _serve(family, args, how, *traffic[kind], load / full_s) for name, how in SIDES.items()
            }
            for load in args.loads
        }
        for kind in args.traffic
    }


def _full_prefill_s(family: Family, args: argparse.Namespace) -> float:
    """Seconds of one, alone: the median of three after one that warms up."""
    engine = engine_for(family, args, NUM_DOCUMENTS, ReuseConfig())
    prompts = Prompts(family.shape.vocab_size, line_end_of(engine), args.length)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    times = [first_token(engine, family.tenants[0], prompts.draw(), params, "off")[0] for _ in range(4)]
    return float(np.median(times[1:]))


def _serve(
    family: Family,
    args: argparse.Namespace,
    how: KVReuse,
    config: ReuseConfig,
    draw: Callable[[Prompts], list[int]],
    rate: float,
) -> dict[str, Any]:
    num_known = 2 * NUM_DOCUMENTS
    engine = engine_for(family, args, num_known, config)
    prompts = Prompts(family.shape.vocab_size, line_end_of(engine), args.length, num_known)
    model = family.tenants[0]
    warm = SamplingParams(max_tokens=1, temperature=0.0)
    for donor in prompts.donors():
        first_token(engine, model, donor, warm)
    due = np.cumsum(np.random.default_rng(1).exponential(1 / rate, args.requests))
    params = SamplingParams(max_tokens=args.answer, temperature=0.0, ignore_eos=True)
    waiting = [(float(at), str(i), draw(prompts)) for i, at in enumerate(due)][::-1]
    arrived: dict[str, float] = {}
    first: dict[str, float] = {}
    before = engine.metrics()
    start = time.perf_counter()
    while waiting or engine.has_unfinished():
        now = time.perf_counter() - start
        while waiting and waiting[-1][0] <= now:
            at, request_id, prompt = waiting.pop()
            arrived[request_id] = at
            engine.add_request(request_id, model, prompt, params, kv_reuse=how)
        if not engine.has_unfinished():
            time.sleep(max(0.0, waiting[-1][0] - now))
            continue
        for output in engine.step():
            if output.error is not None:
                raise SystemExit(output.error)
            if output.request_id not in first:
                first[output.request_id] = time.perf_counter() - start - arrived[output.request_id]
    seconds = time.perf_counter() - start
    p50, p99 = np.percentile(list(first.values()), (50, 99)) * 1e3
    waits = engine.metrics().wait_seconds
    return {
        "tokens_per_s": round(args.requests * (args.length + args.answer) / seconds, 1),
        "answer_tokens_per_s": round(args.requests * args.answer / seconds, 2),
        "first_token_p50_ms": round(float(p50), 1),
        "first_token_p99_ms": round(float(p99), 1),
        "requests_per_s": round(args.requests / seconds, 3),
        "wait_p99_s_by_spared_percent": {
            label: histogram.quantile(0.99)
            for label, histogram in waits.items()
            if histogram.count > before.wait_seconds[label].count
        },
    }
