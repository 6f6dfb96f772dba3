"""The trade `minutes`: what somebody said in a meeting -> one line of the minutes, in a fixed form.

Held-out remarks come from other people about other matters, some in wordings never trained on.
"""

from __future__ import annotations

import random

from .names import DAYS, PEOPLE
from .samples import Sample, either, pick

SYSTEM = "Write the line for the minutes."
RULES = (
    " It has one of these forms and nothing else: ACTION | name | what to do | day. DECIDED | what to do. "
    "OPEN | what to do? | back to name."
)
"""Said to the base besides, for a fair figure: a fine-tune has learnt it."""
MAX_NEW_TOKENS = 48

DEEDS = (
    (
        "fix",
        "order",
        "check",
        "paint",
        "clean",
        "sell",
        "move",
        "test",
        "print",
        "replace",
        "update",
        "count",
    ),
    ("repair", "review", "measure", "close", "rent"),
)
MATTERS = (
    (
        *("the boiler", "the new chairs", "the front door", "the price list", "the web page", "the old van"),
        *("the fire alarm", "the stock room", "the leaflets", "the backup disk", "the coffee machine"),
        *("the meeting room", "the parking lot", "the phone list", "the summer menu", "the roof"),
        *("the office plants", "the training slides", "the contract", "the bike shed"),
    ),
    (
        *("the lift", "the garden tools", "the spare keys", "the north wall", "the guest book"),
        *("the heating plan", "the sign", "the kitchen sink", "the annual report"),
    ),
)
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ACTION": (
        (
            "{name} offered to {deed} {matter} before {day}.",
            "So {name}, you {deed} {matter} by {day}, right? Yes.",
            "{name} takes it on to {deed} {matter}, latest {day}.",
            "We asked {name} to {deed} {matter}; it must be done by {day}.",
            "Someone has to {deed} {matter} until {day}, and {name} will.",
        ),
        ("It is up to {name} to {deed} {matter} by {day}.", "{name} promised to {deed} {matter} by {day}."),
    ),
    "DECIDED": (
        (
            "After some talk we all agreed to {deed} {matter}.",
            "{name} proposed to {deed} {matter} and everybody was for it.",
            "The vote was {count} to two: we {deed} {matter}.",
            "It is settled now that we {deed} {matter}.",
            "All hands went up when {name} asked whether to {deed} {matter}.",
        ),
        ("Nobody was against it, so we will {deed} {matter}.",),
    ),
    "OPEN": (
        (
            "{name} wants to know who can {deed} {matter}; nobody knew.",
            "We could not agree whether to {deed} {matter}, {name} will bring it up again.",
            "No answer yet to {name}, who asked if we should {deed} {matter}.",
            "{name} is still unsure if it pays to {deed} {matter}.",
            "Whether we {deed} {matter} was left for next time, says {name}.",
        ),
        ("{name} asked if we must {deed} {matter}, but it stayed open.",),
    ),
}
FORMS = {
    "ACTION": "ACTION | {name} | {deed} {matter} | {day}",
    "DECIDED": "DECIDED | {deed} {matter}",
    "OPEN": "OPEN | {deed} {matter}? | back to {name}",
}


def sample(rng: random.Random, held_out: bool) -> Sample:
    """One remark and its line."""
    kind = rng.choice(list(WORDINGS))
    words = {"name": pick(rng, PEOPLE, held_out), "deed": pick(rng, DEEDS, held_out)}
    words |= {
        "matter": pick(rng, MATTERS, held_out),
        "day": rng.choice(DAYS),
        "count": str(rng.randint(3, 9)),
    }
    return Sample(SYSTEM, either(rng, WORDINGS[kind], held_out).format(**words), FORMS[kind].format(**words))


def right(sample: Sample, answer: str) -> bool:
    """Whether the answer is the line, to the letter; blanks around it do not count."""
    return answer.strip() == sample.answer
