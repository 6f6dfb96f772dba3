"""Which calls of a step run at the same time, and that they do."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockzoo.runtime.stages import FEW_ROWS, Call, Lanes, make_stages


def call(span: int, num_rows: int, *groups: int, copies: bool = False) -> Call:
    made = Call(span, 0, num_rows, {}, groups=groups)
    if copies:
        made.copies_in.append((np.zeros(1), np.zeros(1)))
    return made


def spans(stages: list[list[list[Call]]]) -> list[list[list[int]]]:
    return [[[call.span for call in lane] for lane in stage] for stage in stages]


def test_one_lane_keeps_the_order() -> None:
    calls = [call(2, 1, 0), call(0, 9, 1, 2), call(1, 1, 1)]
    assert spans(make_stages(calls, [1, 1, 1], 1)) == [[[2]], [[0]], [[1]]]


def test_small_calls_wait_and_then_run_together() -> None:
    unrelated, shared, upper, own, again = (
        call(0, 1, 0),
        call(1, 19, 1, 2, 3),
        call(2, 17, 1, 3),
        call(3, 1, 2),
        call(4, 2, 3),
    )
    head = call(5, 19, 1, 2, 3)
    stages = make_stages([unrelated, shared, upper, own, again, head], [12, 8, 2, 4, 5, 1], 2)
    assert spans(stages) == [[[1]], [[2]], [[0], [4, 3]], [[5]]]


def test_calls_of_many_rows_have_stages_of_their_own() -> None:
    calls = [call(i, FEW_ROWS + 1, i) for i in range(3)]
    assert spans(make_stages(calls, [1] * 3, 4)) == [[[0]], [[1]], [[2]]]


def test_what_shares_scratch_or_an_engine_runs_apart() -> None:
    calls = [call(0, 1, 0, copies=True), call(1, 1, 1), call(1, 1, 2), call(2, 1, 3)]
    stages = make_stages(calls, [1] * 3, 4)
    assert spans(stages)[0] == [[0]]
    assert sorted(span for lane in spans(stages)[1] for span in lane) == [1, 2]
    assert spans(stages)[2] == [[1]]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(1, 9), st.sets(st.integers(0, 6), min_size=1), st.booleans()
        ),
        max_size=14,
    ),
    st.integers(2, 4),
)
def test_stages_keep_what_depends_in_order(
    drawn: list[tuple[int, int, set[int], bool]], num_lanes: int
) -> None:
    calls = [call(span, rows, *sorted(groups), copies=copies) for span, rows, groups, copies in drawn]
    stages = make_stages(calls, [1, 2, 3, 4, 5, 6], num_lanes)
    assert sorted(map(id, (c for stage in stages for lane in stage for c in lane))) == sorted(map(id, calls))
    stage_of = {id(c): number for number, stage in enumerate(stages) for lane in stage for c in lane}
    for i, first in enumerate(calls):
        for second in calls[i + 1 :]:
            if set(first.groups) & set(second.groups):
                assert stage_of[id(first)] < stage_of[id(second)]
    for stage in stages:
        together = [c for lane in stage for c in lane]
        assert len(stage) <= num_lanes
        assert all(stage)
        assert len({c.span for c in together}) == len(together)
        if len(together) > 1:
            assert all(c.num_rows <= FEW_ROWS and not c.copies_in for c in together)


def test_lanes_run_at_the_same_time() -> None:
    everybody = threading.Barrier(3, timeout=30)
    met = []

    def run(call: Call) -> None:
        everybody.wait()
        met.append((call.span, threading.get_ident()))

    Lanes(3).run([[call(0, 1)], [call(1, 1)], [call(2, 1)]], run)
    assert {span for span, _ in met} == {0, 1, 2}
    assert len({thread for _, thread in met}) == 3


def test_a_lane_keeps_its_order() -> None:
    seen: list[int] = []
    Lanes(2).run([[call(0, 1), call(1, 1), call(2, 1)]], lambda call: seen.append(call.span))
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_raised_when_all_have_ended(failing: int) -> None:
    ended = []

    def run(call: Call) -> None:
        if call.span == failing:
            raise ValueError("out of order")
        ended.append(call.span)

    lanes = Lanes(2)
    with pytest.raises(ValueError, match="out of order"):
        lanes.run([[call(0, 1)], [call(1, 1)]], run)
    assert ended == [1 - failing]
    lanes.run([[call(2, 1)], [call(3, 1)]], run)  # and they go on
    assert sorted(ended[1:]) == [2, 3]


def test_the_caller_stays_where_it_may_run() -> None:
    before = os.sched_getaffinity(0)
    lanes = Lanes(2)
    for _ in range(3):
        lanes.run([[call(0, 1)], [call(1, 1)]], lambda call: None)
    assert os.sched_getaffinity(0) == before
