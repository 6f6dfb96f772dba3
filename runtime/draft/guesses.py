"""What drafters are asked and what they answer: tokens that may come next.

A guess costs a row of a step and changes no answer: the model is asked for each (`Sampler.follow`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from blockzoo.runtime.sampling.guided import Guide


class Kind(NamedTuple):
    """Guesses of one kind come true about as often: of one drafter, which is as sure of them (0: least)."""

    drafter: str
    grade: int = 0


class Guess(NamedTuple):
    """A token that may come next, once all guesses before it have come true."""

    token_id: int
    kind: Kind


Rate = Callable[[Kind], float]
"""How often guesses of a kind come true, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Context:
    """A request as drafters see it.

    Attributes:
        token_ids: int32 [n], prompt and answer so far.
        scope: only answers of the same one may be looked at; None: no others.
        guide: of the answer, at its place; None: free. Not to be changed.
    """

    token_ids: np.ndarray
    scope: Hashable = None
    guide: Guide | None = None

    def after(self, guesses: Sequence[Guess]) -> Context:
        """As it would be had they come true."""
        ids = [guess.token_id for guess in guesses]
        guide = None if self.guide is None else self.guide.after(ids)
        return replace(self, token_ids=np.concatenate([self.token_ids, np.array(ids, np.int32)]), guide=guide)


class Drafter(Protocol):
    """Guesses what comes next."""

    def propose(self, context: Context, limit: int) -> list[Guess]:
        """At most `limit` guesses, each behind the one before; none where it has no idea."""


def propose(drafters: Sequence[Drafter], context: Context, limit: int, rate: Rate) -> list[Guess]:
    """The guesses of the drafter of which most are hoped to come true.

    Under a guide only what it allows is of use: guesses end there, and drafters are asked once more behind
    them.
    """
    found: list[Guess] = []
    while len(found) < limit:
        best: list[Guess] = []
        most = 0.0
        for drafter in drafters:
            guesses = drafter.propose(context, limit - len(found))
            if context.guide is not None:
                guesses = guesses[: context.guide.num_allowed([guess.token_id for guess in guesses])]
            hope = sum(chances(guesses, rate))
            if hope > most:
                best, most = guesses, hope
        found += best
        if context.guide is None or not best or len(found) >= limit:
            break
        context = context.after(best)
    return found


def chances(guesses: Sequence[Guess], rate: Rate) -> list[float]:
    """Of each, that it and all before it come true."""
    found, chance = [], 1.0
    rates: dict[Kind, float] = {}  # most are of one kind
    for guess in guesses:
        known = rates.get(guess.kind)
        if known is None:
            known = rates[guess.kind] = rate(guess.kind)
        chance *= known
        found.append(chance)
    return found
