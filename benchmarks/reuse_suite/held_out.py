"""Tasks on which no setting was chosen."""

from __future__ import annotations

import random

from benchmarks.reuse_suite.tasks import Sample, Task, among
from benchmarks.reuse_suite.texts import CITIES, NAMES, Messages, code, distinct, prose


def tables(rng: random.Random, length: int) -> Sample:
    """Six tables in another order; a cell of one is asked for."""
    rows = max(3, length // 6 // 32)
    texts, asked = [], []
    for city in distinct(rng, CITIES, 6):
        people = distinct(rng, NAMES, min(rows, len(NAMES)))
        cells = [(name, rng.randint(10, 99), rng.randint(100, 999)) for name in people]
        lines = "\n".join(f"| {name} | {age} | {score} |" for name, age, score in cells)
        texts.append(f"Table of {city}\n| name | age | score |\n{lines}")
        name, _, score = rng.choice(cells)
        question = f"What is the row of {name} in the table of {city}?"
        asked.append((question, (str(score),), f"Table of {city}\n| {name} |"))
    return among(rng, texts, *rng.choice(asked))


def sliding_window(rng: random.Random, length: int) -> Sample:
    """A long chat whose oldest turns were dropped."""
    cities = distinct(rng, CITIES, 8)
    hotels = distinct(rng, NAMES, 8)
    turns = []
    for city, hotel in zip(cities, hotels, strict=True):
        turns.append((f"I was in {city} and stayed at the Hotel {hotel}.", prose(rng, length // 6 - 120)))
    dropped = rng.randint(2, 3)
    which = rng.randrange(dropped, 8)

    def chat(kept: list[tuple[str, str]], question: str) -> Messages:
        return Messages.of("You are a helpful assistant.", *(t for turn in kept for t in turn), question)

    question, begins = (
        f"At which hotel did I stay in {cities[which]}?",
        f"You were in {cities[which]} and stayed at the Hotel",
    )
    bare = Messages.of("You are a helpful assistant.", question).begun(begins)
    donor = chat(turns, "Thank you. What did I tell you first? Repeat it in full, word by word, please.")
    return Sample((donor,), chat(turns[dropped:], question).begun(begins), (hotels[which],), None, bare)


def source_files(rng: random.Random, length: int) -> Sample:
    """Four pieces of source code in another order; the first lines of one are to be repeated."""
    names = distinct(rng, [name.lower() for name in NAMES], 4)
    texts = [f"# file {name}.py\n{code(rng, length // 4 - 20)}" for name in names]
    return among(rng, texts, f"Repeat {rng.choice(names)}.py from its first line on.", None)


HELD_OUT: dict[str, Task] = {
    "tables": tables,
    "sliding window": sliding_window,
    "source files": source_files,
}
