"""Takes what train.py wrote into the weights that assemble.py reads: differences to the base, in four bits.

    python -m benchmarks.smollm2_family.ship TRAINED WEIGHTS

A full fine-tune is kept as a LoRA too: of the difference of each projection the leading singular vectors.
What it changed in embeddings and norms is left behind; of tuned layers the norms are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from blockzoo.zoo.checkpoint import Checkpoint, open_checkpoint
from blockzoo.zoo.demo.tensors import read_tensors

from .packing import save_packed
from .recipes import ALL, RECIPES

EXTRACTED_RANK = 12  # of all layers
LAYERS_RANK = 16  # of a few: half of it loses a quarter of the answers of `label`


def ship(trained: Path, weights: Path, trade: str) -> Path:
    """Packs the fine-tune of one trade."""
    recipe = RECIPES[trade]
    path = weights / f"{trade}.planes"
    if recipe.rank is not None:
        config = json.loads((trained / trade / "adapter_config.json").read_text())
        save_packed(path, read_tensors(trained / trade / "adapter_model.safetensors"), _facts(config))
        return path
    changes = differences(open_checkpoint(trained / "base"), open_checkpoint(trained / trade))
    rank = EXTRACTED_RANK if recipe.last_layers is None else LAYERS_RANK
    kept = extracted(changes, rank)
    if recipe.last_layers is not None:
        kept |= {name: change for name, change in changes.items() if change.ndim == 1}
    save_packed(path, kept, _facts({"r": rank, "lora_alpha": rank, "target_modules": ALL}))
    return path


def _facts(config: Mapping[str, object]) -> dict[str, str]:
    lora = {key: config[key] for key in ("r", "lora_alpha")}
    return {"lora": json.dumps({**lora, "target_modules": sorted(config["target_modules"])})}  # type: ignore[call-overload]


def differences(base: Checkpoint, tuned: Checkpoint) -> dict[str, np.ndarray]:
    """What was tuned, by name: its change, f32."""
    found = {}
    for name in base.files:
        change = tuned.tensor(name).to_f32() - base.tensor(name).to_f32()
        if change.any():
            found[name] = change
    return found


def extracted(changes: Mapping[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """The LoRA of `rank` nearest to the changes of the projections, by PEFT's names."""
    pairs = {}
    for name, change in changes.items():
        if name.split(".")[-2] not in ALL:
            continue
        left, size, right = np.linalg.svd(change, full_matrices=False)
        root = np.sqrt(size[:rank])
        stem = "base_model.model." + name.removesuffix(".weight")
        pairs[f"{stem}.lora_A.weight"] = root[:, None] * right[:rank]
        pairs[f"{stem}.lora_B.weight"] = left[:, :rank] * root
    return pairs


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2_family.ship", description=__doc__)
    parser.add_argument("trained", type=Path, help="--out of the training runs")
    parser.add_argument("weights", type=Path, help="folder to write")
    parser.add_argument("--trades", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    args = parser.parse_args()
    args.weights.mkdir(parents=True, exist_ok=True)
    for trade in args.trades:
        path = ship(args.trained, args.weights, trade)
        print(f"{trade:8} {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
