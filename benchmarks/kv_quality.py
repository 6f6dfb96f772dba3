"""Answers of a trained model under approximate reuse, against those of a full prefill.

Every side follows the same answer, token by token, so that its distributions can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.kv_sides import ENGINE, Sides, quality_sides
from benchmarks.kv_tasks import Sample
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.request import KVReuse
from blockzoo.runtime.sampling.sampler import SampledToken, Sampler, SamplerState


class _Follower(Sampler):
    """Answers what it is told, and keeps the logits on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Sequence[int] = ()
        self.logits: list[np.ndarray] = []

    def follow(
        self, logits: np.ndarray, state: SamplerState, drafted: Sequence[int] = ()
    ) -> Iterator[SampledToken]:
        """One token at a time."""
        assert not drafted, "the engine does not speculate"
        self.logits.append(np.array(logits[0], np.float32))
        yield SampledToken(self.answer[len(self.logits) - 1], None, ())


class Judge:
    """One model, and all sides in turn.

    Args:
        zoo, model: a trained one.
        num_threads: of the engine.
        sides: names of those to compare with "full"; None: all.
    """

    def __init__(
        self, zoo: Path, model: str, num_threads: int | None, sides: Sequence[str] | None = None
    ) -> None:
        known = quality_sides()
        for name in sides or ():
            if name not in known:
                raise SystemExit(f"there is no side {name!r}; there are {'; '.join(known)}")
        self.sides: Sides = {name: known[name] for name in ["full", *(sides or list(known)[1:])]}
        config = EngineConfig(
            precision="f32",
            num_threads=num_threads,
            kv_cache_bytes=256 << 20,
            approximate=ENGINE,
        )
        self._engine, self._model = LLMEngine(zoo, config), model
        self._follower = self._engine._sampler = _Follower()
        self._count = 0

    def judge(self, sample: Sample) -> dict[str, tuple[bool, np.ndarray, np.ndarray]]:
        """Per side: whether each token of the answer is the likeliest, per token whether the likeliest is
        that of the full prefill, and KL from the full prefill's distribution, in nats."""
        self._count += 1  # of the scope: samples see nothing of each other
        for donor in sample.donors:
            self._run(donor, [0], "exact")
        found = {}
        expected: np.ndarray | None = None
        for name, (how, config) in self.sides.items():
            if config is not None:
                self._engine.configure_reuse(config)
            logits = self._run(sample.prompt, sample.answer, how)
            logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            expected = logprobs if expected is None else expected
            choice = logprobs.argmax(1)
            kl = (np.exp(expected) * (expected - logprobs)).sum(1)
            found[name] = bool((choice == sample.answer).all()), choice == expected.argmax(1), kl
        return found

    def _run(self, prompt: list[int], answer: list[int], how: KVReuse) -> np.ndarray:
        self._follower.answer, self._follower.logits = answer, []
        params = SamplingParams(max_tokens=len(answer), temperature=0.0, ignore_eos=True)
        self._engine.add_request("r", self._model, prompt, params, str(self._count), how)
        while self._engine.has_unfinished():
            for output in self._engine.step():
                if output.error is not None:
                    raise SystemExit(output.error)
        return np.stack(self._follower.logits)


def quality(judge: Judge, samples: Iterator[Sample], count: int) -> dict[str, dict[str, float]]:
    """Per side, means over `count` samples (and, but for `correct`, the tokens of their answers)."""
    found = [judge.judge(sample) for sample, _ in zip(samples, range(count), strict=False)]
    result = {}
    for name in judge.sides:
        correct, agrees, kl = zip(*(each[name] for each in found), strict=True)
        result[name] = {
            "correct": float(np.mean(correct)),
            "agrees": float(np.concatenate(agrees).mean()),
            "kl": float(np.concatenate(kl).mean()),
        }
    return result
