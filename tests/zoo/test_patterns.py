"""Patterns of adapters against module names: as `re` matches them, or not for long."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.zoo.errors import CheckpointError
from blockzoo.zoo.patterns import How, first_match

NAMES = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1, 11) for part in "qkv"]
PATTERNS = [
    "q_proj",
    r"layers\.1\..*",
    "^model.layers.0.self_attn.v_proj",
    r".*\.(q|k)_proj",
    r"(.*\.)?(k_proj)$",
]


def by_re(patterns: list[str], how: How, names: list[str]) -> list[int | None]:
    return [next((i for i, p in enumerate(patterns) if getattr(re, how)(p, n)), None) for n in names]


@pytest.mark.parametrize("how", ["match", "fullmatch"])
def test_matches_are_those_of_re(how: How) -> None:
    assert first_match(PATTERNS, how, NAMES) == by_re(PATTERNS, how, NAMES)
    for pattern in PATTERNS:
        assert first_match([pattern], how, NAMES) == by_re([pattern], how, NAMES)
    assert first_match([], how, NAMES) == [None] * len(NAMES)
    assert first_match(PATTERNS, how, []) == []


@given(st.lists(st.text("ab.^$_-", max_size=6), max_size=3), st.lists(st.text("ab.", max_size=6), max_size=3))
@settings(max_examples=60, deadline=None)
def test_plain_patterns_match_as_in_re(patterns: list[str], names: list[str]) -> None:
    assert first_match(patterns, "match", names) == by_re(patterns, "match", names)


@pytest.mark.parametrize(
    "pattern", [r"(a|aa)+$|(([a-z._0-9])*)*!", r"(.*)*(.*)*(.*)*x{5}y", r"model)|((.+)+!"]
)
def test_patterns_that_run_away_are_stopped(pattern: str) -> None:
    with pytest.raises(CheckpointError, match=r"takes more than 2 s to match|no regular expression"):
        first_match(
            [rf"(.*\.)?({pattern})$"], "fullmatch", ["model.layers.0.self_attn.q_proj.and.more.names"]
        )


@pytest.mark.parametrize(
    "pattern", ["(", "[a", "*", "a{99999999999}", "(?P<x>a)(?P<x>b)", "(" * 5000, "+.\ud800"]
)
def test_what_is_no_pattern_is_named(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="is no regular expression that can be used"):
        first_match([pattern], "match", NAMES)
