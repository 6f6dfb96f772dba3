"""How many drafted rows a step takes: so many that the most tokens a second are hoped for."""

from __future__ import annotations

from collections.abc import Sequence

from blockzoo.runtime.draft.step_cost import StepCost, StepKind

MOST_DRAFTED = 15
"""Tokens of one sequence."""
_LENGTHS = (3, MOST_DRAFTED)  # drafts of a sequence that are tried; few, as each is another shape
_FEWEST = 3  # drafted rows of a step
_STEADY_STEPS = 8  # for which another shape is hoped to be of use
_NONE = StepKind(0, 0)
_MARGIN = 1.1  # hoped for of drafts
_NEWS = 0.4  # what a step's hopes weigh among those before


class RowChoice:
    """Of the steps of one executor.

    A number of rows is kept as long as another one is not worth its new shape, so hopes count over some
    steps.
    """

    def __init__(self, cost: StepCost | None = None) -> None:
        self._cost = cost or StepCost()
        self._last: tuple[StepKind, int] = _NONE, 0  # kind and drafted rows of the last step
        self._hoped_for: StepKind = _NONE
        self._hopes: dict[int, float] = {}  # tokens a step, by drafted rows

    def choose(self, kind: StepKind, sequences: int, chances: Sequence[float], spare: int) -> int:
        """How many drafted rows the next step is to have.

        Args:
            kind: of the step, `StepCost`.
            sequences: that get a token anyway and may have drafts.
            chances: of all guesses at hand, that they come true with all before them.
            spare: rows that there is room for.
        """
        if kind != self._hoped_for:
            self._hoped_for, self._hopes = kind, {}
        if not self._cost.knows(kind, 0):
            return 0  # what others are compared with
        ordered = sorted(chances, reverse=True)
        sizes = {*_LENGTHS, *(sequences * length for length in (1, *_LENGTHS))}
        fitting = (size for size in sizes if _FEWEST <= size <= min(spare, sequences * MOST_DRAFTED))
        best, most = 0, 0.0
        for size in (0, *sorted(fitting)):
            hope = sequences + sum(ordered[:size])
            hope = self._hopes.get(size, hope) * (1 - _NEWS) + hope * _NEWS
            self._hopes[size] = hope
            seconds = self._cost.seconds(kind, size)
            if kind == self._last[0] and size != self._last[1]:
                seconds += self._cost.new_shape_seconds(kind) / _STEADY_STEPS
            value = hope / seconds / (_MARGIN if size else 1.0)
            if value > most:
                best, most = size, value
        return best

    def observe(self, kind: StepKind, drafted: int, seconds: float) -> None:
        """A step with so many drafted rows took so long."""
        step = kind, drafted
        self._cost.observe(kind, drafted, seconds, is_new_shape=step != self._last)
        self._last = step

    def skip(self) -> None:
        """A step that is of no kind ran: whatever comes next has a new shape."""
        self._last = _NONE, 0
