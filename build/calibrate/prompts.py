"""The prompts that settings are tried on: the user's own, or built-in ones."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from blockzoo.zoo.errors import ZooError

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or messages for the model's chat template."""

MAX_PROMPTS = 1000
BUILT_IN = "built-in"


class PromptsError(ZooError):
    """A file of prompts that cannot be used."""


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt to judge.

    Attributes:
        known: prompts whose KV is there; None: all cases before this one.
    """

    prompt: Prompt
    known: tuple[Prompt, ...] | None = None


def read_prompts(path: Path) -> list[Case]:
    """Of a JSONL file: a line is {"prompt": TEXT or MESSAGES, "known": [TEXT or MESSAGES, ...]}.

    Without "known" a prompt is judged with all lines before it known, as traffic comes.

    Raises:
        PromptsError: names the line and what it should have been.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{path}: cannot be read ({error})") from error
    found = [_case(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not 0 < len(found) <= MAX_PROMPTS:
        raise PromptsError(f"{path} has {len(found)} prompts; expected 1 to {MAX_PROMPTS}, one a line")
    return found


def _case(line: str, where: str) -> Case:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise PromptsError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict) or not {"prompt"} <= value.keys() <= {"prompt", "known"}:
        raise PromptsError(f'{where}: expected {{"prompt": ...}}, perhaps with "known": [...]')
    known = value.get("known")
    if known is not None and not isinstance(known, list):
        raise PromptsError(f'{where}: "known" is {known!r:.80}; expected a list of prompts')
    return Case(
        _prompt(value["prompt"], where), None if known is None else tuple(_prompt(k, where) for k in known)
    )


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        strings = [
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in value
        ]
        if all(strings):
            return value
    raise PromptsError(
        f'{where}: a prompt is {value!r:.80}; expected a text, or messages [{{"role": ..., "content": ...}}]'
    )


# ---- built-in ones


def built_in(count: int, length: int, chat: bool) -> list[Case]:
    """Documents in another order, files with an edit, worked examples in another order: always the same.

    Args:
        count: of prompts.
        length: of a prompt, in characters.
        chat: as messages.
    """
    made = (_documents, _edited, _examples)
    return [made[i % 3](random.Random(f"{length}/{i}"), length, chat) for i in range(count)]


def _asked(context: str, question: str, chat: bool) -> Prompt:
    if not chat:
        return f"{context}\n\nQuestion: {question}\nAnswer:"
    return [{"role": "user", "content": f"{context}\n\n{question}"}]


def _prose(rng: random.Random, length: int) -> str:
    """Of Python's own reference, which is at hand everywhere."""
    text = ""
    while len(text) < length:
        article = " ".join(topics[rng.choice(sorted(topics))].split())
        start = rng.randrange(max(1, len(article) - length))
        text += article[start : start + length - len(text)]
    return text


def _documents(rng: random.Random, length: int, chat: bool) -> Case:
    numbers = rng.sample(range(100, 1000), 8)
    texts = [
        f"Record {n}\nThe code of record {n} is {rng.randint(10, 99)}. {_prose(rng, length // 8)}"
        for n in numbers
    ]
    mixed = rng.sample(texts, 8)
    known = [
        _asked(
            "These records came in first.\n\n" + "\n\n".join(half), "What are these records about?" * 2, chat
        )
        for half in (mixed[::2], mixed[1::2])
    ]
    question = f"What is the code of record {rng.choice(numbers)}?"
    return Case(_asked("All records:\n\n" + "\n\n".join(texts), question, chat), tuple(known))


def _edited(rng: random.Random, length: int, chat: bool) -> Case:
    old, new = rng.sample(range(1000, 9999), 2)
    lead, body = _prose(rng, length // 8), _prose(rng, length)
    known, prompt = (
        f"{lead}\nThe limit is {limit} in all.\n{body}\nWhoever is above the limit must be told."
        for limit in (old, new)
    )
    asks = "What must be done, and why is that so? Tell it in a sentence.", "How high is the limit?"
    return Case(_asked(prompt, asks[1], chat), (_asked(known, asks[0], chat),))


def _examples(rng: random.Random, length: int, chat: bool) -> Case:
    words = ["red", "blue", "green", "round", "heavy", "small", "old", "new"]
    things = ["lamp", "chair", "pump", "clock", "table", "boat", "door", "wheel"]
    pairs = []
    for _ in range(max(8, length // 64)):
        word, thing, count = rng.choice(words), rng.choice(things), rng.randint(2, 99)
        pairs.append(f"Order: {count} {word} {thing}s, please. -> thing={thing}; kind={word}; count={count}")
    shown = rng.sample(pairs[:-1], len(pairs) - 1)
    last, other = pairs[-1].split(" -> ")[0], pairs[0].split(" -> ")[0]
    return Case(
        _asked("\n".join(shown), f"Go on: {last} ->", chat),
        (
            _asked(
                "\n".join(pairs[:-1]), f"Go on: {other} -> (and say which example is the most like it)", chat
            ),
        ),
    )
