"""Which drafter is listened to, and what guides leave of guesses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from blockzoo.runtime.api.request import GuidedDecoding
from blockzoo.runtime.draft.acceptance import Acceptance
from blockzoo.runtime.draft.forced import ForcedTokens
from blockzoo.runtime.draft.guesses import Context, Guess, Kind, chances, propose
from blockzoo.runtime.sampling.guided import Guide, Guides
from blockzoo.runtime.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"question": {"type": "integer"}},
    "required": ["question"],
    "additionalProperties": False,
}


class Fixed:
    def __init__(self, name: str, token_ids: list[int]) -> None:
        self.guesses = [Guess(token_id, Kind(name)) for token_id in token_ids]

    def propose(self, context: Context, limit: int) -> list[Guess]:
        return self.guesses[:limit]


def test_chances_multiply() -> None:
    guesses = [Guess(1, Kind("a")), Guess(2, Kind("b")), Guess(3, Kind("a"))]
    assert chances(guesses, lambda kind: {"a": 0.5, "b": 0.8}[kind.drafter]) == pytest.approx([0.5, 0.4, 0.2])


def test_the_drafter_with_most_hope_is_listened_to() -> None:
    context = Context(np.array([1], np.int32))
    sure, long = Fixed("sure", [7]), Fixed("long", [8] * 9)
    for rates, expected in (({"sure": 0.9, "long": 0.3}, 7), ({"sure": 0.9, "long": 0.8}, 8)):
        found = propose([sure, long], context, 5, lambda kind, rates=rates: rates[kind.drafter])
        assert found[0].token_id == expected
        assert len(found) <= 5
    assert propose([], context, 5, lambda kind: 1.0) == []


@pytest.fixture
def tokenizer(bpe_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(bpe_tokenizer_dir)


@pytest.fixture
def guide(tokenizer: Tokenizer) -> Guide:
    schema = GuidedDecoding("json_schema", json.dumps(SCHEMA))
    return Guides().guide(schema, tokenizer, tokenizer.vocab_size, (1,))


def test_a_guide_cuts_guesses_and_gives_its_own(tokenizer: Tokenizer, guide: Guide) -> None:
    for token_id in tokenizer.encode('{"', add_special_tokens=False):
        guide.append(token_id)
    forced = ForcedTokens().propose(Context(np.zeros(1, np.int32), None, guide), 50)
    assert tokenizer.decode([guess.token_id for guess in forced]).startswith("question")
    wrong = Fixed("wrong", [*tokenizer.encode("quite", add_special_tokens=False), -1, 10**9])
    context = Context(np.zeros(1, np.int32), None, guide)
    assert guide.num_allowed([guess.token_id for guess in wrong.guesses]) < len(wrong.guesses)
    found = propose([ForcedTokens(), wrong], context, 50, lambda kind: 0.9)
    text = tokenizer.decode([guess.token_id for guess in found])
    assert text.startswith("question"), "what is certain is preferred"
    assert guide.num_allowed([guess.token_id for guess in found]) == len(found)
    assert guide.allows(found[0].token_id), "the guide itself is where it was"


def test_behind_what_one_drafter_guesses_others_are_asked(tokenizer: Tokenizer, guide: Guide) -> None:
    head = tokenizer.encode('{"', add_special_tokens=False)
    context = Context(np.zeros(1, np.int32), None, guide)
    found = propose([ForcedTokens(), Fixed("head", head)], context, 50, lambda kind: 0.9)
    assert tokenizer.decode([guess.token_id for guess in found]).startswith('{"question')
    assert {guess.kind.drafter for guess in found} == {"head", "grammar"}


def test_rates_start_from_the_wider_experience_and_come_to_the_own() -> None:
    kind, other = Kind("prompt", 2), Kind("prompt", 3)
    tenant = Acceptance()
    first = tenant.rate(kind)
    for _ in range(200):
        Acceptance(tenant).note(kind, True)
    assert tenant.rate(kind) > 0.95 > first
    mine = Acceptance(tenant, memory=32)
    assert mine.rate(kind) == pytest.approx(tenant.rate(kind))
    for _ in range(40):
        mine.note(kind, False)
    assert mine.rate(kind) < 0.15
    assert mine.rate(other) == Acceptance().rate(other)


def test_what_was_found_before_counts_first_and_comes_back() -> None:
    kind, other = Kind("surrogate", 1), Kind("prompt", 1)
    rates = Acceptance(first={kind: 0.9})
    assert rates.rate(kind) == 0.9
    assert rates.rate(Kind("surrogate", 2)) < 0.9
    for _ in range(50):
        rates.note(kind, False)
        rates.note(other, True)
    wrong, right = rates.rate(kind), rates.rate(other)
    assert wrong < 0.1
    for _ in range(40):
        rates.fade("surrogate")
    assert rates.rate(kind) > 0.6, "nobody tried it since"
    assert rates.rate(other) == right
