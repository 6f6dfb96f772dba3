"""How many drafted rows a step takes, and of whom: what gives the most tokens a second, as is hoped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from blockzoo.runtime.draft.step_cost import StepCost, StepKind

MOST_DRAFTED = 15
"""Tokens of one sequence."""
_LENGTHS = (3, 7, MOST_DRAFTED)  # drafts of a sequence that are tried; few, as each is another shape
_FEWEST = 3  # drafted rows of a step
_TRY_AFTER = 32  # steps of a kind, in which no guess was worth what rows are thought to cost
_BARE_AFTER = 64  # steps with drafts; what steps take without them is believed for no longer
_STEADY_STEPS = 8.0  # for which another shape is hoped to be of use, before it is known
_STEADY_NEWS = 0.25  # what a shape's steps weigh for that
_MARGIN = 1.1  # hoped for of drafts
_NEWS = 0.4  # what a step's hopes weigh among those before
_NONE = StepKind(0, 0)


class Option(NamedTuple):
    """What a step may be.

    Attributes:
        rows: drafted ones.
        runs: of surrogates before it, each of which guesses one token more of the sequences that have one.
    """

    rows: int
    runs: int = 0


class Hopes(NamedTuple):
    """Of one sequence of a step.

    Attributes:
        chances: of its guesses, that they come true with all before them.
        may_draft: whether it may have drafted rows.
        surrogate: the same of what a surrogate would guess; empty where there is none.
    """

    chances: Sequence[float]
    may_draft: bool = True
    surrogate: Sequence[float] = ()

    def prefers_surrogate(self, runs: int) -> bool:
        """Whether more is hoped for of so many runs of the surrogate than of the guesses that are there."""
        return sum(self.surrogate[:runs]) > sum(self.chances[:runs])

    def within(self, runs: int) -> Sequence[float]:
        """The chances of what is drafted with so many runs of surrogates."""
        if not runs:
            return self.chances
        return self.surrogate[:runs] if self.prefers_surrogate(runs) else self.chances[:runs]


class RowChoice:
    """Of the steps of one executor.

    A number of rows is kept as long as another one is not worth its new shape, so hopes count over some
    steps.
    """

    def __init__(self, cost: StepCost | None = None) -> None:
        self._cost = cost or StepCost()
        self._last: tuple[StepKind, int] = _NONE, 0  # kind and drafted rows of the last step
        self._num_equal = 0  # steps like that in a row
        self._steady = _STEADY_STEPS  # how long shapes with drafted rows are kept, about
        self._hoped_for: StepKind = _NONE
        self._hopes: dict[Option, float] = {}  # tokens a step
        self._num_hoped = 0  # steps that these are of

    def choose(
        self,
        kind: StepKind,
        sequences: Sequence[Hopes],
        spare: int,
        run_cost: float = 1.0,
        at_stake: float = math.inf,
        trust: float = 0.0,
    ) -> Option:
        """What the next step is to be.

        Args:
            kind: of the step, `StepCost`.
            sequences: all that get a token.
            spare: rows that there is room for.
            run_cost: of a run of the surrogates, relative to a step without drafts, before one was seen.
            at_stake: what it may cost, and shapes change twice for it, likewise, if it wins no more than
            trust: this share of what is hoped for.
        """
        if kind != self._hoped_for:
            self._hoped_for, self._hopes, self._num_hoped = kind, {}, 0
        if not self._cost.knows(kind, 0) or self._cost.steps_since_bare(kind) >= _BARE_AFTER:
            return Option(0)  # what others are compared with
        self._num_hoped += 1
        drafting = sum(each.may_draft for each in sequences)
        ordered: dict[int, list[float]] = {}  # chances by runs
        best, most = Option(0), 0.0
        bare = self._cost.seconds(kind, 0)
        longest = (1 + at_stake) * bare
        new_shape = self._cost.new_shape_seconds(kind)
        for option in self._options(sequences, min(spare, drafting * MOST_DRAFTED)):
            if option.runs not in ordered:
                ordered[option.runs] = sorted(
                    (chance for each in sequences for chance in each.within(option.runs)), reverse=True
                )
            hope = self._hope(option, len(sequences) + sum(ordered[option.runs][: option.rows]))
            seconds = self._seconds(kind, option, run_cost)
            is_new = kind == self._last[0] and option.rows != self._last[1]
            sure = trust * (hope / len(sequences) - 1) * bare
            if option.rows and seconds + 2 * new_shape * is_new > longest + sure:
                continue
            if is_new:
                seconds += new_shape / min(self._steady, _STEADY_STEPS)
            value = hope / seconds / (_MARGIN if option.rows else 1.0)
            if value > most:
                best, most = option, value
        if not best.rows and self._num_hoped > _TRY_AFTER and any(each.chances for each in sequences):
            fewest = Option(max(_FEWEST, drafting))  # rows may be free: one try tells, once for all
            cost = self._seconds(kind, fewest, run_cost) + 2 * new_shape
            if fewest.rows <= spare and cost <= longest and not self._cost.knows(kind, fewest.rows):
                return fewest
        return best

    def _seconds(self, kind: StepKind, option: Option, run_cost: float) -> float:
        if not option.runs:
            return self._cost.seconds(kind, option.rows)
        # surrogates were found to pay: they get a try, as if rows were free
        rows = option.rows if self._cost.knows(kind, option.rows) else 0
        return self._cost.seconds(kind, rows) + option.runs * self._cost.run_seconds(kind, run_cost)

    @staticmethod
    def _options(sequences: Sequence[Hopes], most: int) -> list[Option]:
        drafting = sum(each.may_draft for each in sequences)
        lengths = _LENGTHS if drafting == 1 else (1, 3, MOST_DRAFTED)
        sizes = {*_LENGTHS, *(drafting * length for length in lengths)}
        options = [Option(0), *(Option(size) for size in sorted(sizes) if _FEWEST <= size <= most)]
        if any(each.surrogate for each in sequences):
            fitting = (length for length in lengths if _FEWEST <= drafting * length <= most)
            options += [Option(drafting * length, length) for length in fitting]
        return options

    def _hope(self, option: Option, tokens: float) -> float:
        """Tokens that are hoped for of such a step, now and a little before."""
        hope = self._hopes[option] = (1 - _NEWS) * self._hopes.get(option, tokens) + _NEWS * tokens
        return hope

    @property
    def last_drafted(self) -> int:
        """Drafted rows of the last step."""
        return self._last[1]

    def bare_seconds(self, kind: StepKind) -> float | None:
        """Of a step without drafts; None: none was seen."""
        return self._cost.seconds(kind, 0) if self._cost.knows(kind, 0) else None

    def observe_runs(self, kind: StepKind, seconds: Sequence[float]) -> None:
        """Runs of surrogates before a step took so long."""
        self._cost.observe_runs(kind, seconds)

    def observe(self, kind: StepKind, drafted: int, seconds: float) -> None:
        """A step with so many drafted rows took so long."""
        step = kind, drafted
        if step == self._last:
            self._num_equal += 1
        else:
            if self._last[1] and self._last[0] == kind:
                self._steady += _STEADY_NEWS * (self._num_equal - self._steady)
            self._num_equal = 1
        self._cost.observe(kind, drafted, seconds, is_new_shape=step != self._last)
        self._last = step

    def skip(self) -> None:
        """A step that is of no kind ran: whatever comes next has a new shape."""
        self._last = _NONE, 0
