"""A fine-tune of the demo base for long prompts:

    python -m blockzoo.zoo.demo.train_chains FIRST
    python -m blockzoo.zoo.demo.train_chains CHAINS --start FIRST

It reads "Let b = a + 4." after "Let a = 3." and answers "Q: b?" with 7, and it answers questions about notes,
wherever these stand among up to a thousand tokens of other text. The base looks values up in short prompts
and does not calculate.

Half of the statements it is trained on are followed by the value they give ("Let b = a + 4.7"), so a value is
computed at the full stop, written or not, and questions read it there. So the K and V of a statement hold
what flowed into it from those before: taken over from behind other words they are wrong, which is what reuse
of such KV is tried on. Ten megabytes, not shipped.
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
from .documents import Filler
from .train import learning_rate, make_optimizer, tokens_of_standard_library

EVALUATION_SEED = 30_000_000
PROMPT_WEIGHT = 0.02  # of the loss; statements, notes and questions are drawn at random
TEXT_WEIGHT = 0.05  # of each token of a row of nothing but text
LEARNING_RATE = 1e-3
MAX_QUESTIONS = 12
SHORT_STEPS = 0.6  # of steps, whose rows are nothing but chains: they are cheap, and teach the most
SHORT_STEPS_AGAIN = 0.3  # once they are known
LEARNT = 0.15  # nats a digit, of the answers of chains


class Level(NamedTuple):
    """How hard rows are; it is left when it is learnt, or when `until` of the training is over."""

    length: int  # tokens of documents; 0: passages without anything between
    statements: int
    until: float


LEVELS = (
    Level(0, 3, 0.3),
    Level(0, 4, 0.36),
    Level(0, 6, 0.42),
    Level(256, 8, 0.48),
    Level(512, 8, 0.56),
    Level(1024, 16, 1.0),
)


class Batch(NamedTuple):
    """Rows of a step."""

    tokens: np.ndarray  # [rows, length] int64, padded with </s>
    weights: np.ndarray  # [rows, length] float32, of the loss of predicting each
    is_answer: np.ndarray  # [rows, length] bool, the digits that answer questions about chains


class RowMaker:
    """Draws rows. In the lists it makes, ~token is a token with full weight in the loss."""

    def __init__(self, tokenizer: Tokenizer, max_text_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._filler = Filler(tokenizer, max_text_bytes)
        self._text = tokens_of_standard_library(tokenizer, max_text_bytes)

    def batch(self, rng: random.Random, level: Level, batch_tokens: int) -> Batch:
        """About `batch_tokens` tokens; a row at least."""
        expected = level.length + 13 * level.statements + 12
        rows = [self._row(rng, level) for _ in range(max(1, batch_tokens // expected))]
        tokens = np.full((len(rows), max(len(row) for row, _, _ in rows)), corpus.EOS_ID, np.int64)
        weights = np.zeros(tokens.shape, np.float32)
        is_answer = np.zeros(tokens.shape, bool)
        for i, (row, weight, answers_from) in enumerate(rows):
            ids = np.array(row)
            full = ids < 0
            tokens[i, : ids.size] = np.where(full, ~ids, ids)
            weights[i, : ids.size] = np.where(full, 1.0, weight)
            is_answer[i, answers_from : ids.size] = full[answers_from:]
        return Batch(tokens, weights, is_answer)

    def _row(self, rng: random.Random, level: Level) -> tuple[list[int], float, int]:
        """Tokens, the weight of those with no full weight, where answers of chains begin."""
        draw = rng.random() if level.length else 1.0
        if draw < 0.12:
            start = rng.randrange(len(self._text) - level.length)
            return self._text[start : start + level.length].tolist(), TEXT_WEIGHT, level.length
        if draw < 0.45:
            if rng.random() < 0.6:
                notes = tasks.asked_in_full(tasks.facts(rng, rng.randint(1, 4), "full", split=True))
            else:
                notes = tasks.facts(rng, rng.randint(1, 8))
            row = self._context(rng, [self._encode(passage) for passage in notes.passages], level)
            row += self._asked(notes.questions[:MAX_QUESTIONS])
            return row, PROMPT_WEIGHT, len(row)
        chain = tasks.assignments(rng, rng.randint(2, level.statements), max_hops=1)
        row = self._context(rng, self._statements(rng, chain), level)
        return row + self._asked(chain.questions), PROMPT_WEIGHT, len(row)

    def _context(self, rng: random.Random, passages: list[list[int]], level: Level) -> list[int]:
        return self._filler.document(rng, passages, rng.randint(level.length // 2, level.length))

    def _statements(self, rng: random.Random, chain: tasks.Document) -> list[list[int]]:
        """Half of them followed by the value of their variable."""
        values = {question.prompt[3]: question.answer.strip() for question in chain.questions}
        rows = []
        for passage in chain.passages:
            ids = self._encode(passage)
            if rng.random() < 0.5:
                ids[-1:] = [~self._encode(values[passage[4]])[0], ids[-1]]
            rows.append(ids)
        return rows

    def _asked(self, questions: Sequence[tasks.Question]) -> list[int]:
        row: list[int] = []
        for question in questions:
            row += self._encode(question.prompt)
            *words, last = self._encode(question.answer)
            alone = question.answer[1:].isdigit()  # " 7": the space before it is known
            row += [*(words if alone else [~word for word in words]), ~last]
            row += self._encode("\n")
        return row

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids


@torch.no_grad()
def accuracies(
    model: torch.nn.Module, tokenizer: Tokenizer, num_documents: int, length: int
) -> dict[str, float]:
    """Share of questions answered right, one a prompt of eight passages in documents of `length` tokens."""
    filler = Filler(tokenizer, 2_000_000, held_out=True)
    shares = {}
    for name in ("facts", "0 hops", "1 hop"):
        right = 0
        for number in range(num_documents):
            rng = random.Random(f"{EVALUATION_SEED}/{name}/{number}")
            document = tasks.Document((), ())
            while not document.questions:
                document = (
                    tasks.facts(rng, 8)
                    if name == "facts"
                    else tasks.assignments(rng, 8, max_hops=1, hops=int(name[0]))
                )
            question = document.questions[0]
            passages = [tokenizer.encode(passage).ids for passage in document.passages]
            prompt = filler.document(rng, passages, length) + tokenizer.encode(question.prompt).ids
            answer = tokenizer.encode(question.answer).ids
            logits = model(input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0]
            right += logits[-len(answer) :].argmax(-1).tolist() == answer
        shares[name] = right / num_documents
    return shares


def train(model: torch.nn.Module, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Trains for `args.minutes` of processor time, level by level, and prints what is learnt."""
    optimizer = make_optimizer(model)
    rows = RowMaker(tokenizer, args.text_bytes)
    level, short_steps = (len(LEVELS) - 1, SHORT_STEPS_AGAIN) if args.start else (0, SHORT_STEPS)
    answer_loss, step = 1.5, 0
    start = time.process_time()
    while (progress := (time.process_time() - start) / (60 * args.minutes)) < 1:
        rng = random.Random(f"{args.seed}/{step}")
        length = 0 if rng.random() < short_steps else LEVELS[level].length
        batch = rows.batch(rng, LEVELS[level]._replace(length=length), args.batch_tokens)
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
        answers = torch.from_numpy(batch.is_answer[:, 1:])
        if answers.any():
            answer_loss += 0.03 * (losses[answers].mean().item() - answer_loss)
        if step % 50 == 0:
            print(f"{progress:6.1%} step {step} {LEVELS[level]} loss {answer_loss:.3f}", flush=True)
        if level + 1 < len(LEVELS) and (answer_loss < LEARNT or progress > LEVELS[level].until):
            level, answer_loss = level + 1, max(answer_loss, 2 * LEARNT)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m blockzoo.zoo.demo.train_chains", description=__doc__)
    parser.add_argument("out_dir", type=Path, help="folder to write the model to")
    parser.add_argument("--start", type=Path, help="a model that this made, to go on with at the last level")
    parser.add_argument("--minutes", type=float, default=75.0, help="of processor time (75)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of a step, about")
    parser.add_argument("--text-bytes", type=int, default=4_000_000, help="of sources that it reads")
    parser.add_argument("--documents", type=int, default=100, help="questions to judge it by, a kind")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = args.start or assemble(temporary)["base"]
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        model.train()
        train(model, tokenizer, args)
        model.to(torch.bfloat16).save_pretrained(args.out_dir)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (args.out_dir / name).write_bytes((base / name).read_bytes())
    model.float().eval()
    for length in (0, 1024):
        print(f"right, in {length} tokens:", accuracies(model, tokenizer, args.documents, length))


if __name__ == "__main__":
    main()
