"""Writes the demo family as Hugging Face folders from the weights that ship with the package.

Only what differs is stored, and that without loss as small as can be (`compact.py`): the base, the LoRA of
`notes`, and the two tuned layers of `solver` by their distance from the base's. The rest is put together here
with numpy alone, so that a machine without torch has models to try.
"""

from __future__ import annotations

import filecmp
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from blockzoo.zoo.tensors import bf16_to_f32, f32_to_bf16

from .compact import read_compact
from .tensors import write_tensors

WEIGHTS = Path(__file__).parent / "weights"
NUM_SHARDS = 3
# beside the tensors in every full checkpoint
TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def assemble(out_dir: Path | str, weights: Path = WEIGHTS) -> dict[str, Path]:
    """Writes base, notes, notes-merged, solver and base-sharded into `out_dir`; returns the folders by name.

    Each folder appears complete or not at all. One that is there already is left as it is when its content is
    right; raises FileExistsError when it holds anything else.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    base, _ = read_compact(weights / "base.planes")
    solver, _ = read_compact(weights / "solver.planes", base)
    notes, _ = read_compact(weights / "notes" / "adapter_model.planes")

    def full(tensors: dict[str, np.ndarray]) -> Callable[[Path], None]:
        return lambda folder: _write_checkpoint(folder, tensors, weights)

    writers: dict[str, Callable[[Path], None]] = {
        "base": full(base),
        "notes": lambda folder: _write_adapter(folder, notes, weights / "notes"),
        "notes-merged": full(_merged_notes(base, notes, weights / "notes")),
        "solver": full({**base, **solver}),
        "base-sharded": lambda folder: _write_sharded(folder, base, weights),
    }
    return {name: write_folder(out / name, writer) for name, writer in writers.items()}


def tokenizer_json(weights: Path = WEIGHTS) -> bytes:
    """The family's `tokenizer.json`."""
    return lzma.decompress((weights / "tokenizer.json.xz").read_bytes())


def write_folder(folder: Path, writer: Callable[[Path], None]) -> Path:
    """Lets `writer` fill a temporary folder beside `folder` and renames it there."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        writer(temporary)
        if not folder.exists():
            temporary.rename(folder)
        elif not _same_content(temporary, folder):
            raise FileExistsError(
                f"{folder} exists and is not what would be written there: remove it or choose another folder"
            )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _same_content(expected: Path, folder: Path) -> bool:
    names = sorted(os.listdir(expected))
    if not folder.is_dir() or sorted(os.listdir(folder)) != names:
        return False
    return not any(filecmp.cmpfiles(expected, folder, names, shallow=False)[1:])


def _write_text_files(folder: Path, weights: Path) -> None:
    for name in TEXT_FILES:
        if name == "tokenizer.json":
            (folder / name).write_bytes(tokenizer_json(weights))
        else:
            shutil.copyfile(weights / name, folder / name)


def _write_adapter(folder: Path, pairs: dict[str, np.ndarray], source: Path) -> None:
    shutil.copyfile(source / "adapter_config.json", folder / "adapter_config.json")
    write_tensors(folder / "adapter_model.safetensors", pairs)


def _write_checkpoint(folder: Path, tensors: dict[str, np.ndarray], weights: Path) -> None:
    _write_text_files(folder, weights)
    write_tensors(folder / "model.safetensors", tensors)


def _write_sharded(folder: Path, tensors: dict[str, np.ndarray], weights: Path) -> None:
    _write_text_files(folder, weights)
    write_sharded_tensors(folder, tensors)


def write_sharded_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """The tensors in reverse order over several files, with the index that names them."""
    names = list(reversed(tensors))
    weight_map: dict[str, str] = {}
    for shard in range(NUM_SHARDS):
        file_name = f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        held = names[shard * len(names) // NUM_SHARDS : (shard + 1) * len(names) // NUM_SHARDS]
        write_tensors(folder / file_name, {name: tensors[name] for name in held})
        weight_map |= dict.fromkeys(held, file_name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _merged_notes(
    base: dict[str, np.ndarray], pairs: dict[str, np.ndarray], source: Path
) -> dict[str, np.ndarray]:
    config = json.loads((source / "adapter_config.json").read_text())
    return merged(base, pairs, config["lora_alpha"] / config["r"])


def merged(base: dict[str, np.ndarray], pairs: dict[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """The base with W + scale B A wherever there is a pair by PEFT's names, summed in f32, rounded once."""
    tensors = dict(base)
    for target, lora_a, lora_b in by_target(pairs):
        change = np.float32(scale) * (lora_b @ lora_a)
        tensors[target] = f32_to_bf16(bf16_to_f32(base[target]) + change)
    return tensors


def by_target(pairs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Of pairs by PEFT's names the name of the weight that each changes, A and B."""
    for name, lora_a in pairs.items():
        if name.endswith(".lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            yield target, lora_a, pairs[name.replace(".lora_A.", ".lora_B.")]
