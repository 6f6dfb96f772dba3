"""Work that other threads have done between two steps."""

from __future__ import annotations

import threading

import pytest

from blockzoo.runtime.serve.between_steps import BetweenSteps


def test_who_steps_all_the_time_does_the_work_of_others() -> None:
    between, over, inside = BetweenSteps(), threading.Event(), []
    seen: list[tuple[str, bool]] = []

    def step() -> None:
        while not over.is_set():
            with between.held():
                inside.append(1)
                inside.pop()

    def work(name: str) -> str:
        seen.append((name, bool(inside)))
        return name

    thread = threading.Thread(target=step, name="steps")
    thread.start()
    try:
        for number in range(200):
            assert between.run(lambda number=number: work(str(number))) == str(number)
    finally:
        over.set()
        thread.join()
    assert seen == [(str(number), False) for number in range(200)]


def test_without_steps_it_is_done_at_once_and_errors_are_the_askers() -> None:
    between = BetweenSteps()
    assert between.run(threading.current_thread) is threading.current_thread()

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        between.run(fail)
    with between.held():
        assert between.run(lambda: 5) == 5  # from within
