"""How `benchmarks.reuse_suite.guard` chooses a threshold, and what it says of it."""

from __future__ import annotations

from typing import Any

from benchmarks.reuse_suite.guard import judged, summary, threshold


def record(task: str, number: int, margin: float, *agrees: bool) -> dict[str, Any]:
    return {"task": task, "number": number, "margin": margin, "agrees": list(agrees), "cost": 0.4}


RECORDS = [
    record("gist", 0, 0.1, False, True),
    record("gist", 2, 0.5, False, True),
    record("gist", 4, 0.4, True, True),
    record("gist", 6, 0.9, True, False),
    record("gist", 1, 0.3, False, False),
    record("gist", 3, 0.8, False, True),
    record("examples", 1, 0.7, True, True),
    record("tables", 0, 0.2, True, True),
]


def test_the_threshold_is_the_lowest_that_catches_enough() -> None:
    assert threshold(RECORDS[:4], 1.0) == 0.51
    assert threshold(RECORDS[:4], 0.5) == 0.11
    assert threshold(RECORDS[2:4], 0.8) == 0.0  # nothing is wrong


def test_what_it_gives_and_costs_on_other_samples() -> None:
    found = judged(RECORDS, 1.0)
    assert found["guard"] == 0.51
    assert found["groups"].keys() == {"chosen on", "others", "held out", "gist", "examples", "tables"}
    others = found["groups"]["others"]
    assert (others["samples"], others["first token wrong"], others["some token wrong"]) == (3, 2, 2)
    assert others["held back"] == 0.333
    assert others["of these caught"] == 0.5
    assert others["false alarms (first token right)"] == 0.0
    assert others["equal top tokens"] == 0.5
    assert others["equal top tokens, guarded"] == 0.8333
    assert (others["cost"], others["cost, guarded"]) == (0.4, 0.733)
    assert found["groups"]["held out"]["false alarms (all right)"] == 1.0


def test_the_area_is_one_where_all_that_is_wrong_is_less_sure() -> None:
    assert summary(RECORDS[:4], 0.51)["area (first token)"] == 0.75
    assert summary(RECORDS[4:7:2], 0.51)["area (first token)"] == 1.0
    assert summary(RECORDS[2:3], 0.51)["area (first token)"] is None
