"""Trains the demo family on a CPU: `python -m blockzoo.zoo.demo.train --out DIR --minutes 70`.

A base from random weights, then two fine-tunes of it: `notes` (a LoRA) and `solver` (the last two layers).
The schedule follows the processor time used, not the clock, so the run may be stopped, suspended and resumed.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import corpus, tasks
from .corpus import RowMaker, Stage
from .evaluate import task_accuracies

NUM_SOLVER_LAYERS = 2
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MINUTES_SHARE: dict[Stage, float] = {"base": 0.8, "notes": 0.08, "solver": 0.12}
LEARNING_RATE: dict[Stage, float] = {"base": 2e-3, "notes": 2e-3, "solver": 1e-3}
SAVE_SECONDS = 30.0  # of processor time per thread between checkpoints
REPORT_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a stage trains: processor minutes per thread, or exactly `steps` where given."""

    minutes: float
    threads: int
    steps: int | None

    def progress(self, cpu_seconds: float, step: int) -> float:
        """Share of the budget used, 1 or more when it is spent."""
        if self.steps is not None:
            return step / self.steps
        return cpu_seconds / (60 * self.minutes * self.threads)


def base_config(args: argparse.Namespace) -> LlamaConfig:
    """The base's shape; 5.0M parameters with the default arguments."""
    return LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=max(1, args.hidden_size // 128),
        head_dim=64,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=corpus.BOS_ID,
        eos_token_id=corpus.EOS_ID,
    )


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up over the first 2 %, then a cosine down to a twentieth."""
    if progress < 0.02:
        return peak * max(progress / 0.02, 0.01)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW over what is trained; matrices decay, norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def weighted_loss(model: torch.nn.Module, batch: corpus.Row) -> torch.Tensor:
    """Mean cross entropy over the batch, every position by its weight."""
    tokens, weights = torch.from_numpy(batch.tokens), torch.from_numpy(batch.weights)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    scale = weights[:, 1:].flatten()
    return (losses * scale).sum() / scale.sum()


def train_stage(
    model: torch.nn.Module, rows: RowMaker, budget: Budget, args: argparse.Namespace, state_path: Path
) -> None:
    """Runs one stage to the end of its budget, with a checkpoint of everything every few minutes."""
    stage = rows.stage
    optimizer = make_optimizer(model)
    step, cpu_before, num_tokens = 0, 0.0, 0
    if args.resume and state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, cpu_before, num_tokens = state["step"], state["cpu_seconds"], state["num_tokens"]
    start = last_save = last_eval = time.process_time()

    def cpu_seconds() -> float:
        return cpu_before + time.process_time() - start

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"step": step, "cpu_seconds": cpu_seconds(), "num_tokens": num_tokens}
        torch.save(state, state_path.with_suffix(".tmp"))
        state_path.with_suffix(".tmp").replace(state_path)

    model.train()
    mean_loss = 0.0
    while (progress := budget.progress(cpu_seconds(), step)) < 1:
        mixture = corpus.curriculum(stage, progress)
        # a generator per step: a resumed run draws what the uninterrupted one would have drawn
        rng = random.Random(f"{args.seed}/{stage}/{step}")
        batch = rows.batch(rng, mixture, max(1, args.batch_tokens // mixture.length))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(LEARNING_RATE[stage], progress)
        loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, num_tokens = step + 1, num_tokens + batch.tokens.size
        mean_loss = loss.item() if step == 1 else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 50 == 0:
            print(
                f"{stage} {progress:6.1%} step {step} tokens {num_tokens / 1e6:.2f}M loss {mean_loss:.3f}",
                flush=True,
            )
        if time.process_time() - last_save > SAVE_SECONDS * args.threads:
            save()
            last_save = time.process_time()
        if time.process_time() - last_eval > REPORT_SECONDS * args.threads:
            report(model, rows)
            last_eval = time.process_time()
    save()
    report(model, rows)


def report(model: torch.nn.Module, rows: RowMaker) -> None:
    """Prints the task accuracies of the model so far."""
    model.eval()
    found = task_accuracies(model, rows.tokenizer, rows.stage, num_documents=16)
    print("  " + ", ".join(f"{name} {share:.0%}" for name, share in found.items()), flush=True)
    model.train()


def tokens_of_standard_library(tokenizer: Tokenizer, max_bytes: int) -> np.ndarray:
    """All training text as one int32 array, files separated by </s>."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(corpus.standard_library_texts(max_bytes))):
        ids += [*encoding.ids, corpus.EOS_ID]
    return np.array(ids, np.int32)


def load_tokenizer(out: Path, args: argparse.Namespace) -> Tokenizer:
    """The tokenizer of an earlier run in `out`, or a newly trained one."""
    path = out / "base" / "tokenizer.json"
    if args.init is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(args.init / name, path.parent / name)
    elif not path.exists():
        texts = [*corpus.standard_library_texts(min(args.text_bytes, 4_000_000))]
        texts += tasks.sample_texts(random.Random(args.seed), 1000)
        path.parent.mkdir(parents=True, exist_ok=True)
        PreTrainedTokenizerFast(
            tokenizer_object=corpus.train_tokenizer(iter(texts), args.vocab_size),
            bos_token=corpus.BOS,
            eos_token=corpus.EOS,
        ).save_pretrained(path.parent)
    return Tokenizer.from_file(str(path))


def model_of_stage(stage: Stage, out: Path, args: argparse.Namespace) -> torch.nn.Module:
    """A float32 model with just the parameters of the stage set to be trained."""
    if stage == "base" and args.init is None:
        return LlamaForCausalLM(base_config(args))
    if stage == "base":
        return LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    if stage == "notes":
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
        return get_peft_model(base, lora)
    base.requires_grad_(False)
    base.model.layers[-NUM_SOLVER_LAYERS:].requires_grad_(True)
    return base


def save_stage(stage: Stage, model: torch.nn.Module, out: Path) -> None:
    """Writes the stage as an HF folder (bf16) or a PEFT folder (f32, over "base")."""
    if isinstance(model, PeftModel):
        model.peft_config["default"].base_model_name_or_path = "base"
        model.save_pretrained(out / stage)
    else:
        model.to(torch.bfloat16).save_pretrained(out / stage)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m blockzoo.zoo.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained models and states")
    parser.add_argument("--stage", choices=["base", "notes", "solver", "all"], default="all")
    parser.add_argument("--minutes", type=float, default=85.0, help="training time of all stages together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="start the base from this checkpoint and its tokenizer")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    size = parser.add_argument_group("sizes (for tests)")
    size.add_argument("--steps", type=int, help="train each stage this many steps instead of --minutes")
    size.add_argument("--batch-tokens", type=int, default=2048)
    size.add_argument("--hidden-size", type=int, default=256)
    size.add_argument("--layers", type=int, default=6)
    size.add_argument("--vocab-size", type=int, default=2048)
    size.add_argument("--text-bytes", type=int, default=12_000_000)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the stages asked for, one after another."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.out, args)
    text_tokens = tokens_of_standard_library(tokenizer, args.text_bytes)
    print(f"{len(text_tokens) / 1e6:.1f}M tokens of text", flush=True)
    stages: list[Stage] = ["base", "notes", "solver"] if args.stage == "all" else [args.stage]
    for stage in stages:
        model = model_of_stage(stage, args.out, args)
        budget = Budget(args.minutes * MINUTES_SHARE[stage], args.threads, args.steps)
        train_stage(model, RowMaker(tokenizer, text_tokens, stage), budget, args, args.out / f"{stage}.state")
        save_stage(stage, model, args.out)


if __name__ == "__main__":
    main()
