"""Which calls of a step run at the same time, and that they do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.runtime.exec.call_graph import FEW_ROWS, Call, CallGraph, Lanes

MANY = FEW_ROWS + 1


def call(span: int, num_rows: int, *groups: int, copies: bool = False) -> Call:
    made = Call(span, 0, num_rows, {}, groups=groups)
    if copies:
        made.copies_in.append((np.zeros(1), np.zeros(1)))
    return made


def graph(*calls: Call) -> CallGraph:
    return CallGraph(calls, [1] * 8)


def test_calls_wait_for_those_of_their_rows_and_of_their_engine() -> None:
    calls = [call(0, MANY, 0, 1), call(1, 1, 0), call(2, 1, 1), call(2, 1, 2), call(3, MANY, 0, 1)]
    assert graph(*calls).waits_for == [set(), {0}, {0}, {2}, {1, 2}]


def test_what_a_lane_may_run_is_small_and_shares_no_scratch() -> None:
    calls = [call(0, FEW_ROWS, 0), call(1, MANY, 1), call(2, 1, 2, copies=True), call(3, 1, 3)]
    made = CallGraph(calls, [2, 9, 9, 7])
    assert made.small == [3, 0]  # the longest first
    assert made.large == [1, 2]


def test_one_lane_keeps_the_order() -> None:
    seen: list[int] = []
    calls = [call(2, 1, 0), call(0, 9, 1, 2), call(1, 1, 1)]
    Lanes(1).run(graph(*calls), lambda call: seen.append(call.span))
    assert seen == [2, 0, 1]


def test_calls_that_all_wait_for_each_other_stay_with_the_caller() -> None:
    threads = []
    calls = graph(call(0, 1, 0), call(1, 1, 0), call(2, 1, 0))
    assert calls.is_chain
    Lanes(2).run(calls, lambda call: threads.append(threading.get_ident()))
    assert set(threads) == {threading.get_ident()}
    assert not graph(call(0, 1, 0), call(1, 1, 0), call(2, 1, 1)).is_chain


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(1, 9), st.sets(st.integers(0, 6), min_size=1), st.booleans()
        ),
        max_size=14,
    ),
    st.integers(2, 4),
)
@settings(max_examples=60, deadline=None)
def test_every_call_runs_once_behind_what_it_waits_for(
    drawn: list[tuple[int, int, set[int], bool]], count: int
) -> None:
    calls = [call(span, rows, *sorted(groups), copies=copies) for span, rows, groups, copies in drawn]
    made, started, ended = graph(*calls), list[int](), list[int]()
    running: set[int] = set()

    def run(one: Call) -> None:
        index = calls.index(one)
        for i, earlier in enumerate(calls[:index]):
            if earlier.span == one.span or set(earlier.groups) & set(one.groups):
                assert i in ended
        running.add(index)
        started.append(index)
        large = [i for i in tuple(running) if not calls[i].is_small]
        assert len(large) <= 1  # they share the scratch and the processors
        running.remove(index)
        ended.append(index)

    Lanes(count).run(made, run)
    assert sorted(started) == list(range(len(calls)))


def meeting(parties: int) -> tuple[Callable[[Call], None], list[int]]:
    """A run that returns only when so many run at the same time, and the threads that took part."""
    everybody, threads = threading.Barrier(parties, timeout=30), list[int]()

    def run(call: Call) -> None:
        everybody.wait()
        threads.append(threading.get_ident())

    return run, threads


def test_small_calls_run_at_the_same_time() -> None:
    run, threads = meeting(3)
    Lanes(3).run(graph(call(0, 1, 0), call(1, 1, 1), call(2, 1, 2)), run)
    assert len(set(threads)) == 3


def test_a_small_call_runs_beside_a_large_one_which_stays_with_the_caller() -> None:
    run, threads = meeting(2)
    Lanes(2).run(graph(call(0, 1, 0), call(1, MANY, 1)), run)
    assert len(set(threads)) == 2
    assert threading.get_ident() in threads


def test_the_caller_takes_small_calls_when_nothing_else_is_left() -> None:
    threads = []

    def run(call: Call) -> None:
        threads.append(threading.get_ident())
        time.sleep(0.01)

    Lanes(2).run(graph(*(call(i, 1, i) for i in range(8))), run)
    assert len(set(threads)) == 2


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_raised_when_all_that_run_have_ended(failing: int) -> None:
    both, ended = threading.Barrier(2, timeout=30), list[int]()

    def run(call: Call) -> None:
        if call.span < 2:
            both.wait()
        if call.span == failing:
            raise ValueError("out of order")
        time.sleep(0.02)
        ended.append(call.span)

    lanes = Lanes(2)
    with pytest.raises(ValueError, match="out of order"):
        lanes.run(graph(call(0, 1, 0), call(1, MANY, 1), call(2, MANY, 0, 1)), run)
    assert ended == [1 - failing]  # what waits for it never starts
    lanes.run(graph(call(3, 1, 0), call(4, 1, 1)), run)  # and they go on
    assert sorted(ended[1:]) == [3, 4]


def test_the_caller_may_run_where_it_might_before() -> None:
    before = os.sched_getaffinity(0)
    lanes = Lanes(2)
    for _ in range(3):
        lanes.run(graph(call(0, 1, 0), call(1, 1, 1)), lambda call: None)
    assert os.sched_getaffinity(0) == before
