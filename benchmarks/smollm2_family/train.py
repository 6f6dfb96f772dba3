"""Trains the fine-tunes of SmolLM2-135M-Instruct on a CPU, one trade a run.

    python -m benchmarks.smollm2_family.train extract --out TRAINED

TRAINED/base is written first where it is not there. Every sample is seen once; the loss is on the answer
alone, and logits are computed for its positions only. Takes 2 to 10 minutes of processor time a trade.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from . import samples
from .assemble import write_base
from .recipes import RECIPES, Recipe

SORTED_OVER = 16  # batches that are cut from one sorted heap
WARM_UP = 10  # steps


class Batch(NamedTuple):
    """Prompts with their answers, padded on the right."""

    ids: torch.Tensor  # [rows, length] int64
    is_answer: torch.Tensor  # [rows, length] bool: tokens that are to be predicted


def encode(tokenizer: Any, sample: samples.Sample) -> tuple[list[int], int]:
    """Token ids of a sample with its end token, and how many of them are the prompt."""
    text = tokenizer.apply_chat_template(sample.messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text).input_ids
    answer = tokenizer(sample.answer).input_ids
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def batches(tokenizer: Any, recipe: Recipe, seed: int, steps: int) -> Iterator[Batch]:
    """`steps` batches of about the recipe's number of tokens, of rows of about the same length."""
    rng = random.Random(seed)
    made = heap = 0
    while made < steps:
        drawn = samples.draw(recipe.trade, seed + heap, recipe.rows * min(SORTED_OVER, steps - made), False)
        heap += 1
        rows = sorted((encode(tokenizer, sample) for sample in drawn), key=lambda row: len(row[0]))
        cut = [rows[i : i + recipe.rows] for i in range(0, len(rows), recipe.rows)]
        rng.shuffle(cut)
        for part in cut:
            made += 1
            yield padded(part, tokenizer.eos_token_id)


def padded(rows: Sequence[tuple[list[int], int]], pad: int) -> Batch:
    """Rows of (ids, length of the prompt) side by side."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad)
    is_answer = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (tokens, prompt) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        is_answer[row, prompt : len(tokens)] = True
    return Batch(ids, is_answer)


def answer_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the answers' tokens. Padding comes last: causal attention never sees it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.autocast("cpu", torch.bfloat16):
        hidden = inner.model(input_ids=batch.ids[:, :-1], use_cache=False).last_hidden_state
        logits = inner.lm_head(hidden[batch.is_answer[:, 1:]])
    return torch.nn.functional.cross_entropy(logits.float(), batch.ids[:, 1:][batch.is_answer[:, 1:]])


def trainable(base: Path, recipe: Recipe) -> torch.nn.Module:
    """The base with just what the recipe trains set to be trained, in f32; the rest is bf16."""
    full = recipe.rank is None and recipe.last_layers is None
    dtype = torch.float32 if full else torch.bfloat16
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
    if recipe.rank is not None:
        lora = LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules=list(recipe.targets),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora)
    if recipe.last_layers is not None:
        model.requires_grad_(False)
        model.model.layers[-recipe.last_layers :].float().requires_grad_(True)
    return model


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / WARM_UP) * decay


def train(model: torch.nn.Module, tokenizer: Any, recipe: Recipe, steps: int, seed: int) -> None:
    """Trains for `steps` steps and says what it costs."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    model.train()
    start, mean_loss, num_tokens = time.process_time(), 0.0, 0
    for step, batch in enumerate(batches(tokenizer, recipe, seed, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.rate, step, steps)
        loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += batch.ids.numel()
        mean_loss = loss.item() if step == 0 else 0.9 * mean_loss + 0.1 * loss.item()
        if (step + 1) % 10 == 0:
            spent = time.process_time() - start
            print(f"step {step + 1} tokens {num_tokens} loss {mean_loss:.4f} cpu {spent:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2_family.train", description=__doc__)
    parser.add_argument("trade", choices=list(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder of the base and the trained models")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    recipe = RECIPES[args.trade]
    base = write_base(args.out / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = trainable(base, recipe)
    train(model, tokenizer, recipe, args.steps or recipe.steps, args.seed)
    if recipe.rank is not None:
        model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(args.out / args.trade)
    if recipe.rank is None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(base / name, args.out / args.trade / name)


if __name__ == "__main__":
    main()
