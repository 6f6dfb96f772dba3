"""Spans that write the same pages are in one worker."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from blockzoo.runtime.exec.topology import ChainPlan, Family, Span, SpanUse, Topology
from blockzoo.runtime.serve.span_groups import ApartError, leaders, with_others


def topology(sizes: Sequence[int], chains: Sequence[Sequence[tuple[int, int]]], guesses: dict) -> Topology:
    """Spans of so many blocks; chains of (span, position); by model, its chain and its surrogate's."""
    spans = tuple(
        Span(tuple(f"{index} {i}" for i in range(size)), 1, False) for index, size in enumerate(sizes)
    )
    plans = tuple(
        ChainPlan(Family(8, 1, 8), "", tuple(SpanUse(span, at, 0) for span, at in uses), 3, (), 9)
        for uses in chains
    )
    models = {name: model for name, (model, _) in guesses.items()}
    return Topology(spans, plans, models, {name: other for name, (_, other) in guesses.items()})


def test_a_surrogate_that_leaves_layers_out_ties_nothing() -> None:
    found = topology([2, 2, 2], [[(0, 1), (1, 3), (2, 5)], [(0, 1), (2, 5)]], {"m": (0, 1)})
    assert leaders(found) == (0, 1, 2)


def test_a_span_in_the_place_of_others_stays_with_them() -> None:
    chains = [[(0, 1), (1, 3), (2, 5)], [(0, 1), (3, 4)]]  # its block at 4 is in one, that at 5 in another
    assert leaders(topology([2, 2, 2, 2], chains, {"m": (0, 1)})) == (0, 1, 1, 1)


def test_models_are_tied_by_what_guesses_for_both() -> None:
    chains = [[(0, 1)], [(1, 1)], [(2, 1)], [(2, 1)]]
    found = topology([2, 2, 2], chains, {"one": (0, 2), "other": (1, 3)})
    assert leaders(found) == (0, 0, 0)


def test_all_of_a_group_go_where_one_goes() -> None:
    first = (0, 1, 1, 0)
    assert with_others({3: 1}, first) == {0: 1, 3: 1}
    assert with_others({0: 1, 2: 0}, first) == {0: 1, 1: 0, 2: 0, 3: 1}
    with pytest.raises(ApartError, match="stays with span 1"):
        with_others({1: 0, 2: 1}, first)
