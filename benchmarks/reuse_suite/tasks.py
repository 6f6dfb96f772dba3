"""The tasks that settings are chosen on; those of `held_out` are none of them.

A sample is a prompt whose parts are known from other prompts. Each task is a function of a random generator
and of the prompt's length in characters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.reuse_suite.texts import CITIES, NAMES, Messages, code, distinct, prose
from benchmarks.smollm2_family import extract, support

SYSTEM = "You are a helpful assistant. Answer in a few words, from the texts alone."


@dataclass(frozen=True, slots=True)
class Sample:
    """What is run before, what is judged.

    Attributes:
        donors: prompts whose KV is there.
        prompt: the one that is judged.
        answer: what a right answer has in it; None: the task has no right answer.
        other_order: the same question behind the same texts in another order; None: order has a meaning.
        bare: the question without what it is about.
    """

    donors: tuple[Messages, ...]
    prompt: Messages
    answer: tuple[str, ...] | None = None
    other_order: Messages | None = None
    bare: Messages | None = None


Task = Callable[[random.Random, int], Sample]


def among(
    rng: random.Random,
    texts: Sequence[str],
    question: str,
    answer: tuple[str, ...] | None,
    begins: str | None = None,
) -> Sample:
    """Texts known from two prompts, half of them each, behind other words; then the question, and how its
    answer `begins`."""
    order = list(texts)
    rng.shuffle(order)
    mixed = rng.sample(order, len(order))
    donors = tuple(
        Messages.of(
            SYSTEM, f"{rng.choice(NAMES)} asks about these.\n\n" + "\n\n".join(half) + "\n\n" + closing
        )
        for half, closing in (
            (mixed[::2], "What do the texts have in common? Say it in one sentence, please."),
            (mixed[1::2], "Which of the texts is the longest? Give its first words and nothing else."),
        )
    )
    opening = f"{rng.choice(NAMES)} from {rng.choice(CITIES)} sent the texts below.\n\n"
    prompt, other, bare = (
        Messages.of(SYSTEM, text + question).begun(begins)
        for text in (opening + "\n\n".join([*order, ""]), opening + "\n\n".join([*order[::-1], ""]), "")
    )
    return Sample(donors, prompt, answer, other, bare)


def facts_in_one(rng: random.Random, length: int) -> Sample:
    """Eight texts about people; a fact of one is asked for."""
    names, numbers = distinct(rng, NAMES, 8), rng.sample(range(100, 999), 8)
    cities = distinct(rng, CITIES, 8)
    texts = [
        f"About {name}\n{name} lives in {city}. The locker of {name} has number {number}. "
        + prose(rng, length // 8 - 100)
        for name, city, number in zip(names, cities, numbers, strict=True)
    ]
    which = rng.randrange(8)
    if rng.random() < 0.5:
        question, begins = "Which number has the locker of {}?", "The locker of {} has number"
        answer = (str(numbers[which]),)
    else:
        question, begins, answer = "In which city does {} live?", "{} lives in", (cities[which],)
    return among(rng, texts, question.format(names[which]), answer, begins.format(names[which]))


def facts_in_two(rng: random.Random, length: int) -> Sample:
    """Eight texts about people; what is asked for stands in two of them."""
    names, cities = distinct(rng, NAMES, 8), distinct(rng, CITIES, 8)
    texts = [
        f"Staff: {name}\n{name} works at the office in {city}. {prose(rng, length // 8 - 80)}"
        for name, city in zip(names, cities, strict=True)
    ]
    one, other = rng.sample(range(8), 2)
    question = f"At which offices do {names[one]} and {names[other]} work?"
    answer = cities[one], cities[other]
    return among(rng, texts, question, answer, f"{names[one]} works at the office in")


def edited(file: Callable[[str], str], old: str, new: str, question: str, begins: str) -> Sample:
    """A file known as it was before an edit."""
    ask = "Here is a file:\n\n{}\n\n{}"
    other = "Is there a mistake in the file? Name the line, and say in one sentence what is wrong with it."
    donor = Messages.of(SYSTEM, ask.format(file(old), other))
    return Sample(
        (donor,),
        Messages.of(SYSTEM, ask.format(file(new), question)).begun(begins),
        (new,),
        None,
        Messages.of(SYSTEM, question).begun(begins),
    )


def edit_near(rng: random.Random, length: int) -> Sample:
    """Settings over source code; one is changed, and what stands right behind it leans on it."""
    old, new = (str(n) for n in rng.sample(range(1024, 9999), 2))
    host, user = rng.choice(CITIES).lower(), rng.choice(NAMES).lower()
    body, lead = code(rng, length - 500), code(rng, 200)

    def file(port: str) -> str:
        return f"{lead}\nUSER = '{user}'\nPORT = {port}\nHOST = '{host}'\n# {host} is reached there.\n{body}"

    return edited(file, old, new, f"At which PORT is {host} reached?", "PORT =")


def edit_far(rng: random.Random, length: int) -> Sample:
    """The name at the top of a file is changed, and what leans on it stands at its end."""
    old, new = distinct(rng, NAMES, 2)
    body, deed = code(rng, length - 400), rng.choice(["releases", "payments", "backups", "translations"])

    def file(name: str) -> str:
        return (
            f"# The maintainer of this module is {name}.\n{body}\n"
            f"# Questions about {deed} go to the maintainer.\n"
        )

    question = f"To whom do questions about {deed} go?"
    return edited(file, old, new, question, f"Questions about {deed} go to the maintainer of this module,")


def examples(rng: random.Random, length: int) -> Sample:
    """Worked examples in turns, known in another order."""
    drawn = [extract.sample(rng, held_out=True) for _ in range(max(6, length // 330) + 1)]
    *shown, asked = drawn
    pairs = [(one.user, one.answer) for one in shown]

    def chat(order: list[tuple[str, str]], last: str) -> Messages:
        return Messages.of(extract.SYSTEM, *(text for pair in order for text in pair), last)

    first, second, third = (rng.sample(pairs, len(pairs)) for _ in range(3))
    donor = chat(first, extract.sample(rng, held_out=True).user)
    bare = Messages.of(extract.SYSTEM, asked.user)
    return Sample((donor,), chat(second, asked.user), (asked.answer,), chat(third, asked.user), bare)


def gist(rng: random.Random, length: int) -> Sample:
    """Eight articles; what one of them says, or how it goes on."""
    heads = distinct(rng, CITIES, 8)
    texts = [f"Text {head}\n{prose(rng, length // 8 - 20)}" for head in heads]
    head = rng.choice(heads)
    if rng.random() < 0.5:
        return among(rng, texts, f"Say in one sentence what the text {head} is about.", None)
    words = " ".join(next(t for t in texts if t.startswith(f"Text {head}\n")).split("\n", 1)[1].split()[:8])
    return among(rng, texts, f'Give the text that begins with "{words}" word by word.', None)


def tool_result(rng: random.Random, length: int) -> Sample:
    """A conversation with tools, known with another result of the first call."""
    cities = distinct(rng, CITIES, 12)
    degrees = [rng.randint(-9, 35) for _ in cities]
    which = rng.randrange(12)
    new = rng.choice([n for n in range(-9, 36) if n not in degrees])
    filler = [prose(rng, (length - 1100) // 2) for _ in range(2)]

    def chat(value: int, question: str) -> Messages:
        now = [value if i == which else d for i, d in enumerate(degrees)]
        rows = "\n".join(f'{{"city": "{c}", "degrees": {d}}}' for c, d in zip(cities, now, strict=True))
        return Messages(
            (
                ("system", "You are a helpful assistant with the tools weather and notes."),
                ("user", "What is the weather like, and what do my notes say?"),
                ("assistant", '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'),
                ("tool", rows),
                ("assistant", '<tool_call>{"name": "notes", "arguments": {}}</tool_call>'),
                ("tool", filler[0]),
                (
                    "assistant",
                    "I have the weather of twelve cities and your notes. What would you like to know?",
                ),
                ("user", "First, one more text for my notes:\n" + filler[1]),
                ("assistant", "I have added it to your notes."),
                ("user", question),
            )
        )

    question = f"How many degrees does it have in {cities[which]}?"
    begins = f'{{"city": "{cities[which]}", "degrees":'
    bare = Messages.of(SYSTEM, question).begun(begins)
    donor = chat(degrees[which], "Which is the warmest city, and which is the coldest? Give both names.")
    return Sample((donor,), chat(new, question).begun(begins), (str(new),), None, bare)


def system_line(rng: random.Random, length: int) -> Sample:
    """A long system prompt, known with another first line."""
    shops = distinct(rng, NAMES, 2)
    told = [trouble for trouble, *_ in support.TROUBLES[0]]
    rules = [
        f"{i}. If a customer says: {rng.choice(t)}, then answer with code {rng.randint(100, 999)}."
        for i, t in enumerate(rng.sample(told, 10), 1)
    ]
    body = "\n".join([*rules, "Background:", prose(rng, length - 1100)])
    rule = rng.choice(rules)
    trouble = rule.split("says: ")[1].split(", then")[0]
    code_ = rule.split("code ")[1].rstrip(".")

    def chat(shop: str, question: str) -> Messages:
        return Messages.of(f"You answer for the shop of {shop}. Give the code alone.\n{body}", question)

    if rng.random() < 0.3:
        question, answer, begins = "Whose shop is this?", shops[1], "You answer for the shop of"
    else:
        question, answer = f"A customer says: {trouble}.", code_
        begins = f"If a customer says: {trouble}, then answer with code"
    donor = chat(shops[0], "Which rules are there? Give the numbers and the codes of all of them, please.")
    bare = Messages.of("You answer for a shop.", question).begun(begins)
    return Sample((donor,), chat(shops[1], question).begun(begins), (answer,), None, bare)


TASKS: dict[str, Task] = {
    "facts in one": facts_in_one,
    "facts in two": facts_in_two,
    "edit near": edit_near,
    "edit far": edit_far,
    "examples": examples,
    "gist": gist,
    "tool result": tool_result,
    "system line": system_line,
}
