"""Tokens a second by name, of late: what placement goes by."""

import math
from collections.abc import Collection, Mapping


class Rates:
    """Rates that forget: what came `half_life_s` ago counts for half.

    An exponential window over all time; what it holds of the time before the start, where nothing was
    counted, is made up for, so that early rates are not too low.
    """

    def __init__(self, half_life_s: float, now: float) -> None:
        if not half_life_s > 0:
            raise ValueError(f"half_life_s is {half_life_s}, expected above 0")
        self._decay = math.log(2) / half_life_s
        self._start = now
        self._counts: dict[str, tuple[float, float]] = {}  # tokens, worth as of a time

    def note(self, name: str, tokens: int, now: float) -> None:
        """Tokens came. `now` never goes back."""
        count, then = self._counts.get(name, (0.0, now))
        self._counts[name] = count * math.exp(-self._decay * (now - then)) + tokens, now

    def keep(self, names: Collection[str]) -> None:
        """Forget any other name: those that are gone would pile up."""
        self._counts = {name: count for name, count in self._counts.items() if name in names}

    def per_second(self, now: float) -> Mapping[str, float]:
        """By name, of all that were ever noted."""
        seen = -math.expm1(-self._decay * (now - self._start))  # share of the window since the start
        if seen <= 0:
            return dict.fromkeys(self._counts, 0.0)
        return {
            name: count * math.exp(-self._decay * (now - then)) * self._decay / seen
            for name, (count, then) in self._counts.items()
        }
