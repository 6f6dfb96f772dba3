"""Long prompts for the demo family: the passages of a task spread over documents of source text.

A document is paragraphs of Python sources with a passage or more between them, in tokens, so that it is the
same tokens in every prompt. Knows tokens but no models.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from . import corpus

_PARAGRAPH_END = re.compile(r"\n+(?=\S)")
_MOST_LINES = 6  # of a paragraph: heads of classes and functions rather than all of them


class Filler:
    """Paragraphs of the standard library's sources.

    Args:
        tokenizer: of the model.
        max_bytes: of sources that are read.
        held_out: take the files that nothing was trained on.
    """

    def __init__(self, tokenizer: Tokenizer, max_bytes: int, held_out: bool = False) -> None:
        texts = corpus.standard_library_texts(max_bytes, held_out)
        paragraphs = {_head(part) for text in texts for part in _PARAGRAPH_END.split(text) if part.strip()}
        encoded = tokenizer.encode_batch(sorted(paragraphs))
        self._paragraphs: list[list[int]] = [encoding.ids for encoding in encoded]
        self._line_end: int = tokenizer.encode("\n").ids[0]

    def draw(self, rng: random.Random, length: int) -> list[list[int]]:
        """Paragraphs of `length` tokens in all; the last is cut to fit."""
        found: list[list[int]] = []
        while length > 0:
            paragraph = rng.choice(self._paragraphs)[: length - 1]
            if len(paragraph) == length - 1:
                paragraph = [*paragraph, self._line_end]
            found.append(paragraph)
            length -= len(paragraph)
        return found

    def document(self, rng: random.Random, passages: Sequence[Sequence[int]], length: int) -> list[int]:
        """`passages` in their order with paragraphs between: `length` tokens, or more if they alone are."""
        paragraphs: list[Sequence[int]] = [*self.draw(rng, length - sum(map(len, passages)))]
        for passage, place in zip(
            reversed(passages),
            sorted((rng.randint(0, len(paragraphs)) for _ in passages), reverse=True),
            strict=True,
        ):
            paragraphs.insert(place, passage)
        return [token for paragraph in paragraphs for token in paragraph]


def _head(paragraph: str) -> str:
    return "\n".join(paragraph.strip("\n").split("\n")[:_MOST_LINES]) + "\n"
