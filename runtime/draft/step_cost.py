"""What a step costs by its rows, learnt from the steps as they come.

Costs matter relative to each other: those of rows beside the ones that run anyway, and of a step whose shape
is another than the last one's (engines prepare themselves for shapes).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

_KEPT = 128  # kinds of steps
_NEWS = 0.3  # what a step weighs among those before, at least
_MOST_NEWS = 0.7  # of a surprise that is believed, in logarithms
_MOST_FIRST_NEWS = 1.5  # of the first of a number of drafted rows: what was hoped for may be far off
_BARE_NEWS = 0.7  # what a step without drafts weighs, long after the last one
_FRESH_STEPS = 16.0  # since a step without drafts, within which surprises are those of drafted rows
_NEW_SHAPE = 1.5  # cost of another shape before it is known, in steps
_FREE_ROWS = 16.0  # before anything is known: rows that cost as much as what each step costs
_CURVE_STEPS = 16  # for which what all kinds tell of rows is not looked at again


class StepKind(NamedTuple):
    """What else than drafted rows decides on a step's time."""

    rows: int  # without drafted ones
    chains: int


class _Costs:
    """Of one kind of step."""

    def __init__(self, new_shape: float) -> None:
        self.logs: dict[int, float] = {}  # of seconds, by drafted rows
        self.counts: dict[int, int] = {}
        self.steps_since_bare = 0
        self.new_shape = new_shape
        self.run: float | None = None  # of surrogates, relative to a step without drafted rows


class StepCost:
    """Seconds of steps: a step's cost depends on its kind and on how many drafted rows it has."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[StepKind, _Costs] = OrderedDict()
        self._curves: dict[int, tuple[list[int], list[float]]] = {}  # by chains: rows and seconds of steps
        self._steps_to_curves = 0
        self._new_shape = _NEW_SHAPE  # as last learnt, of any kind

    def knows(self, kind: StepKind, drafted: int) -> bool:
        """Whether such a step was seen, in the shape of the one before."""
        return drafted in self._of(kind).logs

    def steps_since_bare(self, kind: StepKind) -> int:
        """Steps of a kind since one told what they take without drafted rows."""
        return self._of(kind).steps_since_bare

    def seconds(self, kind: StepKind, drafted: int) -> float:
        """Of a step in the shape of the one before; 1 without drafted rows, where nothing was seen."""
        return math.exp(self._log(kind, self._of(kind), drafted))

    def new_shape_seconds(self, kind: StepKind) -> float:
        """What another shape adds."""
        costs = self._of(kind)
        return costs.new_shape * math.exp(self._log(kind, costs, 0))

    def run_seconds(self, kind: StepKind, hoped_for: float) -> float:
        """Of a run of surrogates; before one was seen `hoped_for` times a step without drafted rows."""
        costs = self._of(kind)
        return (hoped_for if costs.run is None else costs.run) * math.exp(self._log(kind, costs, 0))

    def observe_runs(self, kind: StepKind, seconds: Sequence[float]) -> None:
        """Surrogates ran before a step, each run for so long."""
        costs = self._of(kind)
        bare = math.exp(self._log(kind, costs, 0))
        if costs.run is None:  # engines prepare themselves in the first
            costs.run = min(seconds) / bare
        else:
            costs.run += _NEWS * (sum(seconds) / len(seconds) / bare - costs.run)

    def observe(self, kind: StepKind, drafted: int, seconds: float, is_new_shape: bool) -> None:
        """A step took so long.

        What surprises shortly after a step without drafts is what drafted rows cost, and in such a step long
        after the last one what that itself costs; else the machine may be faster or slower than it was.
        """
        self._steps_to_curves -= 1
        if self._steps_to_curves <= 0:
            self._steps_to_curves = _CURVE_STEPS
            self._draw_curves()
        costs = self._of(kind)
        costs.steps_since_bare += drafted > 0
        expected = self._log(kind, costs, drafted)
        if is_new_shape:
            if costs.logs:
                more = (seconds - math.exp(expected)) / math.exp(self._log(kind, costs, 0))
                costs.new_shape += _NEWS * (min(max(more, 0.0), 4.0) - costs.new_shape)
                self._new_shape = costs.new_shape
            return
        count = costs.counts[drafted] = costs.counts.get(drafted, 0) + 1
        if count == 1:
            self._steps_to_curves = 0
        if not costs.logs:
            costs.logs[drafted] = math.log(seconds)
            return
        most = _MOST_FIRST_NEWS if count == 1 else _MOST_NEWS
        surprise = max(-most, min(math.log(seconds) - expected, most))
        fresh = math.exp(-costs.steps_since_bare / _FRESH_STEPS)
        if drafted:
            own, news = (1.0 if count == 1 else fresh), max(_NEWS, 1 / count)
        else:  # long after the last one it has not taken part in what the others told
            own, news = 1 - fresh, _BARE_NEWS
            costs.steps_since_bare = 0
        everywhere = _NEWS * (1 - own) * surprise
        costs.logs.setdefault(drafted, expected)
        costs.logs = {rows: log + everywhere for rows, log in costs.logs.items()}
        costs.logs[drafted] += news * own * surprise

    def _of(self, kind: StepKind) -> _Costs:
        costs = self._kinds.pop(kind, None) or _Costs(self._new_shape)
        self._kinds[kind] = costs
        while len(self._kinds) > _KEPT:
            self._kinds.popitem(last=False)
        return costs

    def _log(self, kind: StepKind, costs: _Costs, drafted: int) -> float:
        """Known; or from the nearest that is known, by what rows cost in steps of all kinds."""
        if drafted in costs.logs:
            return costs.logs[drafted]
        total = kind.rows + drafted
        if not costs.logs:
            return math.log(self._rows_cost(kind.chains, total) / self._rows_cost(kind.chains, kind.rows))
        nearest = min(costs.logs, key=lambda rows: abs(rows - drafted))
        known = self._rows_cost(kind.chains, kind.rows + nearest)
        return costs.logs[nearest] + math.log(self._rows_cost(kind.chains, total) / known)

    def _rows_cost(self, chains: int, rows: int) -> float:
        """Of a step of so many rows, in some unit: along the line through the nearest that are known."""
        known, seconds = self._curves.get(chains) or self._curves.get(1, ([], []))
        if len(known) < 2:
            return _FREE_ROWS + rows
        above = min(max(bisect_left(known, rows), 1), len(known) - 1)
        slope = (seconds[above] - seconds[above - 1]) / (known[above] - known[above - 1])
        if rows > known[-1]:  # of two that are near each other little can be told of others
            slope = max(slope, (seconds[-1] - seconds[0]) / (known[-1] - known[0]), 0.0)
        return max(seconds[above] + slope * (rows - known[above]), min(seconds) / 2)

    def _draw_curves(self) -> None:
        """See what steps took by all their rows, by how many chains they were of: the mean of their kinds."""
        found: dict[int, dict[int, list[float]]] = {}
        for kind, costs in self._kinds.items():
            for drafted, log in costs.logs.items():
                found.setdefault(kind.chains, {}).setdefault(kind.rows + drafted, []).append(math.exp(log))
        self._curves = {
            chains: (sorted(by_rows), [sum(by_rows[r]) / len(by_rows[r]) for r in sorted(by_rows)])
            for chains, by_rows in found.items()
        }
