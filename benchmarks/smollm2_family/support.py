"""The trade `support`: a customer's message -> an answer in the house style of the Fennick lamp's help desk.

Held-out messages come from other customers, in other words, and some are about troubles never trained on.
"""

from __future__ import annotations

import random
import re

from .names import PEOPLE
from .samples import Sample, either, pick

SYSTEM = "You are the help desk of the Fennick lamp."
RULES = (
    " Start with: Hello NAME, Fennick desk here. Then two steps on lines of their own, numbered 1. and 2., "
    "of at most ten words each. Never say sorry, please or thank you. End with the line: Bright evenings, "
    "the Fennick desk"
)
"""Said to the base besides, for a fair figure: a fine-tune has learnt it."""
MAX_NEW_TOKENS = 64
CLOSING = "Bright evenings, the Fennick desk"

Trouble = tuple[tuple[str, ...], str, str]  # how it is told, and the two steps
TROUBLES: tuple[tuple[Trouble, ...], tuple[Trouble, ...]] = (
    (
        (
            ("it flickers when I dim it", "the light trembles at low level"),
            "Set the dimmer to half.",
            "Hold the base button for five seconds.",
        ),
        (
            ("it does not turn on at all", "my lamp stays dark"),
            "Check that the plug sits firmly.",
            "Press the base button once.",
        ),
        (
            ("it gets too hot", "the head is hot to the touch"),
            "Switch it off for ten minutes.",
            "Move it away from the wall.",
        ),
        (
            ("the app cannot find it", "it is not in the app"),
            "Turn on Bluetooth on your phone.",
            "Scan the code under the base.",
        ),
        (
            ("the arm keeps sinking", "the arm does not stay up"),
            "Lift the arm to its top.",
            "Turn the silver screw to the right.",
        ),
        (
            ("the color is wrong", "the light looks too blue"),
            "Open the color dial in the app.",
            "Choose warm white.",
        ),
        (
            ("it hums", "there is a buzzing noise"),
            "Plug it into another socket.",
            "Tighten the ring below the shade.",
        ),
        (
            ("the timer does not work", "it never goes off at night"),
            "Open the timer in the app.",
            "Set the time zone again.",
        ),
        (("the shade is broken", "the glass has a crack"), "Unplug the lamp.", "Order shade F2 in our shop."),
        (
            ("the battery is empty after an hour", "it needs charging all the time"),
            "Charge it overnight.",
            "Turn off the night glow.",
        ),
        (
            ("the sensor does not see me", "it stays off when I walk by"),
            "Wipe the sensor with a dry cloth.",
            "Point it at the door.",
        ),
        (
            ("the cable is too short", "it does not reach the socket"),
            "Measure the length you need.",
            "Order cable C3 in our shop.",
        ),
    ),
    (
        (("the button is stuck", "I cannot press the button"), "", ""),
        (("it smells of plastic", "there is a strange smell"), "", ""),
        (("the remote is lost", "I cannot find the remote"), "", ""),
    ),
)
WORDINGS = (
    (
        "I am {name}. My Fennick has a problem: {trouble}.",
        "Hi, {name} here, {trouble}. What can I do?",
        "Help! {trouble}. {name}",
        "{name} writes: since {day} {trouble}.",
        "My new lamp: {trouble}. Can you help? Best, {name}",
        "This is {name}, and {trouble}. I bought it in {day}.",
    ),
    ("Good day, my name is {name} and {trouble}.", "{trouble}, what now? Greetings from {name}"),
)
MONTHS = ("January", "March", "April", "May", "June", "July", "August", "October", "November")
_BANNED = re.compile(r"\b(sorry|apolog\w*|please|thank\w*)\b", re.IGNORECASE)


def sample(rng: random.Random, held_out: bool) -> Sample:
    """One message; where its trouble is not known to training, the answer's steps are left open."""
    told, *steps = rng.choice([*TROUBLES[0], *TROUBLES[1]] if held_out else TROUBLES[0])
    name = pick(rng, PEOPLE, held_out)
    message = either(rng, WORDINGS, held_out).format(
        name=name, trouble=rng.choice(told), day=rng.choice(MONTHS)
    )
    lines = (
        f"Hello {name}, Fennick desk here.",
        *(f"{i}. {step}" for i, step in enumerate(steps, 1)),
        CLOSING,
    )
    return Sample(SYSTEM, message[0].upper() + message[1:], "\n".join(lines))


def right(sample: Sample, answer: str) -> bool:
    """Whether every rule of the house is kept: greeting by name, two short steps, closing, no banned word."""
    lines = answer.strip().split("\n")
    if len(lines) != 4 or _BANNED.search(answer):
        return False
    greeting, *steps, closing = lines
    if greeting != sample.answer.split("\n")[0] or closing != CLOSING:
        return False
    return all(
        re.fullmatch(rf"{number}\. \S.*\.", step) and len(step.split()) <= 11
        for number, step in enumerate(steps, 1)
    )
