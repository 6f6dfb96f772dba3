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
from patience import PATIENCE_S

from blockzoo.runtime.exec.calls import FEW_ROWS, Call, CallGraph, Passed
from blockzoo.runtime.exec.parallel_calls import CallRunner

MANY = FEW_ROWS + 1


ROWS = np.zeros((16, 1), np.float32)


def call(span: int, num_rows: int, first: int, end: int | None = None, copies: bool = False) -> Call:
    """One that works on the rows [first, end) of an array that all share."""
    rows = ROWS[first : first + 1 if end is None else end]
    made = Call(span, 0, num_rows, {"hidden": rows, "hidden_out": rows})
    if copies:
        made.copies_in.append((np.zeros(1), np.zeros(1)))
    return made


def graph(*calls: Call) -> CallGraph:
    return CallGraph(calls, [1] * 8)


def test_calls_wait_for_those_of_their_rows_and_of_their_engine() -> None:
    calls = [call(0, MANY, 0, 2), call(1, 1, 0), call(2, 1, 1), call(2, 1, 2), call(3, MANY, 0, 2)]
    assert graph(*calls).waits_for == [set(), {0}, {0}, {2}, {0, 1, 2}]


def test_calls_that_only_read_the_same_bytes_wait_for_none() -> None:
    shared, own = np.zeros(4, np.int32), np.zeros((3, 2), np.float32)
    calls = [Call(i, 0, 1, {"past_lens": shared[i:], "hidden_out": own[i : i + 1]}) for i in range(3)]
    assert graph(*calls).waits_for == [set(), set(), set()]


@pytest.mark.parametrize("where", ["hidden", "copies_in", "copies_out", "passed"])
def test_what_is_read_in_any_way_is_not_written_meanwhile(where: str) -> None:
    row, reader = ROWS[3:4], Call(0, 0, 1, {})
    if where == "hidden":
        reader.binds["hidden"] = row
    elif where == "passed":
        reader.passed.append(Passed(0, 1, row))
    else:
        getattr(reader, where).append((np.zeros((1, 1), np.float32), row))
    writer = Call(1, 0, 1, {"hidden_out": ROWS[2:5]})
    assert graph(reader, writer).waits_for == [set(), {0}]
    assert graph(writer, reader).waits_for == [set(), {0}]


def test_what_runs_beside_others_is_small_and_copies_nothing() -> None:
    calls = [call(0, FEW_ROWS, 0), call(1, MANY, 1), call(2, 1, 2, copies=True), call(3, 1, 3)]
    made = CallGraph(calls, [2, 9, 9, 7])
    assert made.small == [3, 0]  # the longest first
    assert made.large == [1, 2]


def test_one_thread_keeps_the_order() -> None:
    seen: list[int] = []
    calls = [call(2, 1, 0), call(0, 9, 1, 3), call(1, 1, 1)]
    CallRunner(1).run(graph(*calls), lambda call: seen.append(call.span))
    assert seen == [2, 0, 1]


def test_calls_that_all_wait_for_each_other_stay_with_the_caller() -> None:
    threads = []
    calls = graph(call(0, 1, 0), call(1, 1, 0), call(2, 1, 0))
    assert calls.is_chain
    CallRunner(2).run(calls, lambda call: threads.append(threading.get_ident()))
    assert set(threads) == {threading.get_ident()}
    assert not graph(call(0, 1, 0), call(1, 1, 0), call(2, 1, 1)).is_chain


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 6), st.integers(1, 6), st.booleans()),
        max_size=14,
    ),
    st.integers(2, 4),
)
@settings(max_examples=60, deadline=None)
def test_every_call_runs_once_behind_what_it_waits_for(
    drawn: list[tuple[int, int, int, int, bool]], count: int
) -> None:
    calls = [call(span, rows, first, first + n, copies) for span, rows, first, n, copies in drawn]
    made, started, ended = graph(*calls), list[int](), list[int]()
    running: set[int] = set()

    def run(one: Call) -> None:
        index = calls.index(one)
        for i, earlier in enumerate(calls[:index]):
            if earlier.span == one.span or np.shares_memory(earlier.binds["hidden"], one.binds["hidden"]):
                assert i in ended
        running.add(index)
        started.append(index)
        large = [i for i in tuple(running) if not calls[i].is_small]
        assert len(large) <= 1  # they use all processors
        running.remove(index)
        ended.append(index)

    CallRunner(count).run(made, run)
    assert sorted(started) == list(range(len(calls)))


def meeting(parties: int) -> tuple[Callable[[Call], None], list[int]]:
    """A run that returns only when so many run at the same time, and the threads that took part."""
    everybody, threads = threading.Barrier(parties, timeout=PATIENCE_S), list[int]()

    def run(call: Call) -> None:
        everybody.wait()
        threads.append(threading.get_ident())

    return run, threads


def test_small_calls_run_at_the_same_time() -> None:
    run, threads = meeting(3)
    CallRunner(3).run(graph(call(0, 1, 0), call(1, 1, 1), call(2, 1, 2)), run)
    assert len(set(threads)) == 3


def test_a_small_call_runs_beside_a_large_one_which_stays_with_the_caller() -> None:
    run, threads = meeting(2)
    CallRunner(2).run(graph(call(0, 1, 0), call(1, MANY, 1)), run)
    assert len(set(threads)) == 2
    assert threading.get_ident() in threads


def test_the_caller_takes_small_calls_when_nothing_else_is_left() -> None:
    both, threads = threading.Barrier(2, timeout=PATIENCE_S), set[int]()

    def run(call: Call) -> None:
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            both.wait()

    CallRunner(2).run(graph(*(call(i, 1, i) for i in range(8))), run)
    assert len(threads) == 2


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_raised_when_all_that_run_have_ended(failing: int) -> None:
    both, ended = threading.Barrier(2, timeout=PATIENCE_S), list[int]()

    def run(call: Call) -> None:
        if call.span < 2:
            both.wait()
        if call.span == failing:
            raise ValueError("out of order")
        time.sleep(0.02)
        ended.append(call.span)

    runner = CallRunner(2)
    with pytest.raises(ValueError, match="out of order"):
        runner.run(graph(call(0, 1, 0), call(1, MANY, 1), call(2, MANY, 0, 2)), run)
    assert ended == [1 - failing]  # what waits for it never starts
    runner.run(graph(call(3, 1, 0), call(4, 1, 1)), run)  # and they go on
    assert sorted(ended[1:]) == [3, 4]


def test_the_caller_may_run_where_it_might_before() -> None:
    before = os.sched_getaffinity(0)
    runner = CallRunner(2)
    for _ in range(3):
        runner.run(graph(call(0, 1, 0), call(1, 1, 1)), lambda call: None)
    assert os.sched_getaffinity(0) == before
