"""Twenty models made from the demo base by real training, each in a minute or less, as HF and PEFT folders.

    python -m benchmarks.finetunes FOLDER [--steps-scale 1.0]

The kinds that teams have: LoRA folders, LoRAs merged into bf16 checkpoints, models whose last layers were
tuned, whole models tuned with a small learning rate, the same weights in another file layout, and one that
has nothing to do with the base. What is there already stays. torch is loaded only where something is missing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from benchmarks.families import made_once
from blockzoo.zoo.demo.assemble import TEXT_FILES, assemble
from blockzoo.zoo.demo.corpus import Mixture, Stage
from blockzoo.zoo.demo.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    import torch

Kind = Literal["lora", "merged", "layers", "light", "alias", "unrelated"]

BASE = "base-sharded"
"""The alias that holds the base's weights: LoRA folders name it as their base."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
BATCH_TOKENS = 768
TEXT_BYTES = 1_500_000

_FACTS = Mixture(192, 0.1, 0.0, 0.9, max_notes=6, num_wordings=3, max_statements=1, max_hops=0)
_FEW_FACTS = Mixture(128, 0.0, 0.0, 1.0, max_notes=2, num_wordings=1, max_statements=1, max_hops=0)
_VALUES = Mixture(128, 0.1, 0.0, 0.0, 1, 1, max_statements=5, max_hops=1)
_CHAINS = Mixture(192, 0.1, 0.0, 0.0, 1, 1, max_statements=8, max_hops=2)
_TEXT = Mixture(256, 1.0, 0.0, 0.0, 1, 1, 1, 0)
_COPIES = Mixture(128, 0.0, 1.0, 0.0, 1, 1, 1, 0)
_BOTH = Mixture(192, 0.4, 0.0, 0.3, max_notes=6, num_wordings=3, max_statements=6, max_hops=1)
_TASKS: dict[str, tuple[Stage, Mixture]] = {
    "facts": ("notes", _FACTS),
    "few-facts": ("notes", _FEW_FACTS),
    "values": ("solver", _VALUES),
    "chains": ("solver", _CHAINS),
    "text": ("base", _TEXT),
    "copies": ("base", _COPIES),
    "both": ("base", _BOTH),
}


@dataclass(frozen=True, slots=True)
class FineTune:
    """One model of the zoo.

    Attributes:
        kind: how it comes from the base.
        task: what it was trained on, of `_TASKS`; of an alias, the model whose weights it has.
        steps: of AdamW, on about BATCH_TOKENS tokens each.
        rate: peak learning rate.
        rank, targets: of a LoRA.
        layers: last layers that are trained.
    """

    kind: Kind
    task: str
    steps: int = 0
    rate: float = 2e-3
    rank: int = 0
    targets: tuple[str, ...] = ()
    layers: int = 0


MODELS: dict[str, FineTune] = {
    BASE: FineTune("alias", "base"),
    "lora-qv-4": FineTune("lora", "facts", 60, rank=4, targets=("q_proj", "v_proj")),
    "lora-all-8": FineTune("lora", "values", 60, rank=8, targets=ATTENTION + FFN),
    "lora-attention-16": FineTune("lora", "few-facts", 60, rank=16, targets=ATTENTION),
    "lora-ffn-8": FineTune("lora", "text", 60, rank=8, targets=FFN),
    "lora-all-16": FineTune("lora", "chains", 60, rank=16, targets=ATTENTION + FFN),
    "merged-all-4": FineTune("merged", "facts", 60, rank=4, targets=ATTENTION + FFN),
    "merged-all-8": FineTune("merged", "chains", 60, rank=8, targets=ATTENTION + FFN),
    "merged-attention-16": FineTune("merged", "values", 60, rank=16, targets=ATTENTION),
    "merged-qv-32": FineTune("merged", "few-facts", 60, rank=32, targets=("q_proj", "v_proj")),
    "merged-ffn-8": FineTune("merged", "copies", 60, rank=8, targets=FFN),
    "last-1-facts": FineTune("layers", "facts", 80, 1e-3, layers=1),
    "last-1-text": FineTune("layers", "text", 80, 1e-3, layers=1),
    "last-2-values": FineTune("layers", "values", 80, 1e-3, layers=2),
    "last-2-chains": FineTune("layers", "chains", 80, 1e-3, layers=2),
    "light-facts": FineTune("light", "facts", 30, 1e-5),
    "light-values": FineTune("light", "values", 30, 1e-5),
    "light-text": FineTune("light", "text", 30, 1e-5),
    "last-2-values-again": FineTune("alias", "last-2-values"),
    "unrelated": FineTune("unrelated", "both", 150, 2e-3),
}


@dataclass(frozen=True, slots=True)
class FineTunes:
    """The twenty folders under `path`, and the demo base beside them."""

    path: Path

    @property
    def names(self) -> list[str]:
        """Model names, the base's alias first."""
        return list(MODELS)

    def folder(self, name: str) -> Path:
        """HF folder of a checkpoint, PEFT folder of a LoRA."""
        return self.path / name

    def source(self, name: str) -> str:
        """As zoo-compile takes it: a LoRA names its base."""
        return f"{self.folder(name)}@{BASE}" if MODELS[name].kind == "lora" else str(self.folder(name))

    def of_kind(self, *kinds: Kind) -> list[str]:
        """Names of the models of these kinds."""
        return [name for name, tuned in MODELS.items() if tuned.kind in kinds]

    def complete(self) -> bool:
        """Whether every folder is there."""
        return all(self.folder(name).exists() for name in MODELS)


def make_finetunes(path: Path, steps_scale: float = 1.0) -> FineTunes:
    """Make the folders that `path` does not hold yet; `steps_scale` shortens every training (for tests)."""
    made = FineTunes(path)
    base = assemble(path / "demo")["base"]
    batches: _Batches | None = None
    for name, tuned in MODELS.items():
        if made.folder(name).exists():
            continue
        if tuned.kind == "alias":
            source = base if tuned.task == "base" else made.folder(tuned.task)
            make: Callable[[Path], None] = partial(_write_sharded, source)
        else:
            batches = batches or _Batches(base)
            steps = max(2, round(tuned.steps * steps_scale))  # the rate of the first is next to none
            make = partial(_train, base, tuned, steps, batches)
        made_once(made.folder(name), make)
    return made


# ---- training


class _Batches:
    """Rows of every task, drawn from the demo's generators and the standard library's sources."""

    def __init__(self, base: Path) -> None:
        from tokenizers import Tokenizer

        from blockzoo.zoo.demo.train import tokens_of_standard_library

        self._tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self._text = tokens_of_standard_library(self._tokenizer, TEXT_BYTES)

    def draw(self, task: str, num_batches: int, seed: str) -> Iterator[Any]:
        """Batches of about BATCH_TOKENS tokens, the same for the same seed."""
        from blockzoo.zoo.demo.corpus import RowMaker

        stage, mixture = _TASKS[task]
        rows = RowMaker(self._tokenizer, self._text, stage)
        rng = random.Random(seed)
        for _ in range(num_batches):
            yield rows.batch(rng, mixture, max(1, BATCH_TOKENS // mixture.length))


def _train(base: Path, tuned: FineTune, steps: int, batches: _Batches, folder: Path) -> None:
    import torch

    from blockzoo.zoo.demo.train import learning_rate, make_optimizer, weighted_loss

    torch.manual_seed(steps)
    model = _trainable(base, tuned)
    optimizer = make_optimizer(model)
    losses = []
    for step, batch in enumerate(batches.draw(tuned.task, steps, folder.name)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(tuned.rate, step / steps)
        loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    few = max(1, steps // 10)
    begin, end = np.mean(losses[:few]), np.mean(losses[-few:])
    name = folder.name.removesuffix(".unfinished")
    print(f"{name}: {steps} steps, loss {begin:.3f} -> {end:.3f}", flush=True)
    _save(base, model, tuned, folder)


def _trainable(base: Path, tuned: FineTune) -> torch.nn.Module:
    """A float32 model with just what the fine-tune trains set to be trained."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    if tuned.kind == "unrelated":
        return LlamaForCausalLM(LlamaConfig.from_pretrained(base)).float()
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tuned.rank:
        settings = {"r": tuned.rank, "lora_alpha": 2 * tuned.rank, "target_modules": list(tuned.targets)}
        return get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    if tuned.layers:
        model.requires_grad_(False)
        model.model.layers[-tuned.layers :].requires_grad_(True)
    return model


def _save(base: Path, model: torch.nn.Module, tuned: FineTune, folder: Path) -> None:
    """A PEFT folder in f32, or an HF folder in bf16 with the base's tokenizer."""
    import torch

    if tuned.kind == "lora":
        model.peft_config["default"].base_model_name_or_path = BASE
        model.save_pretrained(folder)
        return
    if tuned.kind == "merged":
        model = model.merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TEXT_FILES:
        if not (folder / name).exists():
            shutil.copyfile(base / name, folder / name)


def _write_sharded(source: Path, folder: Path) -> None:
    """The same weights in two files, the tensors in reverse order."""
    for name in TEXT_FILES:
        shutil.copyfile(source / name, folder / name)
    tensors = read_tensors(source / "model.safetensors")
    names = list(reversed(tensors))
    weight_map: dict[str, str] = {}
    for shard, held in enumerate((names[::2], names[1::2])):
        file_name = f"model-{shard + 1:05}-of-00002.safetensors"
        write_tensors(folder / file_name, {name: tensors[name] for name in held})
        weight_map |= dict.fromkeys(held, file_name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="share of the usual training steps")
    args = parser.parse_args()
    made = make_finetunes(args.folder, args.steps_scale)
    print(f"{len(made.names)} models in {made.path}")


if __name__ == "__main__":
    main()
