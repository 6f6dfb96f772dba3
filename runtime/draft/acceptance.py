"""How often guesses come true: of a request, leaning on what is known of its tenant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockzoo.runtime.draft.guesses import Kind

_FADED = 0.9
_LEAN = 4.0  # guesses for which the wider experience counts
_FIRST = (0.3, 0.3, 0.45, 0.6, 0.75, 0.85)  # of lookups by grade, before anything is known
_FIRST_OF_DRAFTER: Mapping[str, Sequence[float]] = {"grammar": (0.9, 0.8, 0.6, 0.5, 0.4)}  # likewise


class Acceptance:
    """Rates by kind, forgetting slowly.

    Args:
        wider: what to lean on while little is known; None: guesses of ours.
        memory: so many guesses of a kind are remembered, about.
        first: what is known of kinds beforehand.
    """

    def __init__(
        self, wider: Acceptance | None = None, memory: int = 512, first: Mapping[Kind, float] | None = None
    ) -> None:
        self._wider, self._first = wider, first or {}
        self._keep = 1 - 1 / memory
        self._counts: dict[Kind, tuple[float, float]] = {}  # came true, were tried

    def rate(self, kind: Kind) -> float:
        """How often a guess of a kind comes true whose forerunners did, 0 to 1."""
        true, tried = self._counts.get(kind, (0.0, 0.0))
        return (true + _LEAN * self._prior(kind)) / (tried + _LEAN)

    def _prior(self, kind: Kind) -> float:
        if self._wider is not None:
            return self._wider.rate(kind)
        if kind in self._first:
            return self._first[kind]
        rates = _FIRST_OF_DRAFTER.get(kind.drafter, _FIRST)
        return rates[min(kind.grade, len(rates) - 1)]

    def fade(self, drafter: str) -> None:
        """Lean a little more on what was known first: guesses that are not tried as they were too often wrong
        get another chance some day."""
        for kind, (true, tried) in self._counts.items():
            if kind.drafter == drafter:
                self._counts[kind] = true * _FADED, tried * _FADED

    def note(self, kind: Kind, came_true: bool) -> None:
        """A guess was tried, by the model or by what came anyway."""
        true, tried = self._counts.get(kind, (0.0, 0.0))
        self._counts[kind] = true * self._keep + came_true, tried * self._keep + 1
        if self._wider is not None:
            self._wider.note(kind, came_true)
