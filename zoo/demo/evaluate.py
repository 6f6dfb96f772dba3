"""Measures what the demo models can do: `python -m blockzoo.zoo.demo.evaluate [FOLDER]`.

FOLDER holds what `python -m blockzoo.zoo.demo FOLDER` or train.py wrote; without one the shipped weights are
assembled in a temporary folder. Prints a table: exact answers to questions drawn with a seed that no training
run uses, and bits per byte of the held-out files of the standard library.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from . import corpus, tasks
from .assemble import assemble
from .corpus import Stage

TEXT_ROW = "held-out text, bits per byte"
EVALUATION_SEED = 20_000_000
STAGES: tuple[Stage, ...] = ("base", "notes", "solver")


def _tasks_of(stage: Stage) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    if stage != "solver":
        found |= {f"facts of {n} notes": ("facts", n) for n in (2, 4, 8)}
    if stage != "notes":
        found |= {f"{hops} hops": ("assignments", hops) for hops in (0, 1, 2)}
    return found


def _document(stage: Stage, rng: random.Random, task: str, level: int) -> tasks.Document:
    style: tasks.Style = "short" if stage == "base" else "full"
    if task == "facts":
        return tasks.facts(rng, level, style)
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


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, tokenizer: Tokenizer, num_windows: int, length: int = 256) -> float:
    """Cost of held-out text in bits per byte of UTF-8, over windows of `length` tokens each."""
    rng = random.Random(EVALUATION_SEED)
    texts = list(corpus.standard_library_texts(2_000_000, held_out=True))
    bits, num_bytes = 0.0, 0
    for _ in range(num_windows):
        text = rng.choice(texts)
        start = rng.randrange(max(1, len(text) - 8 * length))
        window = tokenizer.encode(text[start : start + 8 * length]).ids[:length]
        if len(window) < 2:
            continue
        logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum")
        bits += loss.item() / math.log(2)
        num_bytes += len(tokenizer.decode(window[1:]).encode())
    return bits / num_bytes


def load(folder: Path, stage: Stage) -> torch.nn.Module:
    """The stage's model in float32, ready to be evaluated."""
    if stage == "notes":
        base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        return PeftModel.from_pretrained(base, folder / "notes").eval()
    return LlamaForCausalLM.from_pretrained(folder / stage, dtype=torch.float32).eval()


def table(folder: Path, num_documents: int) -> str:
    """The measurements of all three trained models as a Markdown table."""
    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    columns: dict[Stage, dict[str, str]] = {}
    for stage in STAGES:
        model = load(folder, stage)
        shares = task_accuracies(model, tokenizer, stage, num_documents)
        columns[stage] = {name: f"{share:.1%}" for name, share in shares.items()}
        columns[stage]["held-out text, bits per byte"] = (
            f"{bits_per_byte(model, tokenizer, num_documents):.2f}"
        )
    lines = ["| | " + " | ".join(f"`{stage}`" for stage in STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for name in columns["base"]:
        lines.append(f"| {name} | " + " | ".join(columns[stage].get(name, "") for stage in STAGES) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m blockzoo.zoo.demo.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of the models")
    parser.add_argument("--documents", type=int, default=200, help="questions per task (default 200)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        if args.folder is None:
            assemble(temporary)
        print(table(args.folder or Path(temporary), args.documents))


if __name__ == "__main__":
    main()
