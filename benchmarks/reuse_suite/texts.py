"""Words that the tasks are made of: English articles, source code, records of people.

Articles are the topics of Python's own reference, code is its standard library: real text that every Python
brings. Knows neither a model nor a tokenizer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics

from benchmarks.smollm2_family.names import PEOPLE, PLACES
from blockzoo.zoo.demo.corpus import standard_library_texts

CHARACTERS = 4
"""Of a token of text, about."""
NAMES = [*PEOPLE[0], *PEOPLE[1]]
CITIES = [*PLACES[0], *PLACES[1]]
_CODE_BYTES = 2_000_000


@dataclass(frozen=True, slots=True)
class Messages:
    """A conversation up to the question that is to be answered, or into its answer."""

    turns: tuple[tuple[str, str], ...]  # (role, content)

    @classmethod
    def of(cls, system: str, *contents: str) -> Messages:
        """A system prompt, then user and assistant in turns; the last is a user's."""
        roles = ("user", "assistant")
        return cls((("system", system), *((roles[i % 2], text) for i, text in enumerate(contents))))

    @property
    def is_begun(self) -> bool:
        """Whether the last turn is the beginning of the answer."""
        return self.turns[-1][0] == "assistant"

    def begun(self, words: str | None) -> Messages:
        """With the first words of the answer."""
        return self if words is None else Messages((*self.turns, ("assistant", words)))

    def as_dicts(self) -> list[dict[str, str]]:
        """For a chat template."""
        return [{"role": role, "content": content} for role, content in self.turns]


@cache
def _paragraphs() -> list[list[str]]:
    """Of each article its paragraphs of prose."""
    found = []
    for name in sorted(topics):
        parts = [" ".join(part.split()) for part in topics[name].split("\n\n")]
        parts = [part for part in parts if len(part) > 120 and part[0].isupper() and part[-1] in ".:"]
        if parts:
            found.append(parts)
    return found


@cache
def _files() -> list[str]:
    return [text for text in standard_library_texts(_CODE_BYTES, held_out=True) if len(text) > 6000]


def prose(rng: random.Random, length: int) -> str:
    """Consecutive paragraphs of one article, about `length` characters."""
    text = ""
    while len(text) < length:
        article = rng.choice(_paragraphs())
        for part in article[rng.randrange(len(article)) :]:
            text += f"{part}\n"
            if len(text) >= length:
                break
    return text[:length].rsplit(" ", 1)[0] + "."


def code(rng: random.Random, length: int) -> str:
    """Whole lines of one source file, about `length` characters, at least one."""
    text = rng.choice([text for text in _files() if len(text) > length + 1000])
    lines = text[rng.randrange(len(text) - length) :].split("\n")[1:]
    kept, count = [], 0
    for line in lines:
        kept.append(line)
        count += len(line) + 1
        if count >= length:
            break
    return "\n".join(kept)


def distinct(rng: random.Random, words: list[str], count: int) -> list[str]:
    """Different words."""
    return rng.sample(words, count)
