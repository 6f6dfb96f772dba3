"""Time to first token under approximate reuse, on random weights of a shape."""

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
EDITED, ADDED = "a line edited, default", "a line added, default"


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
        self._donors: list[list[int]] = []

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

    def edited(self, start: int = EDIT, replaced: int = _LINE) -> list[int]:
        """The first donor with a line at `start` in the place of some tokens, and another question."""
        donor = self._donors[0]
        rest = donor[start + replaced : -QUESTION]
        return [*donor[:start], *self._words(_LINE), *rest, *self._words(QUESTION)]

    def edited_early(self) -> list[int]:
        """The same, anywhere in the first quarter."""
        return self.edited(int(self._rng.integers(len(self._donors[0]) // 4)))

    def donors(self) -> list[list[int]]:
        """Prompts that make all documents known."""
        known = self._documents
        parts = [known[i : i + NUM_DOCUMENTS] for i in range(0, len(known), NUM_DOCUMENTS)]
        self._donors = [[*self._words(QUESTION), *chain(*part), *self._words(QUESTION)] for part in parts]
        return self._donors


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


def engine_for(family: Family, args: argparse.Namespace, num_known: int, reuse: ReuseConfig) -> LLMEngine:
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


def line_end_of(engine: LLMEngine) -> int:
    tokenizer = next(iter(engine._zoo.models.values())).tokenizer
    return int(np.flatnonzero(tokenizer.ends_line)[0])


def time_to_first_token(family: Family, args: argparse.Namespace, edits_alone: bool) -> dict[str, Any]:
    """All sides in turn, on one request at a time; medians, ratios to a full prefill, and where time goes."""
    engine = engine_for(family, args, NUM_DOCUMENTS, ENGINE)
    prompts = Prompts(family.shape.vocab_size, line_end_of(engine), args.length)
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
        name: partial(ours, name, *side)
        for name, side in time_sides().items()
        if name == "full" or not edits_alone
    }
    default = replace(ReuseConfig(), refresh=0)
    turns[EDITED] = partial(ours, EDITED, "approx", default, prompts.edited)
    turns[ADDED] = partial(ours, ADDED, "approx", default, partial(prompts.edited, replaced=0))
    if not edits_alone and genai_missing() is None:
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
