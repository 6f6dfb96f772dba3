"""Takes what train.py wrote into the weights folder that assemble.py reads.

`python -m blockzoo.zoo.demo.collect TRAINED WEIGHTS`
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

from .assemble import TEXT_FILES
from .compact import write_compact
from .tensors import read_tensors


def collect(trained: Path, weights: Path) -> None:
    """Keeps the base, the adapter, and of the solver just the tensors that differ from the base's."""
    (weights / "notes").mkdir(parents=True, exist_ok=True)
    for name in TEXT_FILES:
        content = (trained / "base" / name).read_bytes()
        if name == "tokenizer.json":
            (weights / f"{name}.xz").write_bytes(lzma.compress(content, preset=9))
        else:
            (weights / name).write_bytes(content)
    base = read_tensors(trained / "base" / "model.safetensors")
    solver = read_tensors(trained / "solver" / "model.safetensors")
    write_compact(weights / "base.planes", base)
    tuned = {name: tensor for name, tensor in solver.items() if (tensor != base[name]).any()}
    write_compact(weights / "solver.planes", tuned, reference=base)
    notes = read_tensors(trained / "notes" / "adapter_model.safetensors")
    write_compact(weights / "notes" / "adapter_model.planes", notes)
    config = json.loads((trained / "notes" / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set, saved in another order each time
    (weights / "notes" / "adapter_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m blockzoo.zoo.demo.collect", description=__doc__)
    parser.add_argument("trained", type=Path, help="--out of the training run")
    parser.add_argument("weights", type=Path, help="folder to write")
    args = parser.parse_args()
    collect(args.trained, args.weights)


if __name__ == "__main__":
    main()
