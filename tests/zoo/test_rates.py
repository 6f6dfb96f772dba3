"""Rates that forget."""

import pytest

from blockzoo.zoo.rates import Rates


def test_a_steady_rate_is_known_from_the_start() -> None:
    rates = Rates(60.0, now=100.0)
    for second in range(1, 6001):
        rates.note("a", 10, 100.0 + second)
        if second in (10, 60, 600, 6000):
            assert rates.per_second(100.0 + second)["a"] == pytest.approx(10.0, rel=0.06)


def test_a_change_counts_for_half_after_the_half_life() -> None:
    rates = Rates(60.0, now=0.0)
    for second in range(6000):
        rates.note("a", 10, float(second))
    assert rates.per_second(6060.0)["a"] == pytest.approx(5.0, rel=0.02)
    for second in range(6000, 6060):
        rates.note("b", 30, float(second))
    assert rates.per_second(6060.0)["b"] == pytest.approx(15.0, rel=0.03)
    assert rates.per_second(7260.0) == {"a": pytest.approx(0.0, abs=1e-4), "b": pytest.approx(0.0, abs=1e-4)}


def test_nothing_is_known_of_no_time() -> None:
    rates = Rates(60.0, now=5.0)
    rates.note("a", 10, 5.0)
    assert rates.per_second(5.0) == {"a": 0.0}
    assert Rates(1.0, 0.0).per_second(9.0) == {}
    with pytest.raises(ValueError, match="half_life_s is 0, expected above 0"):
        Rates(0, 0.0)


def test_names_that_are_gone_are_forgotten() -> None:
    rates = Rates(10.0, 0.0)
    for name in ("old", "new"):
        rates.note(name, 5, 1.0)
    rates.keep({"new"})
    assert rates.per_second(1.0).keys() == {"new"}
