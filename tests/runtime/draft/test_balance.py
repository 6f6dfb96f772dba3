"""What tries of speculation may cost."""

from __future__ import annotations

import numpy as np

from blockzoo.runtime.draft.balance import Balance, Balances


def lost(steps: int, price: float, requests_every: int) -> float:
    """Steps lost by someone who tries whenever that is allowed, and wins nothing."""
    balance, total = Balance(), 0.0
    for step in range(steps):
        if step % requests_every == 0:
            balance.welcome(1.0)
        won = -price if balance.steps > 0 else 0.0
        balance.observe(won)
        total -= won
    return total


def test_what_wins_nothing_costs_a_share_of_the_time() -> None:
    for price in (0.1, 0.5, 2.0):
        assert lost(5000, price, 1000) < 0.015 * 5000 + 8 + price
        assert lost(5000, price, 100) < 0.02 * 5000 + 8 + price, "each request may be of another kind"


def test_what_wins_goes_on() -> None:
    balance, drafted, rng = Balance(), 0, np.random.default_rng(0)
    for _ in range(1000):
        drafted += balance.steps > 0
        balance.observe(rng.choice([-0.3, 0.5]) if balance.steps > 0 else 0.0)
    assert drafted > 950


def test_a_hiccup_is_forgiven() -> None:
    balance = Balance()
    balance.observe(-1000.0)
    for _ in range(700):
        balance.observe(0.0)
    assert balance.steps > 0


def test_old_wins_pay_for_little() -> None:
    balance = Balance()
    for _ in range(1000):
        balance.observe(3.0)
    steps = 0
    while balance.steps > 0:
        balance.observe(-0.5)
        steps += 1
    assert steps < 40


def test_what_one_request_won_pays_for_no_other() -> None:
    new, won = Balance(), Balance()
    for _ in range(1000):
        won.observe(3.0)
    for balance in (new, won):
        balance.welcome(1.0)
    assert won.steps == new.steps


def drafted_steps(gains: list[float], price: float) -> int:
    """Of 1000 steps of some tenants, those with drafts: each gives them so much for such a price."""
    balances, drafted = Balances(), 0
    tenants = {("model", name): gain for name, gain in zip("abcdefgh", gains, strict=False)}
    for _ in range(1000):
        tries = balances.at_stake(tenants) > 0
        drafted += tries
        for tenant, gain in tenants.items():
            balances.of(tenant).observe(gain - price if tries else 0.0)
    return drafted


def test_few_who_win_do_not_slow_down_the_others() -> None:
    assert drafted_steps([15.0] + 7 * [0.0], 0.4) < 100
    assert drafted_steps(7 * [2.0] + [0.0], 0.4) == 1000, "one that does not is outweighed"


def tries(balance: Balance, hoped: float, came: float, price: float, steps: int = 1000) -> int:
    """How often someone tries who goes by what is left, and by the hopes that may be counted on."""
    count = 0
    for _ in range(steps):
        does = balance.steps + balance.trust * hoped > price
        count += does
        balance.observe(came - price if does else 0.0)
        if does:
            balance.hear(hoped, came)
    return count


def test_hopes_count_as_far_as_they_came_true() -> None:
    owing = Balance()
    owing.observe(-2.0 - owing.steps)
    assert tries(owing, hoped=4.0, came=0.0, price=0.5) < 30, "few, and those are earned by other steps"
    owing = Balance()
    owing.observe(-1.0 - owing.steps)
    assert tries(owing, hoped=4.0, came=3.0, price=0.5) == 1000
    owing.observe(-100.0)
    assert owing.steps < 11
    assert tries(Balance(), hoped=0.0, came=0.0, price=0.5) < 30


def test_more_than_was_hoped_for_is_no_reason_to_hope_for_more() -> None:
    balance = Balance()
    for _ in range(100):
        balance.hear(1.0, 5.0)
    assert balance.trust == 1.0
    for _ in range(100):
        balance.hear(1.0, 0.0)
    assert balance.trust < 0.1
