"""Measures what the demo models can do: `python -m blockzoo.zoo.demo.evaluate [FOLDER]`."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer

from . import corpus, tasks
from .corpus import Stage

EVALUATION_SEED = 20_000_000


def _tasks_of(stage: Stage) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    if stage != "solver":
        found |= {f"facts of {n} notes": ("facts", n) for n in (2, 4, 8)}
    if stage != "notes":
        found |= {f"{hops} hops": ("assignments", hops) for hops in (0, 1, 2)}
    return found


def _document(stage: Stage, rng: random.Random, task: str, level: int) -> tasks.Document:
    if task == "facts":
        return tasks.facts(rng, level, "sentence" if stage == "notes" else "plain")
    style: tasks.AssignmentStyle = "working" if stage == "solver" else "plain"
    while True:
        document = tasks.assignments(rng, 6, 2, style, hops=level)
        if document.questions:
            return document


@torch.no_grad()
def task_accuracies(
    model: torch.nn.Module, tokenizer: Tokenizer, stage: Stage, num_documents: int
) -> dict[str, float]:
    """Share of questions answered exactly, by task; one question per document.

    An answer counts when every token of it is the most likely one, which is what greedy decoding would write.
    """
    end = "\n" if stage == "base" else corpus.EOS
    shares = {}
    for name, (task, level) in _tasks_of(stage).items():
        right = 0
        for number in range(num_documents):
            rng = random.Random(f"{EVALUATION_SEED}/{name}/{number}")
            document = _document(stage, rng, task, level)
            question = document.questions[0]
            prompt = tokenizer.encode(document.context + question.prompt).ids
            answer = tokenizer.encode(question.answer + end).ids
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
            said = logits[len(prompt) - 1 : -1].argmax(-1)
            right += bool((said == torch.tensor(answer)).all())
        shares[name] = right / num_documents
    return shares
