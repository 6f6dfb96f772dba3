"""Sides along the full prefill's answer, all at once: how near they are to it, and what they would answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.kv_sides import ENGINE
from benchmarks.reuse_suite.tasks import Sample
from benchmarks.reuse_suite.texts import Messages
from blockzoo.build.calibrate.follower import Follower, Run, agreement, divergence
from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.approx.config import ReuseConfig

ANSWER_TOKENS = 16
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a side on one sample.

    Attributes:
        agrees: bool [tokens], whether its likeliest token is that of the full prefill.
        kl: from the full prefill's distributions, nats [tokens].
        same: whether it would give the same answer.
        right: 0 or 1; None: the task has no right answer.
        recomputed: share of the prompt's tokens that were computed.
    """

    agrees: np.ndarray
    kl: np.ndarray
    same: bool
    right: float | None
    recomputed: float = 1.0


class Judge:
    """A zoo of real models.

    Args:
        zoo: its folder.
        num_threads: of the engine.
        kv_bytes: of its pool: what limits how many sides run at once.
    """

    def __init__(self, zoo: Path, num_threads: int | None = None, kv_bytes: int = 1536 * MEBIBYTE) -> None:
        config = EngineConfig(
            precision="f32",
            num_threads=num_threads,
            kv_cache_bytes=kv_bytes,
            max_num_batched_tokens=1024,
            max_step_seconds=None,
            approximate=ENGINE,
        )
        self._follower = Follower(LLMEngine(zoo, config))
        self._count = 0

    def judge(
        self, model: str, sample: Sample, sides: Mapping[str, ReuseConfig], quick: bool = False
    ) -> tuple[dict[str, Verdict], list[int], np.ndarray]:
        """Verdicts by side, with "full", "other order" and "bare" (the question alone, of which only `right`
        counts) where the sample has them; then the full prompt and answer as tokens, and its logits.
        `quick`: the sides alone."""
        self._count += 1  # of the scope: samples see nothing of each other
        self._run(model, [Run(self._text(model, donor), "exact") for donor in sample.donors], 1)
        prompt = self._text(model, sample.prompt)
        full = Run(prompt)
        bare = [] if quick or sample.bare is None or sample.answer is None else [sample.bare]
        asked = [Run(self._text(model, each)) for each in bare]
        self._run(model, [full, *asked], ANSWER_TOKENS)
        runs = {name: Run(prompt, "approx", config, full.tokens) for name, config in sides.items()}
        if sample.other_order is not None and not quick:
            runs["other order"] = Run(self._text(model, sample.other_order), answer=full.tokens)
        verdicts = {"full": _verdict(sample, full, full, full.text)}
        # what computes a prompt in full leaves its KV: after all others
        leaves = {
            name: run for name, run in runs.items() if run.config is not None and run.config.recompute == 1
        }
        for group in ({name: run for name, run in runs.items() if name not in leaves}, leaves):
            verdicts |= self._along(model, sample, full, group)
        for run in asked:
            verdicts["bare"] = _verdict(sample, full, full, run.text)
        ids = self._follower.engine.tokenizer(model).encode(prompt)
        return verdicts, [*ids, *full.tokens], full.logits

    def _along(self, model: str, sample: Sample, full: Run, runs: dict[str, Run]) -> dict[str, Verdict]:
        """Verdicts of sides along the full prefill's answer, and how they answer freely."""
        self._run(model, list(runs.values()), len(full.tokens))
        astray = {name: run for name, run in runs.items() if not agreement(full, run).all()}
        own = {name: Run(run.prompt, run.how, run.config) for name, run in astray.items()}
        if sample.answer is not None:
            self._run(model, list(own.values()), ANSWER_TOKENS)
        texts = {name: own[name].text if name in own else full.text for name in runs}
        return {name: _verdict(sample, run, full, texts[name]) for name, run in runs.items()}

    def _text(self, model: str, messages: Messages) -> str:
        return self._follower.render(model, messages.as_dicts())

    def _run(self, model: str, runs: list[Run], max_tokens: int) -> None:
        self._follower.run(model, runs, max_tokens, str(self._count))


def _verdict(sample: Sample, run: Run, full: Run, text: str) -> Verdict:
    agrees = agreement(full, run)
    right = None if sample.answer is None else float(all(words in text for words in sample.answer))
    kl = divergence(full.logits, run.logits)
    return Verdict(agrees, kl, bool(agrees.all()), right, run.recomputed)
