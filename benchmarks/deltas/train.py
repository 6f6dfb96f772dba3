"""Trains the full fine-tunes: one trade at several rates, every weight, saved in bf16.

    python -m benchmarks.deltas.train FOLDER [--rates 1e-4 3e-5 1e-5] [--steps 100]

FOLDER/base is written first where it is not there; what is there is left alone. Takes about four minutes of
processor time a rate.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.families import made_once
from benchmarks.smollm2_family.assemble import write_base
from benchmarks.smollm2_family.base import TEXT_FILES
from benchmarks.smollm2_family.recipes import RECIPES
from benchmarks.smollm2_family.train import train, trainable

TRADE = "extract"
RATES = ("1e-4", "3e-5", "1e-5")
ROWS = 8  # samples of a step: little memory


def tuned(folder: Path, rate: str, steps: int) -> Path:
    """The fine-tune of a rate, trained where it is not there."""
    base = write_base(folder / "base")
    recipe = replace(RECIPES[TRADE], rate=float(rate), rows=ROWS, rank=None, targets=())

    def write(out: Path) -> None:
        torch.manual_seed(0)
        model = trainable(base, recipe)
        train(model, AutoTokenizer.from_pretrained(base), recipe, steps, seed=0)
        model.to(torch.bfloat16).save_pretrained(out)
        for name in TEXT_FILES:
            shutil.copyfile(base / name, out / name)

    return made_once(folder / f"{TRADE}-{rate}", write)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deltas.train", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the base and the fine-tunes")
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--steps", type=int, default=100, help="(100)")
    parser.add_argument("--threads", type=int, default=1, help="(1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for rate in args.rates:
        print(rate, tuned(args.folder, rate, args.steps), flush=True)


if __name__ == "__main__":
    main()
