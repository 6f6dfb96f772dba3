"""Prompts whose answers are known, made of documents that other prompts have shown behind other words.

Every prompt is words of its own, eight documents, a question. Documents are held-out source text, most with a
passage of a task among it. All of them are known from donors, word by word, and what stood before them there
was different: so no prefix is known, and everything but the first and the last words is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from tokenizers import Tokenizer

from blockzoo.zoo.demo.corpus import standard_library_texts
from blockzoo.zoo.demo.documents import Filler
from blockzoo.zoo.demo.tasks import Document, asked_in_full, assignments, facts

NUM_DOCUMENTS = 8
_OPENING = 32  # tokens before the documents
_CONTINUED, _CONTINUATION = 32, 16  # of text: tokens of the question, of the answer
_TEXT_BYTES = 2_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """Prompts that are run before, the prompt that is judged, and what must follow it."""

    donors: list[list[int]]
    prompt: list[int]
    answer: list[int]


class Tasks:
    """The three tasks, as iterators without end.

    Args:
        tokenizer: of the model.
        length: tokens of a prompt, about.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self._tokenizer = tokenizer
        self._filler = Filler(tokenizer, _TEXT_BYTES, held_out=True)
        self._size = (length - 2 * _OPENING) // NUM_DOCUMENTS

    def facts(self, rng: random.Random) -> Iterator[Sample]:
        """Notes in two halves, each in a document; each half of the documents known from another prompt.
        Where somebody's thing was found stands in two of them, and is to be said in full."""
        while True:
            notes = asked_in_full(facts(rng, NUM_DOCUMENTS // 2, "full", split=True))
            documents = [self._document(rng, passage) for passage in notes.passages]
            question = next(q for q in notes.questions if "Where was" in q.prompt)
            donors = self._halves(rng, documents)
            yield self._sample(rng, donors, documents, question.prompt, question.answer)

    def chains(self, rng: random.Random) -> Iterator[Sample]:
        """Assignments, one a document; the question is about one that leans on another.

        The documents that lean on others are known from a prompt in which these gave other numbers, and so
        other values: these must flow in anew.
        """
        while True:
            document = assignments(rng, NUM_DOCUMENTS, max_hops=1)
            leaning = [_leans(passage) for passage in document.passages]
            asked = [q for q in document.questions if _leans(_statement_of(document, q.prompt[3]))]
            if not asked:
                continue
            documents = [self._document(rng, passage) for passage in document.passages]
            others = [
                known if leans else self._document(rng, _with_other_number(rng, passage))
                for known, leans, passage in zip(documents, leaning, document.passages, strict=True)
            ]
            numbers = [
                self._document(rng) if leans else known
                for known, leans in zip(documents, leaning, strict=True)
            ]
            rng.shuffle(numbers)
            question = rng.choice(asked)
            digit = question.answer.strip()  # " 7": the space, a token of its own, is no answer
            yield self._sample(rng, [others, numbers], documents, f"{question.prompt} ", digit)

    def text(self, rng: random.Random) -> Iterator[Sample]:
        """Pieces of source files; what is judged goes on with one of them."""
        need = self._size + _CONTINUED + _CONTINUATION
        texts = [self._encode(text) for text in standard_library_texts(_TEXT_BYTES, held_out=True)]
        texts = [ids for ids in texts if len(ids) > need]
        while True:
            files = [rng.choice(texts) for _ in range(NUM_DOCUMENTS)]
            starts = [rng.randrange(len(ids) - need) for ids in files]
            pieces = [ids[start : start + self._size] for ids, start in zip(files, starts, strict=True)]
            following = files[0][starts[0] + self._size : starts[0] + need]
            donors = self._halves(rng, pieces)
            rng.shuffle(pieces)
            prompt = [*self._opening(rng), *chain(*pieces), *following[:_CONTINUED]]
            yield Sample(self._donors(rng, donors), prompt, following[_CONTINUED:])

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _document(self, rng: random.Random, *passages: str) -> list[int]:
        return self._filler.document(rng, [self._encode(passage) for passage in passages], self._size)

    def _opening(self, rng: random.Random) -> list[int]:
        return self._filler.document(rng, [], _OPENING)

    @staticmethod
    def _halves(rng: random.Random, documents: Sequence[list[int]]) -> list[list[list[int]]]:
        mixed = rng.sample(documents, len(documents))
        return [mixed[::2], mixed[1::2]]

    def _donors(self, rng: random.Random, prompts: list[list[list[int]]]) -> list[list[int]]:
        # what ends a donor is in its last, incomplete page, which nobody takes over
        return [[*self._opening(rng), *chain(*documents), *self._opening(rng)] for documents in prompts]

    def _sample(
        self,
        rng: random.Random,
        donors: list[list[list[int]]],
        documents: list[list[int]],
        question: str,
        answer: str,
    ) -> Sample:
        prompt = [*self._opening(rng), *chain(*documents), *self._encode(question)]
        return Sample(self._donors(rng, donors), prompt, self._encode(answer))


def _leans(statement: str) -> bool:
    return len(statement) > len("Let a = 3.\n")


def _statement_of(document: Document, name: str) -> str:
    (passage,) = [passage for passage in document.passages if passage.startswith(f"Let {name} =")]
    return passage


def _with_other_number(rng: random.Random, statement: str) -> str:
    digit = statement[-3]
    return statement.replace(digit, str((int(digit) + rng.randint(1, 9)) % 10))
