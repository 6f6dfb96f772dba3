"""Answers of trained models under approximate reuse, against those of a full prefill.

Each sample has donor prompts, in which the documents stand behind other words than in the prompt that is
judged. Every side then follows the same answer, token by token, so that its distributions can be compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from benchmarks.kv_sides import ENGINE, Sides, quality_sides
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.request import KVReuse
from blockzoo.runtime.sampling import SampledToken, Sampler, SamplerState
from blockzoo.zoo.demo.corpus import standard_library_texts
from blockzoo.zoo.demo.tasks import Document, assignments, facts, render

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Sample:
    """Prompts that are run before, the prompt that is judged, and what must follow it."""

    donors: list[list[int]]
    prompt: list[int]
    answer: list[int]


# ---- tasks


def fact_samples(encode: Encode, rng: random.Random, num_notes: int) -> Iterator[Sample]:
    """Shuffled notes, each half of them known from another prompt; a question about one."""
    while True:
        document = facts(rng, num_notes)
        notes = list(document.passages)
        halves = notes[: num_notes // 2], notes[num_notes // 2 :]
        donors = [encode(render(Document(tuple(half), document.questions[1:5]))) for half in halves]
        rng.shuffle(notes)
        question = document.questions[0]
        yield Sample(donors, encode("".join(notes) + question.prompt), encode(question.answer))


def chain_samples(encode: Encode, rng: random.Random, num_statements: int, hops: int) -> Iterator[Sample]:
    """Chained assignments, known from a prompt in which all numbers they begin with are others.

    So the words of a statement are known and its value is not: it must flow in from the ones before. One
    question about a variable that leans on at least one other.
    """
    while True:
        document = assignments(rng, num_statements, max_hops=hops)
        questions = [q for q in document.questions if _formula(document, q.prompt[3])]
        if not questions:
            continue
        others = []
        for passage in document.passages:
            digit = passage[-3]
            others.append(
                passage if len(passage) > len("Let a = 3.\n") else passage.replace(digit, _other(rng, digit))
            )
        filler = "".join(f"Q: {q.prompt[3]}?\nA:{q.answer}\n" for q in document.questions)
        question = rng.choice(questions)
        prompt = encode(document.context + question.prompt)
        yield Sample([encode("".join(others) + filler)], prompt, encode(question.answer))


def _formula(document: Document, name: str) -> bool:
    (passage,) = [p for p in document.passages if p.startswith(f"Let {name} =")]
    return len(passage) > len("Let a = 3.\n")


def _other(rng: random.Random, digit: str) -> str:
    return str((int(digit) + rng.randint(1, 9)) % 10)


def text_samples(encode: Encode, rng: random.Random, num_documents: int, length: int) -> Iterator[Sample]:
    """Pieces of held-out source files in another order; what is judged goes on with one of them."""
    texts = [encode(text) for text in standard_library_texts(2_000_000, held_out=True)]
    need = length + 80
    texts = [ids for ids in texts if len(ids) > need]
    while True:
        files = rng.sample(texts, num_documents)
        starts = [rng.randrange(len(ids) - need) for ids in files]
        pieces = [ids[start : start + length] for ids, start in zip(files, starts, strict=True)]
        filler = rng.choice(texts)[:40]
        half = num_documents // 2
        donors = [[*chain(*part), *filler] for part in (pieces[:half], pieces[half:])]
        following = files[0][starts[0] + length : starts[0] + need]
        rng.shuffle(pieces)
        yield Sample(donors, [*chain(*pieces), *following[:48]], following[48:])


# ---- judging


class _Follower(Sampler):
    """Answers what it is told, and keeps the logits on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Sequence[int] = ()
        self.logits: list[np.ndarray] = []

    def sample(self, logits: np.ndarray, states: Sequence[SamplerState]) -> list[SampledToken]:  # type: ignore[override]
        """One sequence at a time."""
        assert len(logits) == len(states) == 1, "one request runs"
        self.logits.append(np.array(logits[0], np.float32))
        return [SampledToken(self.answer[len(self.logits) - 1], None, ())]


class Judge:
    """One model, and all sides in turn.

    Args:
        zoo, model: a trained one.
        window: of matching.
        num_threads: of the engine.
    """

    def __init__(self, zoo: Path, model: str, window: int, num_threads: int | None) -> None:
        config = EngineConfig(
            precision="f32",
            num_threads=num_threads,
            kv_cache_bytes=256 << 20,
            approximate=replace(ENGINE, window=window),
        )
        self._engine, self._model = LLMEngine(zoo, config), model
        self._follower = self._engine._sampler = _Follower()
        self._count = 0
        self.sides: Sides = quality_sides(window)
        self.encode: Encode = partial(_encode, self._engine, model)

    def judge(self, sample: Sample) -> dict[str, tuple[bool, np.ndarray, np.ndarray]]:
        """Per side: whether each token of the answer is the likeliest, per token whether the likeliest is
        that of the full prefill, and KL from the full prefill's distribution, in nats."""
        self._count += 1  # of the scope: samples see nothing of each other
        for donor in sample.donors:
            self._run(donor, [0], "exact")
        found = {}
        expected: np.ndarray | None = None
        for name, (how, config) in self.sides.items():
            if config is not None:
                self._engine.configure_reuse(config)
            logits = self._run(sample.prompt, sample.answer, how)
            logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            expected = logprobs if expected is None else expected
            choice = logprobs.argmax(1)
            kl = (np.exp(expected) * (expected - logprobs)).sum(1)
            found[name] = bool((choice == sample.answer).all()), choice == expected.argmax(1), kl
        return found

    def _run(self, prompt: list[int], answer: list[int], how: KVReuse) -> np.ndarray:
        self._follower.answer, self._follower.logits = answer, []
        params = SamplingParams(max_tokens=len(answer), temperature=0.0, ignore_eos=True)
        self._engine.add_request("r", self._model, prompt, params, str(self._count), how)
        while self._engine.has_unfinished():
            for output in self._engine.step():
                if output.error is not None:
                    raise SystemExit(output.error)
        return np.stack(self._follower.logits)


def _encode(engine: LLMEngine, model: str, text: str) -> list[int]:
    tokenizer = engine.tokenizer(model)
    return tokenizer.encode(text, add_special_tokens=False)


def quality(judge: Judge, samples: Iterator[Sample], count: int) -> dict[str, dict[str, float]]:
    """Per side, means over `count` samples (and, but for `correct`, the tokens of their answers)."""
    found = [judge.judge(sample) for sample, _ in zip(samples, range(count), strict=False)]
    result = {}
    for name in judge.sides:
        correct, agrees, kl = zip(*(each[name] for each in found), strict=True)
        result[name] = {
            "correct": float(np.mean(correct)),
            "agrees": float(np.concatenate(agrees).mean()),
            "kl": float(np.concatenate(kl).mean()),
        }
    return result
