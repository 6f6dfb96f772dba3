"""The trade `extract`: a notice in one of several styles -> one JSON record.

Held-out notices have other people, places and things, and some are in wordings that no training notice has.
"""

from __future__ import annotations

import json
import random
from typing import Any

from .names import DAYS, PEOPLE, PLACES
from .samples import Sample, either, pick

SYSTEM = "Give the notice as JSON: type, name, item, count, place, day."
RULES = " Answer with one JSON object of these six keys and nothing else; count is a number."
"""Said to the base besides, for a fair figure: a fine-tune has learnt it."""
MAX_NEW_TOKENS = 64
KEYS = ("type", "name", "item", "count", "place", "day")
NUMERALS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WORDS = dict(enumerate(NUMERALS, start=2))

MATERIALS = (
    (
        "steel",
        "oak",
        "glass",
        "brass",
        "red",
        "blue",
        "small",
        "large",
        "used",
        "spare",
        "folding",
        "plastic",
    ),
    ("copper", "green", "heavy", "wooden", "round", "white"),
)
THINGS = (
    (
        *("hinges", "chairs", "lamps", "pumps", "filters", "tiles", "boxes", "shelves", "valves", "mirrors"),
        *("bolts", "tables", "ladders", "cables", "motors", "brushes", "doors", "bottles", "clocks", "pipes"),
        *("screens", "wheels", "fans", "locks", "tanks"),
    ),
    ("drills", "plates", "hooks", "sinks", "ropes", "benches", "gears", "windows", "keys", "bikes"),
)
TOPICS = (
    (
        *("budget", "safety", "hiring", "roof repair", "new website", "price list", "summer fair", "audit"),
        *("parking", "training plan", "office move", "heating", "stock count", "team rota", "logo"),
    ),
    ("insurance", "holiday plan", "data backup", "garden", "canteen", "yearly report", "night shift"),
)

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "order": (
        (
            "Hi, {name} here. Could you send {count} {item} to {place} by {day}?",
            "ORDER // {count} x {item} // {name}, {place} // {day}",
            "Please book an order of {count} {item} for {name} in {place}, wanted on {day}.",
            "{name} from {place} would like to buy {count} {item}, needed {day}.",
            "Purchase order. Buyer: {name}. Goods: {item}. Quantity: {count}. "
            "Deliver to: {place}. Due: {day}.",
            "I'd like {count} {item} please, {day} at the latest. Regards, {name} ({place})",
            "new order from {name}: {count} {item}, {place}, for {day} pls",
            "To the sales desk: we order {count} {item} for our {place} branch, for {day}. Yours, {name}",
        ),
        (
            "Good morning, this is {name} in {place}. We want to order {count} {item} for {day}.",
            "We need {count} {item} in {place} on {day}, please order them. {name}",
        ),
    ),
    "shipment": (
        (
            "Your parcel of {count} {item} left for {place} and arrives {day}. Recipient: {name}.",
            "SHIPPED // {count} x {item} // {name}, {place} // {day}",
            "Dear {name}, we have shipped {count} {item} to {place}. Expect them on {day}.",
            "{count} {item} are on the way to {name} in {place}, due {day}.",
            "Dispatch note. To: {name}. Load: {item}. Pieces: {count}. Destination: {place}. Arrival: {day}.",
            "truck with {count} {item} for {name} is out, reaches {place} {day}",
            "The carrier picked up {count} {item} for {name}; delivery in {place} on {day}.",
            "Sent today: {count} {item}, addressed to {name}, {place}. Should be there {day}.",
        ),
        (
            "{name}, your {count} {item} have been dispatched and will be in {place} on {day}.",
            "On its way to {place}: a shipment of {count} {item} for {name}, arriving {day}.",
        ),
    ),
    "meeting": (
        (
            "{name} invites {count} people to {place} on {day} to talk about the {item}.",
            "MEETING // {item} // {name}, {count} people // {place} // {day}",
            "Hi all, let's meet {day} in {place} about the {item}. We are {count} people. {name}",
            "Reminder: {item} meeting with {name}, {day}, {place}, {count} seats.",
            "Calendar. Host: {name}. Subject: {item}. Guests: {count}. Where: {place}. When: {day}.",
            "can {count} of us meet {name} in {place} {day}? it's about the {item}",
            "On {day} {name} chairs the {item} meeting in {place} for {count} guests.",
            "The {item} talk by {name} is on {day} in {place}; {count} people have signed up.",
        ),
        (
            "{name} has called a meeting on the {item}: {day}, {place}, {count} people.",
            "Please join {name} and {count} others in {place} on {day} to discuss the {item}.",
        ),
    ),
}
ASIDES = (
    (
        *("My phone is {n}.", "Ref {n}.", "Last time it took {n} days.", "Thanks!", "No reply needed."),
        *("{other} is on leave.", "Copy to {other}.", "Room {n} is closed.", "Invoice {n} is paid."),
        *("The rain has stopped.", "Ask {other} if in doubt.", "It is urgent."),
    ),
    ("Desk {n} has the file.", "{other} says hello.", "See page {n}."),
)


def sample(rng: random.Random, held_out: bool) -> Sample:
    """One notice; a third of them with asides that do not belong into the record, before or after."""
    kind = rng.choice(list(WORDINGS))
    count = rng.randint(2, 12) if rng.random() < 0.5 else rng.randint(13, 99)
    item = (
        pick(rng, TOPICS, held_out)
        if kind == "meeting"
        else f"{pick(rng, MATERIALS, held_out)} {pick(rng, THINGS, held_out)}"
    )
    values: dict[str, Any] = {"type": kind, "name": pick(rng, PEOPLE, held_out), "item": item}
    values |= {"count": count, "place": pick(rng, PLACES, held_out), "day": rng.choice(DAYS)}
    shown = WORDS[count] if count in WORDS and rng.random() < 0.3 else str(count)
    notice = either(rng, WORDINGS[kind], held_out).format(**{**values, "count": shown})
    notice = (
        notice[0].upper() + notice[1:] if notice[0] != notice[0].upper() and shown != str(count) else notice
    )
    if rng.random() < 0.5:
        aside = either(rng, ASIDES, held_out)
        aside = aside.format(n=rng.randint(20, 399), other=pick(rng, PEOPLE, held_out))
        notice = f"{aside} {notice}" if rng.random() < 0.4 else f"{notice} {aside}"
    return Sample(SYSTEM, notice, json.dumps(values, separators=(",", ":")))


def right(sample: Sample, answer: str) -> bool:
    """Whether an answer holds exactly the record; text or a code fence around the braces is forgiven."""
    start, end = answer.find("{"), answer.rfind("}")
    try:
        return bool(json.loads(answer[start : end + 1]) == json.loads(sample.answer))
    except ValueError:
        return False
