"""What every trade of the family has in common: a sample, its messages, and how samples are drawn.

Knows neither a model nor a tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

HELD_OUT_SEED = 20_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One exchange: what the model is told, what it is asked, what it should answer."""

    system: str
    user: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]


def draw(trade: ModuleType, seed: int, count: int, held_out: bool) -> list[Sample]:
    """`count` samples of a trade's module, no prompt twice; the same ones for the same arguments."""
    return list(_distinct(trade, seed, count, held_out))


def held_out(trade: ModuleType, count: int) -> list[Sample]:
    """The samples that a trade's figures are about: the same ones for everyone, none of them in training."""
    return draw(trade, HELD_OUT_SEED, count, held_out=True)


def _distinct(trade: ModuleType, seed: int, count: int, held_out: bool) -> Iterator[Sample]:
    seen: set[str] = set()
    for number in range(100 * count):
        sample = trade.sample(random.Random(f"{trade.__name__}/{held_out}/{seed}/{number}"), held_out)
        if sample.user not in seen:
            seen.add(sample.user)
            yield sample
            if len(seen) == count:
                return
    raise ValueError(f"{trade.__name__} has no {count} distinct samples, only {len(seen)}")


def pick(rng: random.Random, parts: tuple[Sequence[str], Sequence[str]], held_out: bool) -> str:
    """One word of (training, held-out): the two never mix."""
    return rng.choice(parts[held_out])


def either(rng: random.Random, parts: tuple[Sequence[str], Sequence[str]], held_out: bool) -> str:
    """A wording: training sees the first group alone, held-out samples draw from both."""
    return rng.choice([*parts[0], *parts[1]] if held_out else parts[0])
