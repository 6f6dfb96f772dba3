"""How many drafted rows are chosen, given what steps cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blockzoo.runtime.draft.row_choice import MOST_DRAFTED, Hopes, Option, RowChoice
from blockzoo.runtime.draft.step_cost import StepCost, StepKind

LONE = StepKind(1, 1)


def free(rows: int) -> float:
    """Seconds of a step bound by memory: 16 rows cost what one does."""
    return 0.02 if rows <= 16 else 0.02 * rows / 16


def dear(rows: int) -> float:
    """Seconds of a step bound by arithmetic."""
    return 0.01 + 0.01 * rows


def run(
    choice: RowChoice,
    kind: StepKind,
    chances: list[float],
    seconds: Callable[[int], float],
    steps: int = 60,
    new_shape: float = 0.0,
    noise: float = 0.0,
) -> tuple[list[int], float]:
    """Drafted rows by step, and how much faster than without: tokens a second, as they are hoped for."""
    rng, chosen, spent, tokens = np.random.default_rng(0), [], 0.0, 0.0
    for _ in range(steps):
        drafted = choice.choose(kind, [Hopes(chances)] * kind.rows, spare=100).rows
        is_new = not chosen or chosen[-1] != drafted
        took = (seconds(kind.rows + drafted) + is_new * new_shape) * np.exp(noise * rng.standard_normal())
        choice.observe(kind, drafted, took)
        chosen.append(drafted)
        spent += seconds(kind.rows + drafted) + is_new * new_shape
        tokens += kind.rows + sum(sorted(chances * kind.rows, reverse=True)[:drafted])
    return chosen, tokens / spent / (kind.rows / seconds(kind.rows))


def likely(rate: float) -> list[float]:
    return [rate**place for place in range(1, MOST_DRAFTED + 1)]


def test_free_rows_are_used_for_likely_guesses() -> None:
    chosen, gain = run(RowChoice(), LONE, likely(0.9), free)
    assert chosen[-1] == MOST_DRAFTED
    assert gain > 5


def test_unlikely_guesses_are_left_alone_where_rows_cost() -> None:
    chosen, gain = run(RowChoice(), LONE, likely(0.2), dear)
    assert 0 < sum(drafted > 0 for drafted in chosen) <= 2, "one try, which two steps of a shape are, tells"
    assert gain > 0.9, "of 60 steps; it is not repeated"
    assert chosen[-1] == 0


def test_rows_that_are_free_are_found_out() -> None:
    """Guesses that seldom come true are worth rows that cost nothing, which a try tells."""
    chosen, gain = run(RowChoice(), LONE, likely(0.25), lambda rows: 0.02 if rows <= 4 else dear(rows), 200)
    assert chosen[-1] == 3
    assert gain > 1.15


def test_no_guesses_no_rows() -> None:
    chosen, _ = run(RowChoice(), LONE, [], free)
    assert set(chosen) == {0}


def test_large_batches_run_without() -> None:
    chosen, gain = run(RowChoice(), StepKind(32, 1), likely(0.8), dear)
    assert chosen[-1] == 0
    assert gain > 0.97


def test_never_much_slower_whatever_rows_and_shapes_cost() -> None:
    for seconds in (free, dear):
        for rate in (0.1, 0.4, 0.9):
            for new_shape in (0.0, 0.04):
                for rows in (1, 8, 32):
                    kind = StepKind(rows, 1)
                    _, gain = run(RowChoice(), kind, likely(rate), seconds, 300, new_shape, noise=0.1)
                    assert gain > 0.97, (seconds, rate, new_shape, rows)


def test_a_new_shape_must_pay() -> None:
    """Guesses now and then are no reason to change the shape of steps twice for each."""
    choice, switches, last = RowChoice(), 0, 0
    for step in range(400):
        drafted = choice.choose(LONE, [Hopes(likely(0.7) if step % 10 == 0 else [])], spare=100).rows
        switches += drafted != last
        choice.observe(LONE, drafted, dear(1 + drafted) + (drafted != last) * 0.05)
        last = drafted
    assert switches <= 4


def test_costs_are_learnt_and_follow_a_machine_that_slows_down() -> None:
    cost = StepCost()
    for factor in (1.0, 3.0):
        for step in range(100):
            drafted = (0, 3, 7)[step % 3]
            cost.observe(LONE, drafted, factor * dear(1 + drafted), is_new_shape=False)
        for drafted in (0, 3, 7):
            assert abs(cost.seconds(LONE, drafted) / (factor * dear(1 + drafted)) - 1) < 0.1


def with_surrogate(rate: float, cost: float, guessed: float = 0.0, steps: int = 60) -> tuple[Option, float]:
    """What is chosen in the end, of a surrogate whose runs cost so much of a step, and tokens a second."""
    choice, hopes = RowChoice(), Hopes(likely(guessed), surrogate=likely(rate))
    spent, tokens = 0.0, 0.0
    for _ in range(steps):
        option = choice.choose(LONE, [hopes], spare=100, run_cost=0.4)
        run = cost * free(1)
        if option.runs:
            choice.observe_runs(LONE, [run] * option.runs)
        choice.observe(LONE, option.rows, free(1 + option.rows))
        spent += free(1 + option.rows) + option.runs * run
        tokens += 1 + sum(hopes.within(option.runs)[: option.rows])
    return option, tokens / spent * free(1)


def test_steps_without_drafts_are_seen_again() -> None:
    """What they take may have become less, when drafts look better than they are."""
    choice = RowChoice()
    run(choice, LONE, [0.9], lambda rows: 0.04 if rows == 1 else 0.03)
    chosen, _ = run(choice, LONE, [0.3], lambda rows: 0.02 if rows == 1 else 0.03, steps=400)
    assert chosen[0] > 0
    assert not any(chosen[-300:])


def test_a_surrogate_runs_where_that_pays() -> None:
    option, gain = with_surrogate(0.85, cost=0.35)
    assert option == Option(3, 3)
    assert gain > 1.4
    for rate, cost in ((0.6, 0.7), (0.3, 0.35), (0.9, 1.0)):
        option, gain = with_surrogate(rate, cost)
        assert option.runs == 0, (rate, cost)
        assert gain > 0.97, "one try tells what it costs"


def test_guesses_that_cost_nothing_come_first() -> None:
    option, _ = with_surrogate(0.85, cost=0.35, guessed=0.85)
    assert option.rows > 0
    assert option.runs == 0


def test_a_sequence_takes_the_better_of_both() -> None:
    hopes = Hopes(likely(0.5), surrogate=likely(0.9))
    assert hopes.prefers_surrogate(3)
    assert list(hopes.within(3)) == likely(0.9)[:3]
    assert list(Hopes(likely(0.95), surrogate=likely(0.9)).within(3)) == likely(0.95)[:3]
    assert hopes.within(0) == likely(0.5)


def test_hopes_that_are_counted_on_stand_in_for_what_is_at_stake() -> None:
    choice = RowChoice()
    run(choice, LONE, likely(0.9), free)
    choice.observe(LONE, 0, free(1))
    for at_stake, trust, drafts in [
        (5.0, 0.0, True),
        (-0.5, 0.0, False),
        (-0.5, 0.7, True),
        (-0.5, 0.01, False),
    ]:
        option = choice.choose(LONE, [Hopes(likely(0.9))], 100, 1.0, at_stake, trust)
        assert (option.rows > 0) == drafts, (at_stake, trust)
