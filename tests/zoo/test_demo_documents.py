from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer

from blockzoo.zoo.demo.assemble import tokenizer_json
from blockzoo.zoo.demo.documents import Filler


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_buffer(tokenizer_json())


@pytest.fixture(scope="module")
def filler(tokenizer: Tokenizer) -> Filler:
    return Filler(tokenizer, 100_000)


@pytest.mark.parametrize("length", [30, 100, 500])
def test_passages_stand_whole_and_in_order_among_other_text(
    tokenizer: Tokenizer, filler: Filler, length: int
) -> None:
    texts = ["Let a = 3.\n", "Let b = a + 4.\n", "Let c = 0.\n"]
    passages = [tokenizer.encode(text).ids for text in texts]
    for seed in range(20):
        document = filler.document(random.Random(seed), passages, length)
        assert len(document) == length
        text = tokenizer.decode(document)
        places = [text.index(passage) for passage in texts]
        assert places == sorted(places)
        assert text.endswith("\n")


def test_passages_longer_than_the_document_stand_alone(tokenizer: Tokenizer, filler: Filler) -> None:
    passage = tokenizer.encode("Let a = 3.\n").ids
    assert filler.document(random.Random(0), [passage, passage], 0) == passage * 2


def test_held_out_text_is_other_text(tokenizer: Tokenizer) -> None:
    def lines(filler: Filler) -> set[str]:
        drawn = filler.draw(random.Random(0), 20_000)
        return {line for ids in drawn for line in tokenizer.decode(ids).split("\n") if len(line) > 30}

    known, held_out = (lines(Filler(tokenizer, 400_000, held)) for held in (False, True))
    assert len(known & held_out) < 0.02 * len(held_out)
