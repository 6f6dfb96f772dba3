"""How many prompt tokens fit in a step's time: seconds a token, learnt from the steps as they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.zoo.manifest import Manifest

_WEIGHTY_TOKENS = 256  # a step of as many counts for a quarter, larger ones for up to half


class StepPace:
    """Seconds of a step for each token of prefill in it, by model.

    What tokens being decoded beside cost is counted too, so that the bound it serves is one on whole steps:
    a step of d + c * n seconds for n tokens is followed by one of bound / (d / n + c), which comes to rest
    where d + c * n is the bound.

    Args:
        seed: seconds a token of a model that no step has shown; None: not known.
    """

    def __init__(self, seed: Callable[[str], float | None] = lambda _: None) -> None:
        self._seed = seed
        self._seconds: dict[str, float] = {}  # a token, by model

    def seconds_per_token(self, model: str) -> float | None:
        """None where nothing is known yet."""
        if model not in self._seconds:
            seed = self._seed(model)
            if seed is None:
                return None
            self._seconds[model] = seed
        return self._seconds[model]

    def tokens_within(self, model: str, seconds: float) -> int:
        """Tokens of prefill that take so long; a page where nothing is known yet."""
        if seconds <= 0:
            return 0
        pace = self.seconds_per_token(model)
        return PAGE_TOKENS if pace is None else int(seconds / max(pace, 1e-9))

    def keep(self, models: Collection[str]) -> None:
        """Forget any other model."""
        self._seconds = {model: pace for model, pace in self._seconds.items() if model in models}

    def observe(self, tokens: Mapping[str, int], seconds: float) -> None:
        """A step with so many tokens of prefill by model took so long. Less than a page tells nothing."""
        total = sum(tokens.values())
        if total < PAGE_TOKENS:
            return
        before = {model: self.seconds_per_token(model) or seconds / total for model in tokens}
        scale = seconds / max(sum(before[model] * count for model, count in tokens.items()), 1e-9)
        news = total / (total + _WEIGHTY_TOKENS) / 2  # what this step weighs
        self._seconds |= {model: pace * (1 - news + news * scale) for model, pace in before.items()}


def measured_pace(manifest: Manifest, model: str) -> float | None:
    """Seconds a token of prefill by the times that zoo-compile measured; None where there are none.

    Those are of the machine that compiled, so a first guess.
    """
    record = manifest.models.get(model)
    if record is None:
        return None
    total = 0.0
    for block_id in record.chain[1:]:  # the embedding is a look-up
        block = manifest.blocks[block_id]
        if block.spec.kind == "head":  # of one row
            continue
        if not block.latency_us:
            return None
        count = max(block.latency_us)
        total += block.latency_us[count] * 1e-6 / count
    return total
