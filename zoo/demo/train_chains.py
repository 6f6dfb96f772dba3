"""A fine-tune of the demo base that follows assignments: `python -m blockzoo.zoo.demo.train_chains OUT_DIR`.

The base looks values up but does not calculate. This one reads "Let b = a + 4." after "Let a = 3." and
answers "Q: b?" with 7. Half of the statements it is trained on are followed by the value they give ("Let b
= a + 4.7"), so a value is computed at the full stop, written or not, and questions read it there. So the K
and V of a statement hold what flowed into it from those before: taken over from behind other words they are
wrong, which is what reuse of such KV is tried on. Ten megabytes, not shipped.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from . import corpus, tasks
from .assemble import assemble
from .train import learning_rate, make_optimizer

EVALUATION_SEED = 30_000_000
PROMPT_WEIGHT = 0.02  # of the loss; statements and questions are drawn at random
LEARNING_RATE = 1e-3
# most statements and most hops of a row; a level is left when its answers cost less than LEARNT
LEVELS = ((3, 1), (4, 1), (6, 1), (5, 2), (8, 2), (8, 3), (12, 3), (12, 4))
LEARNT = 0.15  # nats a digit


class Batch(NamedTuple):
    """Rows of a step."""

    tokens: np.ndarray  # [rows, length] int64, padded with </s>
    weights: np.ndarray  # [rows, length] float32, of the loss of predicting each
    is_answer: np.ndarray  # [rows, length] bool, the digits behind "A:"


def with_values(document: tasks.Document, rng: random.Random, share: float) -> str:
    """The document as text, `share` of its statements followed by the value of their variable."""
    values = {question.prompt[3]: question.answer.strip() for question in document.questions}
    statements = [
        f"{passage[:-1]}{values[passage[4]]}\n" if rng.random() < share else passage
        for passage in document.passages
    ]
    return "".join(statements) + "".join(q.prompt + q.answer + "\n" for q in document.questions)


def draw(tokenizer: Tokenizer, rng: random.Random, rows: int, statements: int, hops: int) -> Batch:
    """Documents of two to `statements` statements, with weight on every value."""
    texts = [
        with_values(tasks.assignments(rng, rng.randint(2, statements), hops), rng, 0.5) for _ in range(rows)
    ]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    tokens = np.full((rows, max(map(len, ids))), corpus.EOS_ID, np.int64)
    for row, line in zip(tokens, ids, strict=True):
        row[: len(line)] = line
    vocabulary = tokenizer.get_vocab()
    is_digit = np.isin(tokens, [vocabulary[str(digit)] for digit in range(10)])
    is_shown, is_answer = np.zeros_like(is_digit), np.zeros_like(is_digit)
    is_shown[:, 1:] = is_digit[:, 1:] & (tokens[:, :-1] == vocabulary["."])
    spaced = (tokens[:, 1:-1] == vocabulary["Ġ"]) & (tokens[:, :-2] == vocabulary[":"])
    is_answer[:, 2:] = is_digit[:, 2:] & spaced
    weights = np.where(tokens == corpus.EOS_ID, 0.0, PROMPT_WEIGHT)
    weights[is_shown | is_answer] = 1.0
    return Batch(tokens, weights.astype(np.float32), is_answer)


@torch.no_grad()
def accuracies(
    model: torch.nn.Module, tokenizer: Tokenizer, num_documents: int, num_statements: int = 8
) -> dict[int, float]:
    """Share of questions answered right by the number of hops, one question a document, no values shown."""
    shares = {}
    for hops in range(4):
        right = 0
        for number in range(num_documents):
            rng = random.Random(f"{EVALUATION_SEED}/{hops}/{number}")
            document = tasks.Document((), ())
            while not document.questions:
                document = tasks.assignments(rng, num_statements, max_hops=4, hops=hops)
            question = document.questions[0]
            *prompt, digit = tokenizer.encode(document.context + question.prompt + question.answer).ids
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits
            right += logits[0, -1].argmax().item() == digit
        shares[hops] = right / num_documents
    return shares


def train(model: torch.nn.Module, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Trains for `args.minutes` of processor time, level by level, and prints what is learnt."""
    optimizer = make_optimizer(model)
    level, answer_loss, step = 0, 1.5, 0
    start = time.process_time()
    while (progress := (time.process_time() - start) / (60 * args.minutes)) < 1:
        statements, hops = LEVELS[level]
        rng = random.Random(f"{args.seed}/{step}")
        rows = max(8, args.batch_tokens // (12 + 13 * statements))
        batch = draw(tokenizer, rng, rows, statements, hops)
        ids, scale = torch.from_numpy(batch.tokens), torch.from_numpy(batch.weights[:, 1:])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(LEARNING_RATE, progress)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        ((losses * scale).sum() / scale.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        answer_loss += 0.03 * (losses[torch.from_numpy(batch.is_answer[:, 1:])].mean().item() - answer_loss)
        if step % 50 == 0:
            print(f"{progress:6.1%} step {step} {LEVELS[level]} loss {answer_loss:.3f}", flush=True)
        if answer_loss < LEARNT and level + 1 < len(LEVELS):
            level, answer_loss = level + 1, 1.0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m blockzoo.zoo.demo.train_chains", description=__doc__)
    parser.add_argument("out_dir", type=Path, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=30.0, help="of processor time (30)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=200, help="questions to judge it by, a depth")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = assemble(temporary)["base"]
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        model.train()
        train(model, tokenizer, args)
        model.to(torch.bfloat16).save_pretrained(args.out_dir)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (args.out_dir / name).write_bytes((base / name).read_bytes())
    print("right by hops:", accuracies(model.float().eval(), tokenizer, args.documents))


if __name__ == "__main__":
    main()
