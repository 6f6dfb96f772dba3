"""What prompt lookup finds, and in whose texts."""

from __future__ import annotations

import numpy as np

from blockzoo.runtime.draft.guesses import Context
from blockzoo.runtime.draft.lookup import MOST, AnswerLookup, PromptLookup, find


def ids(text: str) -> np.ndarray:
    return np.array([ord(char) for char in text], np.int32)


def guessed(drafter: PromptLookup | AnswerLookup, text: str, limit: int = 5, scope: str | None = "s") -> str:
    found = drafter.propose(Context(ids(text), scope), limit)
    return "".join(chr(guess.token_id) for guess in found)


def test_the_longest_agreement_wins_and_of_equal_ones_the_last() -> None:
    assert find(ids("xab1 ab2 ab3"), ids("ab")) == (11, 2)
    assert find(ids("xab1 ab2 ab3"), ids("xab")) == (3, 3)
    assert find(ids("abc"), ids("c")) is None, "one token says too little"
    assert find(ids("ab"), ids("cb")) is None
    assert find(ids(""), ids("ab")) is None


def test_all_agreements_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        text = rng.integers(0, 3, rng.integers(1, 40)).astype(np.int32)
        ending = rng.integers(0, 3, rng.integers(1, MOST)).astype(np.int32)

        def agreeing(place: int, text: np.ndarray = text, ending: np.ndarray = ending) -> int:
            count = 0
            while count < min(place, ending.size) and text[place - 1 - count] == ending[-1 - count]:
                count += 1
            return count

        best = max((agreeing(place), place) for place in range(1, text.size + 1))
        assert find(text, ending) == ((best[1], best[0]) if best[0] >= 2 else None)


def test_guesses_are_what_followed_and_surer_the_more_agrees() -> None:
    lookup = PromptLookup()
    assert guessed(lookup, "the red fox. the red", limit=4) == " fox"
    assert guessed(lookup, "a fox") == ""
    assert guessed(lookup, "abab", limit=7) == "abababa", "what repeats goes on"
    grades = [
        lookup.propose(Context(ids(text)), 1)[0].kind.grade
        for text in ("ab.ab", "abc.abc", "abcde.abcde", "abcdefghi.abcdefghi", "x" * 40)
    ]
    assert grades == [1, 2, 3, 4, 5]


def test_a_copy_goes_on_behind_a_token_that_differs() -> None:
    lookup, text = PromptLookup(), "Fuel is sold at the pier. Fuel was s"
    assert guessed(lookup, "hire a red bike. Please hire a RED"[:-2], limit=6) == "ed bik"
    assert guessed(lookup, text) == "old a", "an agreement of its own is preferred"
    (guess,) = lookup.propose(Context(ids("abcdefg.abcdX")), 1)
    assert (chr(guess.token_id), guess.kind.grade) == ("f", 0)
    assert guessed(lookup, "abc.abX") == "", "too little agrees before it"


def test_answers_of_a_scope_are_for_it_alone() -> None:
    lookup = AnswerLookup()
    lookup.remember("s", ids("Question? The answer is 42."), prompt_len=9)
    assert guessed(lookup, "What? The", limit=8) == " answer "
    assert guessed(lookup, "ion?", limit=40) == " The answer is 42.", (
        "the end of a prompt leads to its answer"
    )
    assert guessed(lookup, "What? The", scope="t") == ""
    assert guessed(lookup, "What? The", scope=None) == ""


def test_answers_do_not_run_into_each_other_and_are_bounded() -> None:
    lookup = AnswerLookup(max_scopes=2, max_tokens=30)
    for scope in ("a", "b", "c"):
        lookup.remember(scope, ids("first answer."), prompt_len=0)
        lookup.remember(scope, ids("second one."), prompt_len=0)
    assert guessed(lookup, "my ans", scope="c", limit=30) == "wer."
    assert guessed(lookup, "my ans", scope="a") == "", "the oldest scope went"
    lookup.remember("c", ids("x" * 29), prompt_len=0)
    assert guessed(lookup, "sec", scope="c") == "", "old answers go"


def test_a_copy_from_another_answer_goes_on_behind_a_token_that_differs() -> None:
    lookup = AnswerLookup()
    lookup.remember("s", ids('item: bolts, "count": 4, "place"'), 0)
    assert guessed(lookup, '7, item: bolts, "count": 9', limit=4) == ', "p'
    (guess,) = lookup.propose(Context(ids('7, item: bolts, "count": 9'), "s"), 1)
    assert guess.kind.grade == 0
    assert guessed(lookup, "xy: 9") == "", "too little agrees before it"
    lookup.remember("t", ids("abcdefg"), 0)
    assert guessed(lookup, "abcdefX", scope="t") == "", "the answer ends there"
    lookup.remember("t", ids("another"), 0)
    assert guessed(lookup, "abcdefgX", scope="t") == "", "answers do not run into each other"
