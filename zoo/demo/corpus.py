"""What the demo models are trained on, as token rows: Python sources, the two tasks, and copies.

Knows tokens and loss weights but no torch, so that the tests read it in milliseconds.
"""

from __future__ import annotations

import random
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from . import tasks

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
ANSWER_WEIGHT = 10.0  # an answer is a few tokens in a hundred: unweighted, retrieval is hardly learnt
PROMPT_WEIGHT = 0.1  # notes and questions are drawn at random: there is little to learn from them
RECALLED_OVER = ("", " =", " = ", ":", " keeps the", " is a", " is with", "?\nA:")

Stage = Literal["base", "notes", "solver"]


@dataclass(frozen=True, slots=True)
class Row:
    """One training row; position i is trained to predict token i + 1 with weight[i + 1]."""

    tokens: np.ndarray  # [length + 1] int64
    weights: np.ndarray  # [length + 1] float32, 0 where padded


def standard_library_texts(max_bytes: int, held_out: bool = False) -> Iterator[str]:
    """Sources of this Python's standard library, about one file in forty held out for evaluation."""
    root = Path(sysconfig.get_path("stdlib"))
    used = 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts) or (zlib.crc32(name.as_posix().encode()) % 40 == 0) != held_out:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) > 400_000:  # generated tables
            continue
        used += len(text)
        if used > max_bytes:
            return
        yield text


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, each digit its own token, <s> = 0 and </s> = 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of the kinds of rows at one point of the training, and how hard their tasks are."""

    length: int  # tokens of a row
    text: float
    copy: float
    facts: float  # the rest are assignments
    max_notes: int
    num_wordings: int
    max_statements: int
    max_hops: int


def curriculum(stage: Stage, progress: float) -> Mixture:
    """The mixture at `progress` in [0, 1): short and simple first, else nothing is ever retrieved."""
    if stage == "notes":
        return Mixture(256, 0.1, 0.0, 0.9, max_notes=8, num_wordings=3, max_statements=1, max_hops=0)
    if stage == "solver":
        return Mixture(192, 0.1, 0.0, 0.0, 1, 1, max_statements=8, max_hops=1 if progress < 0.3 else 2)
    if progress < 0.15:
        return Mixture(128, 0.1, 0.5, 0.2, max_notes=2, num_wordings=1, max_statements=4, max_hops=0)
    if progress < 0.45:
        return Mixture(128, 0.1, 0.5, 0.2, max_notes=3, num_wordings=1, max_statements=4, max_hops=0)
    if progress < 0.65:
        return Mixture(128, 0.1, 0.25, 0.4, max_notes=3, num_wordings=3, max_statements=6, max_hops=1)
    if progress < 0.85:
        return Mixture(160, 0.2, 0.1, 0.4, max_notes=5, num_wordings=3, max_statements=8, max_hops=2)
    return Mixture(224, 0.3, 0.05, 0.4, max_notes=8, num_wordings=3, max_statements=8, max_hops=2)


class RowMaker:
    """Draws rows for a stage from the text tokens and the task generators."""

    def __init__(self, tokenizer: Tokenizer, text_tokens: np.ndarray, stage: Stage) -> None:
        self.tokenizer = tokenizer
        self.text_tokens = text_tokens  # [num_tokens] int32
        self.stage = stage
        self.line_end: list[int] = tokenizer.encode("\n").ids
        self.between: list[list[int]] = [tokenizer.encode(text).ids for text in RECALLED_OVER]

    def batch(self, rng: random.Random, mixture: Mixture, num_rows: int) -> Row:
        """`num_rows` rows stacked: tokens and weights [num_rows, length + 1]."""
        rows = [self._row(rng, mixture) for _ in range(num_rows)]
        return Row(np.stack([row.tokens for row in rows]), np.stack([row.weights for row in rows]))

    def _row(self, rng: random.Random, mixture: Mixture) -> Row:
        draw = rng.random()
        size = mixture.length + 1
        if draw < mixture.text:
            start = rng.randrange(len(self.text_tokens) - size)
            tokens = self.text_tokens[start : start + size].astype(np.int64)
            return Row(tokens, np.ones(size, np.float32))
        if draw < mixture.text + mixture.copy:
            return self._copy_row(rng, size) if rng.random() < 0.2 else self._recall_row(rng, size)
        full = self.stage != "base" or rng.random() < 0.5
        style: tasks.Style = "full" if full else "short"
        if draw < mixture.text + mixture.copy + mixture.facts:
            num_notes = rng.randint(min(2, mixture.max_notes), mixture.max_notes)
            document = tasks.facts(rng, num_notes, style, mixture.num_wordings)
        else:
            num_statements = rng.randint(min(2, mixture.max_statements), mixture.max_statements)
            document = tasks.assignments(rng, num_statements, mixture.max_hops, style)
        # the base learns both styles, told apart by the question, so that a fine-tune only has to choose
        if full and self.stage == "base":
            document = tasks.asked_in_full(document)
        return self._task_row(document, size)

    def _random_tokens(self, rng: random.Random, count: int) -> list[int]:
        return rng.sample(range(2, self.tokenizer.get_vocab_size()), count)

    def _copy_row(self, rng: random.Random, size: int) -> Row:
        """Random tokens, repeated."""
        period = rng.randint(4, size // 2)
        weights = np.ones(size, np.float32)
        weights[:period] = 0
        return Row(np.resize(np.array(self._random_tokens(rng, period), np.int64), size), weights)

    def _recall_row(self, rng: random.Random, size: int) -> Row:
        """Pairs of random tokens with the same few words between, then each again and again in any order.

        "Let b = 7." and "Tessa keeps the lamp." with the names and values drawn from the whole vocabulary:
        the way from a name over the words between to its value is learnt here, within minutes.
        """
        told = asked = rng.choice(self.between)
        if rng.random() < 0.5:
            asked = rng.choice(self.between)
        backwards = rng.random() < 0.4  # "Who keeps the lamp?" is answered by what stands before it
        num_pairs = rng.randint(2, max(2, size // (2 * (3 + len(told)))))
        drawn = self._random_tokens(rng, 2 * num_pairs)
        pairs = list(zip(drawn[:num_pairs], drawn[num_pairs:], strict=True))
        tokens: list[int] = []
        for first, second in pairs:
            tokens += [second, *told, first] if backwards else [first, *told, second]
            tokens += self.line_end
        weights = [0.0] * len(tokens)
        while len(tokens) < size:
            rng.shuffle(pairs)
            for first, second in pairs:
                tokens += [first, *asked, second, *self.line_end]
                # few tokens of a row are asked for
                weights += [0.0] * (1 + len(asked)) + [3.0] + [0.0] * len(self.line_end)
        return Row(np.array(tokens[:size], np.int64), np.array(weights[:size], np.float32))

    def _task_row(self, document: tasks.Document, size: int) -> Row:
        """Passages and as many questions as fit; fine-tunes end every answer with </s>."""
        end = "\n" if self.stage == "base" else EOS
        tokens: list[int] = list(self.tokenizer.encode(document.context).ids)
        weights = [PROMPT_WEIGHT] * len(tokens)
        for question in document.questions:
            prompt = self.tokenizer.encode(question.prompt).ids
            answer = self.tokenizer.encode(question.answer + end).ids
            if len(tokens) + len(prompt) + len(answer) > size:
                break
            tokens += prompt + answer
            weights += [PROMPT_WEIGHT] * len(prompt) + [ANSWER_WEIGHT] * len(answer)
            if end == EOS:
                tokens, weights = [*tokens, *self.tokenizer.encode("\n").ids], [*weights, 0.0]
        row = Row(np.full(size, EOS_ID, np.int64), np.zeros(size, np.float32))
        kept = min(size, len(tokens))
        row.tokens[:kept], row.weights[:kept] = tokens[:kept], weights[:kept]
        return row
