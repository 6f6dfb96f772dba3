"""Two synthetic tasks for the demo family: facts spread over notes, and chained assignments.

Both put what a question needs into separate passages, so the passages of a document can be shuffled, shared
between prompts or cached, and the right answer is known. This file knows nothing of models or tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["short", "full"]  # just the answer, or a sentence or a computation that leads to it

# fmt: off
NAMES = (
    "Marlow", "Tessa", "Ivor", "Quinn", "Sable", "Odette", "Rufus", "Petra", "Lionel", "Greta", "Basil",
    "Nadia", "Corin", "Willa", "Hugo", "Esme", "Dorian", "Freya", "Magnus", "Selma", "Anton", "Bruna",
    "Casper", "Delia",
)
COLOURS = ("copper", "silver", "crimson", "ivory", "amber", "cobalt", "jade", "slate", "violet", "golden")
THINGS = ("key", "lamp", "coin", "book", "ring", "map", "bell", "cup")
PLACES = (
    "north gate", "old mill", "harbor", "chapel", "east tower",
    "market", "library", "orchard", "bridge", "granary",
)
JOBS = ("baker", "smith", "pilot", "clerk", "miner", "tailor", "weaver", "mason")
# fmt: on
VARIABLES = tuple("abcdefghkmnpqrstuvwxyz")
MAX_NOTES = len(NAMES)


@dataclass(frozen=True, slots=True)
class Question:
    """A question in the form the models see, up to and including "A:", and the text that must follow it."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Document:
    """Passages that may stand in any order, and questions about all of them together."""

    passages: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def context(self) -> str:
        """The passages in their order, one per line."""
        return "".join(self.passages)


def facts(
    rng: random.Random, num_notes: int, style: Style = "short", num_wordings: int = 3, split: bool = False
) -> Document:
    """Notes of `num_notes` people with four questions about each, the questions shuffled.

    Every note names a person, their job, a thing no other note has, and where it was found, in one of the
    first `num_wordings` (at most 3) wordings. Style "short" answers " the jade lamp", "full" in a sentence
    that begins with what was asked about: " Tessa keeps the jade lamp." With `split`, each note is two
    passages, the second of where the thing was found, and all are shuffled: where the thing of Tessa was
    found needs both.
    """
    if not 1 <= num_notes <= MAX_NOTES:
        raise ValueError(f"num_notes is {num_notes}; it must be from 1 to {MAX_NOTES}")
    things = rng.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], num_notes)
    passages, questions = [], []
    for name, thing in zip(rng.sample(NAMES, num_notes), things, strict=True):
        place, job = rng.choice(PLACES), rng.choice(JOBS)
        owned = f"{name} is a {job}. {name} keeps the {thing}."
        found = f"The {thing} was found at the {place}."
        if split:
            passages += [f"Note. {owned}\n", f"Note. {found}\n"]
        else:
            wordings = [
                f"Note. {owned} {found}\n",
                f"Note. The {job} {name} owns the {thing}. It was found at the {place}.\n",
                f"Note. At the {place} someone found the {thing}. Now {name} the {job} keeps it.\n",
            ]
            passages.append(rng.choice(wordings[:num_wordings]))
        for question, short, full in (
            (f"What does {name} keep?", f" the {thing}", f" {name} keeps the {thing}."),
            (f"Who keeps the {thing}?", f" {name}", f" The {thing} is with {name}."),
            (
                f"Where was the thing of {name} found?",
                f" the {place}",
                f" {name} keeps the {thing}. The {thing} was found at the {place}.",
            ),
            (f"What is the job of {name}?", f" {job}", f" {name} is a {job}."),
        ):
            questions.append(Question(f"Q: {question}\nA:", full if style == "full" else short))
    if split:
        rng.shuffle(passages)
    rng.shuffle(questions)
    return Document(tuple(passages), tuple(questions))


def assignments(
    rng: random.Random,
    num_statements: int,
    max_hops: int,
    style: Style = "short",
    hops: int | None = None,
) -> Document:
    """Statements "Let b = a + 4." modulo 10, the used variable set above; one question per variable.

    A variable set to a number has 0 hops, one set from it 1 hop. `max_hops` bounds them; `hops` keeps only
    the questions of exactly that depth (there may be none). Style "short" answers " 7", "full" writes the way
    there: " b = a + 4, a = 3, b = 7".
    """
    if not 1 <= num_statements <= len(VARIABLES):
        raise ValueError(f"num_statements is {num_statements}; it must be from 1 to {len(VARIABLES)}")
    value: dict[str, int] = {}
    formula: dict[str, tuple[str, str, int]] = {}
    depth: dict[str, int] = {}
    passages = []
    for name in rng.sample(VARIABLES, num_statements):
        usable = [known for known in value if depth[known] < max_hops]
        if usable and rng.random() < 0.7:
            source, sign, step = rng.choice(usable), rng.choice("+-"), rng.randint(1, 9)
            formula[name] = (source, sign, step)
            value[name] = (value[source] + (step if sign == "+" else -step)) % 10
            depth[name] = depth[source] + 1
            passages.append(f"Let {name} = {source} {sign} {step}.\n")
        else:
            value[name], depth[name] = rng.randint(0, 9), 0
            passages.append(f"Let {name} = {value[name]}.\n")
    questions = [
        Question(
            f"Q: {name}?\nA:",
            " " + _working(name, value, formula) if style == "full" else f" {value[name]}",
        )
        for name in value
        if hops is None or depth[name] == hops
    ]
    rng.shuffle(questions)
    return Document(tuple(passages), tuple(questions))


def _working(name: str, value: dict[str, int], formula: dict[str, tuple[str, str, int]]) -> str:
    """Down the chain of formulas to a number, then up again with the value of each variable."""
    down, chain = [], [name]
    while chain[-1] in formula:
        source, sign, step = formula[chain[-1]]
        down.append(f"{chain[-1]} = {source} {sign} {step}")
        chain.append(source)
    return ", ".join(down + [f"{known} = {value[known]}" for known in reversed(chain)])


def asked_in_full(document: Document) -> Document:
    """The same document with its questions asking for full answers: "Q: In full: b?"."""
    questions = tuple(
        Question(q.prompt.replace("Q: ", "Q: In full: ", 1), q.answer) for q in document.questions
    )
    return Document(document.passages, questions)


def render(document: Document, end: str = "\n") -> str:
    """The whole document as text: passages, then every question with its answer and `end`."""
    return document.context + "".join(q.prompt + q.answer + end for q in document.questions)


def sample_texts(rng: random.Random, count: int) -> Sequence[str]:
    """Documents of all tasks and styles, for training the tokenizer."""
    texts = []
    for _ in range(count):
        texts.append(render(facts(rng, 3)))
        texts.append(render(assignments(rng, 5, 2)))
        texts.append(render(asked_in_full(facts(rng, 3, "full"))))
        texts.append(render(asked_in_full(assignments(rng, 5, 2, "full"))))
    return texts
