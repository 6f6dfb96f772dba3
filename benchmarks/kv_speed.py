"""Time to first token and throughput under approximate reuse, on random weights of a shape."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from benchmarks.common import genai_missing, interleave
from benchmarks.families import Family
from benchmarks.kv_sides import ENGINE, time_sides
from benchmarks.kv_tasks import NUM_DOCUMENTS
from benchmarks.sides import Settings, first_token
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.request import KVReuse
from blockzoo.runtime.approx.config import ReuseConfig

QUESTION = 32  # tokens of it
EDIT = 100  # where one begins
_LINE = 12  # tokens of one
EDITED = "a line edited, default"


class Prompts:
    """Known documents of random tokens, in lines, in a random order between words of each prompt's own.

    Args:
        vocab: size of the vocabulary.
        line_end: a token of it.
        length: tokens of a prompt.
        num_known: documents; prompts have `NUM_DOCUMENTS` of them.
    """

    def __init__(self, vocab: int, line_end: int, length: int, num_known: int = NUM_DOCUMENTS) -> None:
        self._rng, self._vocab, self._line_end = np.random.default_rng(0), vocab, line_end
        size = (length - 2 * QUESTION) // NUM_DOCUMENTS
        self._documents = [self._words(size) for _ in range(num_known)]
        self._first_donor: list[int] = []

    def _words(self, count: int) -> list[int]:
        drawn = self._rng.integers(2, self._vocab, count)
        drawn[_LINE - 1 :: _LINE] = self._line_end
        found: list[int] = drawn.tolist()
        return found

    def draw(self) -> list[int]:
        """A prompt."""
        order = self._rng.permutation(len(self._documents))[:NUM_DOCUMENTS]
        middle = [token for i in order for token in self._documents[i]]
        return self._words(QUESTION) + middle + self._words(QUESTION)

    def edited(self) -> list[int]:
        """The first donor with other words early on, and another question."""
        donor = self._first_donor
        return [*donor[:EDIT], *self._words(_LINE), *donor[EDIT + _LINE : -QUESTION], *self._words(QUESTION)]

    def donors(self) -> list[list[int]]:
        """Prompts that make all documents known."""
        known = self._documents
        parts = [known[i : i + NUM_DOCUMENTS] for i in range(0, len(known), NUM_DOCUMENTS)]
        found = [[*self._words(QUESTION), *chain(*part), *self._words(QUESTION)] for part in parts]
        self._first_donor = found[0]
        return found


class Stopwatch:
    """Seconds spent in some calls of an engine, by name."""

    def __init__(self, engine: LLMEngine) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        for cache in engine._zoo.caches.values():
            self._watch(cache, "borrow", "match")
        for executor in engine._zoo.executors.values():
            self._watch(executor.kv, "borrow", "copy")
            self._watch(executor, "run", "compute")

    def _watch(self, owner: object, method: str, name: str) -> None:
        call = getattr(owner, method)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds[name] += time.perf_counter() - start

        setattr(owner, method, timed)


def _engine(family: Family, args: argparse.Namespace, num_known: int, reuse: ReuseConfig) -> LLMEngine:
    tokens = args.length * (num_known // NUM_DOCUMENTS + 2 * args.running)
    return LLMEngine(
        family.zoo().path,
        EngineConfig(
            precision=args.precision,
            num_threads=args.threads,
            kv_cache_bytes=2 * tokens * family.shape.kv_bytes_per_token,
            max_num_seqs=args.running,
            approximate=reuse,
        ),
    )


def _line_end(engine: LLMEngine) -> int:
    tokenizer = next(iter(engine._zoo.models.values())).tokenizer
    return int(np.flatnonzero(tokenizer.ends_line)[0])


def time_to_first_token(family: Family, args: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, on one request at a time; medians, ratios to a full prefill, and where time goes."""
    engine = _engine(family, args, NUM_DOCUMENTS, ENGINE)
    prompts = Prompts(family.shape.vocab_size, _line_end(engine), args.length)
    model, watch = family.tenants[0], Stopwatch(engine)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    for donor in prompts.donors():
        first_token(engine, model, donor, params)
    parts: dict[str, list[dict[str, float]]] = defaultdict(list)

    def ours(
        name: str, how: KVReuse, config: ReuseConfig | None, draw: Callable[[], list[int]] = prompts.draw
    ) -> list[float]:
        if config is not None:
            engine.configure_reuse(config)
        prompt = draw()
        watch.seconds.clear()
        seconds, _ = first_token(engine, model, prompt, params, how)
        parts[name].append(dict(watch.seconds) | {"all": seconds})
        return [seconds]

    turns: dict[str, Callable[[], list[float]]] = {
        name: partial(ours, name, *side) for name, side in time_sides().items()
    }
    turns[EDITED] = partial(ours, EDITED, "approx", replace(ReuseConfig(), refresh=0), prompts.edited)
    if genai_missing() is None:
        turns["GenAI, prefix cache"] = _genai(family, args, engine, prompts)
    samples = interleave(turns, args.repeats)
    return {
        name: taken.summary()
        | {"to_full": taken.ratio_to(samples["full"])}
        | {"parts_ms": {part: _median_ms(parts[name], part) for part in ("match", "copy", "compute")}}
        for name, taken in samples.items()
    }


def _median_ms(runs: list[dict[str, float]], part: str) -> float:
    return round(1e3 * float(np.median([run.get(part, 0.0) for run in runs])), 3) if runs else 0.0


def _genai(
    family: Family, args: argparse.Namespace, engine: LLMEngine, prompts: Prompts
) -> Callable[[], list[float]]:
    from benchmarks.peers.genai import GenAISide, ir_folder

    precision = engine._zoo.engine_facts["precision"]
    settings = Settings(
        precision=precision,  # type: ignore[arg-type]
        num_threads=args.threads,
        max_seqs=1,
        context=args.length,
        max_tokens=512,
        longest_prompt=4 * args.length,
    )
    side = GenAISide(ir_folder(family, family.tenants[0]), settings)
    for donor in prompts.donors():
        side.generate(np.array(donor), 1)

    def once() -> list[float]:
        prompt = np.array(prompts.draw())
        start = time.perf_counter()
        side.generate(prompt, 1)
        return [time.perf_counter() - start]

    return once


# ---- many requests


def under_load(family: Family, args: argparse.Namespace, full_s: float) -> dict[str, Any]:
    """Requests that arrive at random (Poisson), below and beyond what full prefills can keep up with.

    Args:
        full_s: seconds of one full prefill, alone.

    Returns:
        By load and side: tokens/s (prompts and answers), first tokens (p50, p99), and the p99 wait by the
        share of a prompt's work that reuse spared.
    """
    sides: dict[str, KVReuse] = {"full": "off", "exact prefix": "exact", "approximate": "approx"}
    config = ReuseConfig(
        recompute=args.share, edit_recompute=args.share, refresh=args.refresh, max_deviation=1e9
    )
    return {
        f"{load:g} of full prefill": {
            name: _serve(family, args, how, config, load / full_s) for name, how in sides.items()
        }
        for load in args.loads
    }


def _serve(
    family: Family, args: argparse.Namespace, how: KVReuse, config: ReuseConfig, rate: float
) -> dict[str, Any]:
    num_known = 2 * NUM_DOCUMENTS
    engine = _engine(family, args, num_known, config)
    prompts = Prompts(family.shape.vocab_size, _line_end(engine), args.length, num_known)
    model = family.tenants[0]
    warm = SamplingParams(max_tokens=1, temperature=0.0)
    for donor in prompts.donors():
        first_token(engine, model, donor, warm)
    due = np.cumsum(np.random.default_rng(1).exponential(1 / rate, args.requests))
    params = SamplingParams(max_tokens=args.answer, temperature=0.0, ignore_eos=True)
    waiting = [(float(at), str(i), prompts.draw()) for i, at in enumerate(due)][::-1]
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
