"""Blocks of models of different widths joined by a linear map, the stitch of BlockLLM (arXiv 2404.18322).

    python -m benchmarks.stitch [--minutes 8] [--stitch-steps 120]

The wide model is the demo base (hidden size 256, 6 layers); the narrow one, of the same tokenizer, is trained
here on the same text and kept in the workdir. Layers [0, cut) of one are followed by a stitch with a bias and
layers [cut, end) of the other, in both directions. The stitch starts from a least squares fit and is trained
by next-token loss, all else frozen. Two controls show what no information gives: a random stitch of the same
scale, and the mean hidden state everywhere. `shared` is one stitch for all cuts with a bias per cut, which is
what BlockLLM's depth as an additional input comes to. Scores are of held-out text.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import machine_facts, print_table, save_report
from benchmarks.families import made_once
from blockzoo.zoo.demo import corpus
from blockzoo.zoo.demo.assemble import assemble
from blockzoo.zoo.demo.train import learning_rate, make_optimizer, tokens_of_standard_library

LENGTH = 256  # tokens of a row
BATCH = 8  # rows of a training step
FIT_ROWS = 64  # rows that the least squares fit sees
SEED = 0
NARROW_RATE, STITCH_RATE = 3e-3, 2e-3

Stitch = Callable[[Tensor], Tensor]
"""Hidden states [rows, length, width of the front] -> [rows, length, width of the back]."""
Forward = Callable[[Tensor], Tensor]
"""Token ids [rows, length] -> logits [rows, length, vocab]."""


@dataclass(frozen=True, slots=True)
class Text:
    """Training tokens, and held-out rows with what they stand for in bytes."""

    train: np.ndarray  # [num_tokens] int32
    held_out: Tensor  # [rows, LENGTH] int64
    num_bytes: int

    def batch(self, step: int, rows: int = BATCH) -> Tensor:
        """Random rows of training text, int64 [rows, LENGTH]."""
        rng = random.Random(f"{SEED}/{step}")
        starts = [rng.randrange(len(self.train) - LENGTH) for _ in range(rows)]
        return torch.from_numpy(np.stack([self.train[s : s + LENGTH] for s in starts]).astype(np.int64))


@dataclass(frozen=True, slots=True)
class Score:
    """A chain on the held-out text."""

    bits_per_byte: float
    top1_front: float  # share of positions with the likeliest token of the model of the front
    top1_back: float


def read_text(tokenizer: Tokenizer, max_bytes: int, rows: int) -> Text:
    held_out = corpus.standard_library_texts(max_bytes, held_out=True)
    ids = np.concatenate([np.array(tokenizer.encode(text).ids, np.int64) for text in held_out])
    windows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    windows = windows[np.random.default_rng(SEED).permutation(len(windows))[:rows]]
    num_bytes = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in windows)
    return Text(tokens_of_standard_library(tokenizer, max_bytes), torch.from_numpy(windows), num_bytes)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train_step(forward: Forward, optimizer: torch.optim.Optimizer, tokens: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    next_token_loss(forward(tokens), tokens).backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_narrow(wide: LlamaConfig, text: Text, args: argparse.Namespace, folder: Path) -> None:
    """A model of `--hidden-size`, as deep as the wide one, trained for `--minutes` of processor time."""
    torch.manual_seed(SEED)
    shape = {
        "hidden_size": args.hidden_size,
        "intermediate_size": args.hidden_size * 11 // 4,
        "num_attention_heads": args.hidden_size // 64,
        "num_key_value_heads": max(1, args.hidden_size // 128),
    }
    model = LlamaForCausalLM(LlamaConfig.from_dict(wide.to_dict() | shape)).float()
    optimizer = make_optimizer(model)
    start, step = time.process_time(), 0
    while (progress := (time.process_time() - start) / (60 * args.minutes)) < 1:
        train_step(partial(_logits, model), optimizer, text.batch(step), learning_rate(NARROW_RATE, progress))
        step += 1
    model.save_pretrained(folder)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def front(model: nn.Module, tokens: Tensor, cut: int) -> Tensor:
    """The hidden states [rows, length, width] that enter layer `cut`."""
    return _layers(model, model.model.embed_tokens(tokens), 0, cut)


def back(model: nn.Module, hidden: Tensor, cut: int) -> Tensor:
    """Logits from the hidden states that enter layer `cut`."""
    return model.lm_head(model.model.norm(_layers(model, hidden, cut, len(model.model.layers))))


def _layers(model: nn.Module, hidden: Tensor, begin: int, end: int) -> Tensor:
    rotary = model.model.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1])[None])
    for layer in model.model.layers[begin:end]:  # without a mask the attention is causal
        hidden = layer(hidden, position_embeddings=rotary)
    return hidden


def stitched(first: nn.Module, second: nn.Module, cut: int, stitch: Stitch) -> Forward:
    """Layers [0, cut) of one model, the stitch, and the rest of the other."""

    def forward(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = front(first, tokens, cut)
        return back(second, stitch(hidden), cut)

    return forward


@torch.no_grad()
def least_squares(first: nn.Module, second: nn.Module, cut: int, text: Text) -> tuple[Tensor, Tensor, float]:
    """Weight [out, in] and bias [out] that map one model's hidden states to the other's; the share of the
    variance that they explain."""
    tokens = text.batch(-1, FIT_ROWS)
    x, y = (front(model, tokens, cut).flatten(0, 1).double() for model in (first, second))
    x_mean, y_mean = x.mean(0), y.mean(0)
    weight = torch.linalg.lstsq(x - x_mean, y - y_mean).solution.T
    left = (y - y_mean - (x - x_mean) @ weight.T).square().sum() / (y - y_mean).square().sum()
    return weight.float(), (y_mean - weight @ x_mean).float(), 1 - left.item()


@torch.no_grad()
def random_stitch(first: nn.Module, second: nn.Module, cut: int, text: Text) -> nn.Linear:
    """A random matrix whose output has the mean and the size of the other model's hidden states."""
    tokens = text.batch(-1, FIT_ROWS)
    x, y = (front(model, tokens, cut).flatten(0, 1) for model in (first, second))
    weight = torch.randn(y.shape[1], x.shape[1], generator=torch.Generator().manual_seed(SEED))
    made = (x - x.mean(0)) @ weight.T
    weight *= (y - y.mean(0)).norm() / made.norm()
    return linear(weight, y.mean(0) - weight @ x.mean(0))


@torch.no_grad()
def mean_only(second: nn.Module, cut: int, text: Text) -> Stitch:
    mean = front(second, text.batch(-1, FIT_ROWS), cut).flatten(0, 1).mean(0)
    return lambda hidden: mean.expand(*hidden.shape[:2], -1)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


class SharedStitch(nn.Module):
    """One matrix for all cuts and a bias for each."""

    def __init__(self, fits: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([weight for weight, _ in fits]).mean(0))
        self.bias = nn.Parameter(torch.stack([bias for _, bias in fits]))

    def at(self, index: int) -> Stitch:
        """The stitch of the cut of this index."""
        return lambda hidden: nn.functional.linear(hidden, self.weight, self.bias[index])


def train_stitch(trained: nn.Module, forwards: Sequence[Forward], text: Text, steps: int) -> None:
    """Train by next-token loss through the chains in turn; their models are frozen."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.0, weight_decay=0.0)
    for step in range(steps):
        rate = learning_rate(STITCH_RATE, step / steps)
        train_step(forwards[step % len(forwards)], optimizer, text.batch(step), rate)


@torch.no_grad()
def score(forward: Forward, text: Text, first: Tensor, second: Tensor) -> Score:
    """`first`, `second`: the likeliest tokens [rows, LENGTH] of the models of the front and the back."""
    nats, top1 = 0.0, []
    for rows in text.held_out.split(BATCH):
        logits = forward(rows)
        nats += next_token_loss(logits, rows).item() * rows[:, 1:].numel()
        top1.append(logits.argmax(-1))
    tops = torch.cat(top1)
    agreement = [(tops == other).float().mean().item() for other in (first, second)]
    return Score(nats / math.log(2) / text.num_bytes, *(round(share, 4) for share in agreement))


def measure_direction(
    names: tuple[str, str],
    models: dict[str, nn.Module],
    tops: dict[str, Tensor],
    text: Text,
    args: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """By cut and kind of stitch, the scores of chains of the first model's front and the second's back."""
    first, second = (models[name] for name in names)
    cuts, found, fits = args.cuts, {}, []
    for cut in cuts:
        weight, bias, explained = least_squares(first, second, cut, text)
        fits.append((weight, bias))
        trained = linear(weight.clone(), bias.clone())
        train_stitch(trained, [stitched(first, second, cut, trained)], text, args.stitch_steps)
        kinds = {
            "least squares": linear(weight, bias),
            "trained": trained,
            "random": random_stitch(first, second, cut, text),
            "mean only": mean_only(second, cut, text),
        }
        for kind, stitch in kinds.items():
            entry = found[f"cut {cut}, {kind}"] = asdict(
                score(stitched(first, second, cut, stitch), text, tops[names[0]], tops[names[1]])
            )
            if kind == "least squares":
                entry["variance_explained"] = round(explained, 4)
        print(f"{names[0]} -> {names[1]}, cut {cut}: {found[f'cut {cut}, trained']}", flush=True)
    shared = SharedStitch(fits)
    forwards = [stitched(first, second, cut, shared.at(i)) for i, cut in enumerate(cuts)]
    train_stitch(shared, forwards, text, args.stitch_steps * len(cuts))
    for cut, forward in zip(cuts, forwards, strict=True):
        found[f"cut {cut}, shared"] = asdict(score(forward, text, tops[names[0]], tops[names[1]]))
    return found


def measure(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    with tempfile.TemporaryDirectory() as temporary:
        wide_path = assemble(temporary)["base"]
        tokenizer = Tokenizer.from_file(str(wide_path / "tokenizer.json"))
        wide = LlamaForCausalLM.from_pretrained(wide_path, dtype=torch.float32)
    text = read_text(tokenizer, args.text_bytes, args.rows)
    name = f"narrow-{args.hidden_size}-{args.minutes:g}min"
    narrow_path = made_once(args.workdir / name, partial(train_narrow, wide.config, text, args))
    narrow = LlamaForCausalLM.from_pretrained(narrow_path, dtype=torch.float32)
    models = {"wide": wide.eval().requires_grad_(False), "narrow": narrow.eval().requires_grad_(False)}
    with torch.no_grad():
        tops = {
            name: torch.cat([_logits(model, rows).argmax(-1) for rows in text.held_out.split(BATCH)])
            for name, model in models.items()
        }
    whole = {
        name: asdict(score(partial(_logits, model), text, tops["wide"], tops["narrow"]))
        | {"parameters": sum(p.numel() for p in model.parameters())}
        for name, model in models.items()
    }
    return {"whole": whole} | {
        f"{first} -> {second}": measure_direction((first, second), models, tops, text, args)
        for first, second in (("wide", "narrow"), ("narrow", "wide"))
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="training of the narrow model (8)")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the narrow model (128)")
    parser.add_argument("--stitch-steps", type=int, default=120, help="training of each stitch (120)")
    parser.add_argument("--cuts", type=int, nargs="+", default=[1, 3, 5], help="layers in front (1 3 5)")
    parser.add_argument("--rows", type=int, default=96, help=f"held-out rows of {LENGTH} tokens (96)")
    parser.add_argument("--text-bytes", type=int, default=12_000_000, help="of training text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the report")
    parser.add_argument("--workdir", type=Path, default=Path("out/bench"), help="keeps the narrow model")
    args = parser.parse_args(argv)
    args.shape = "demo"
    torch.set_num_threads(1)
    machine = machine_facts()
    results = measure(args)
    for title, chains in results.items():
        columns = ["bits_per_byte", "top1_front", "top1_back"]
        print_table(title, ["chain", *columns], [[k, *(v[c] for c in columns)] for k, v in chains.items()])
    print(f"saved {save_report('stitch', args, machine, results)}")


if __name__ == "__main__":
    main()
