"""How many drafted rows a step takes: so many that the most tokens a second are hoped for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from blockzoo.runtime.draft.step_cost import StepCost, StepKind

MOST_DRAFTED = 15
"""Tokens of one sequence."""
_LENGTHS = (3, MOST_DRAFTED)  # drafts of a sequence that are tried; few, as each is another shape
_FEWEST = 3  # drafted rows of a step
_STEADY_STEPS = 8  # for which another shape is hoped to be of use
_MARGIN = 1.1  # hoped for of drafts
_NEWS = 0.4  # what a step's hopes weigh among those before
_SLOWEST = 0.97  # of its speed without drafts that a tenant may have for those of others
_TENANT_NEWS = 0.05  # what a step weighs for that
_NONE = StepKind(0, 0)


class Hopes(NamedTuple):
    """Of one sequence of a step.

    Attributes:
        tenant: whose it is.
        chances: of its guesses, that they come true with all before them.
        may_draft: whether it may have drafted rows.
    """

    tenant: str
    chances: Sequence[float]
    may_draft: bool = True


class RowChoice:
    """Of the steps of one executor.

    A number of rows is kept as long as another one is not worth its new shape, so hopes count over some
    steps. Where several tenants run, none of them is to be slowed down for what others hope for.
    """

    def __init__(self, cost: StepCost | None = None) -> None:
        self._cost = cost or StepCost()
        self._last: tuple[StepKind, int] = _NONE, 0  # kind and drafted rows of the last step
        self._hoped_for: StepKind = _NONE
        self._hopes: dict[int, float] = {}  # tokens a step, by drafted rows
        self._shares: dict[tuple[int, str], float] = {}  # of them by tenant, without those it gets anyway
        self._num_hoped = 0  # steps that these are of

    def choose(self, kind: StepKind, sequences: Sequence[Hopes], spare: int) -> int:
        """How many drafted rows the next step is to have.

        Args:
            kind: of the step, `StepCost`.
            sequences: all that get a token.
            spare: rows that there is room for.
        """
        if kind != self._hoped_for:
            self._hoped_for, self._hopes, self._shares, self._num_hoped = kind, {}, {}, 0
        if not self._cost.knows(kind, 0):
            return 0  # what others are compared with
        self._num_hoped += 1
        drafting = sum(each.may_draft for each in sequences)
        ordered = sorted(
            ((chance, each.tenant) for each in sequences for chance in each.chances), reverse=True
        )
        tokens = Counter(each.tenant for each in sequences)
        sizes = {*_LENGTHS, *(drafting * length for length in (1, *_LENGTHS))}
        fitting = (size for size in sizes if _FEWEST <= size <= min(spare, drafting * MOST_DRAFTED))
        best, most = 0, 0.0
        for size in (0, *sorted(fitting)):
            hope = self._hope(size, tokens, ordered[:size])
            seconds = self._cost.seconds(kind, size)
            relative = self._cost.seconds(kind, 0) / seconds
            is_known = size > 0 and self._cost.knows(kind, size)  # else a try tells
            if is_known and self._slowest(size, tokens) * relative < _SLOWEST:
                continue
            if kind == self._last[0] and size != self._last[1]:
                seconds += self._cost.new_shape_seconds(kind) / _STEADY_STEPS
            value = hope / seconds / (_MARGIN if size else 1.0)
            if value > most:
                best, most = size, value
        return best

    def _hope(self, size: int, tokens: Counter[str], guesses: Sequence[tuple[float, str]]) -> float:
        """Tokens that a step with so many drafted rows, the likeliest guesses, gives; it is noted."""
        hope = sum(tokens.values()) + sum(chance for chance, _ in guesses)
        hope = self._hopes[size] = (1 - _NEWS) * self._hopes.get(size, hope) + _NEWS * hope
        if len(tokens) > 1 and size:
            shares = dict.fromkeys(tokens, 0.0)
            for chance, tenant in guesses:
                shares[tenant] += chance
            news = max(_TENANT_NEWS, 1 / self._num_hoped)
            for tenant, share in shares.items():
                known = self._shares.get((size, tenant), share)
                self._shares[size, tenant] = (1 - news) * known + news * share
        return hope

    def _slowest(self, size: int, tokens: Counter[str]) -> float:
        """Tokens a step of the tenant that gains the least, relative to a step without drafts."""
        if len(tokens) < 2:
            return math.inf
        return min(1 + self._shares[size, tenant] / count for tenant, count in tokens.items())

    def observe(self, kind: StepKind, drafted: int, seconds: float) -> None:
        """A step with so many drafted rows took so long."""
        step = kind, drafted
        self._cost.observe(kind, drafted, seconds, is_new_shape=step != self._last)
        self._last = step

    def skip(self) -> None:
        """A step that is of no kind ran: whatever comes next has a new shape."""
        self._last = _NONE, 0
