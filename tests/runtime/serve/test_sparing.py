"""What may be left out takes a share of the time at most, and is not left out for ever."""

from __future__ import annotations

import random

import pytest

from blockzoo.runtime.serve.sparing import Sparing


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.spent = 0.0
        self.runs = 0
        self.cost = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += self.cost
        self.spent += self.cost
        self.runs += 1


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_it_takes_at_most_its_share(share: float) -> None:
    clock, rng = Clock(), random.Random(1)
    sparing = Sparing(clock.work, share, clock)
    clock.cost = 0.086
    sparing.offer()
    assert clock.runs == 1
    for _ in range(5000):
        before = clock.runs
        clock.cost = rng.choice((1e-4, 1e-3, 0.086))
        sparing.offer()
        if clock.runs > before:
            assert clock.spent - clock.cost <= share * (clock.now - clock.cost) + 1e-9
        clock.now += rng.expovariate(10)
    assert clock.runs > 20
    assert clock.spent - 0.086 <= share * clock.now


def test_one_that_costs_nothing_always_runs() -> None:
    clock = Clock()
    sparing = Sparing(clock.work, 0.01, clock)
    for _ in range(5):
        sparing.offer()
    assert clock.runs == 5


def test_what_it_raises_is_raised_and_counted() -> None:
    clock = Clock()

    def broken() -> None:
        clock.now += 1.0
        raise RuntimeError("page 7")

    sparing = Sparing(broken, 0.01, clock)
    with pytest.raises(RuntimeError, match="page 7"):
        sparing.offer()
    clock.now = 99.0
    sparing.offer()
    clock.now = 100.0
    with pytest.raises(RuntimeError, match="page 7"):
        sparing.offer()
