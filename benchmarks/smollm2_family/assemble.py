"""Writes the SmolLM2 family as Hugging Face folders, from the base's GGUF file and the weights kept here.

    python -m benchmarks.smollm2_family OUT_DIR

Kept is only what differs from the base, in four bits: the LoRAs, of which `label` becomes layers of its own.
Needs numpy, safetensors and the package gguf; no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.smollm2 import smollm2
from blockzoo.zoo.demo.assemble import by_target, merged, write_folder, write_sharded_tensors
from blockzoo.zoo.demo.tensors import write_tensors
from blockzoo.zoo.tensors import bf16_to_f32, f32_to_bf16

from .base import Base, read_base
from .packing import load_packed

WEIGHTS = Path(__file__).parent / "weights"
ADAPTERS = ("extract", "sql", "support", "minutes")
FAMILY = ("base", "base-sharded", "extract", "extract-merged", "sql", "support", "minutes", "label")


def assemble(
    out_dir: Path | str, names: Collection[str] = FAMILY, weights: Path = WEIGHTS
) -> dict[str, Path]:
    """Writes models of `FAMILY` into `out_dir`; returns the folders by name.

    Each folder appears complete or not at all. One that is there already is left as it is when its content is
    right; raises FileExistsError when it holds anything else, NotAvailableError when there is no base.
    """
    base = read_base(smollm2())
    writers: dict[str, Callable[[Path], None]] = {
        "base": lambda folder: _write_full(folder, base, base.tensors),
        "base-sharded": lambda folder: _write_sharded(folder, base),
        "label": lambda folder: _write_full(folder, base, changed(base, weights / "label.planes")),
        "extract-merged": lambda folder: _write_full(
            folder, base, _with_adapter(base, weights / "extract.planes")
        ),
    }
    for name in ADAPTERS:
        writers[name] = partial(write_adapter, packed=weights / f"{name}.planes")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    return {name: write_folder(out / name, writers[name]) for name in FAMILY if name in names}


def write_base(folder: Path) -> Path:
    """The base alone, where it is not there. Raises NotAvailableError."""
    if not folder.exists():
        assemble(folder.parent, ["base"])
    return folder


def write_adapter(folder: Path, packed: Path) -> None:
    """A PEFT folder of a packed LoRA, in f32."""
    pairs, facts = load_packed(packed)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "bias": "none",
    }
    config |= {"inference_mode": True, **json.loads(facts["lora"])}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tensors(folder / "adapter_model.safetensors", pairs)


def changed(base: Base, packed: Path) -> dict[str, np.ndarray]:
    """The base's tensors, those that the file has changed and rounded to bf16 once.

    By B A where it holds a pair; in f64, where sums of products of so few bits are exact in whatever order.
    """
    kept, _ = load_packed(packed)
    changes = {name: change for name, change in kept.items() if ".lora_" not in name}
    for target, lora_a, lora_b in by_target(kept):
        changes[target] = (lora_b.astype(np.float64) @ lora_a.astype(np.float64)).astype(np.float32)
    return base.tensors | {
        name: f32_to_bf16(bf16_to_f32(base.tensors[name]) + change) for name, change in changes.items()
    }


def _write_files(folder: Path, base: Base) -> None:
    for name, content in base.files.items():
        (folder / name).write_bytes(content)


def _write_full(folder: Path, base: Base, tensors: dict[str, np.ndarray]) -> None:
    _write_files(folder, base)
    write_tensors(folder / "model.safetensors", tensors)


def _write_sharded(folder: Path, base: Base) -> None:
    _write_files(folder, base)
    write_sharded_tensors(folder, base.tensors)


def _with_adapter(base: Base, packed: Path) -> dict[str, np.ndarray]:
    """The base's tensors with a packed LoRA merged into them."""
    pairs, facts = load_packed(packed)
    lora = json.loads(facts["lora"])
    return merged(base.tensors, pairs, lora["lora_alpha"] / lora["r"])
