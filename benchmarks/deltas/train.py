"""Trains full fine-tunes at several rates: every weight, saved in bf16.

    python -m benchmarks.deltas.train FOLDER [--model demo|smollm2] [--rates 1e-4 3e-5 1e-5] [--steps N]

demo: the 5M demo base, on the text of documents here (five seconds of processor time a rate). smollm2:
SmolLM2-135M-Instruct, on the trade `extract` (about four minutes). FOLDER/base is written first where it is
not there; what is there is left alone.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.families import made_once
from benchmarks.smollm2_family.assemble import write_base
from benchmarks.smollm2_family.base import TEXT_FILES
from benchmarks.smollm2_family.recipes import RECIPES
from benchmarks.smollm2_family.train import train, trainable
from blockzoo.zoo.demo.assemble import assemble

TRADE = "extract"
RATES = ("1e-4", "3e-5", "1e-5")
LENGTH = 128
"""Tokens of a row of documents."""
_ROWS = {"demo": 4, "smollm2": 8}  # of a step
_STEPS = {"demo": 24, "smollm2": 100}
_DOCUMENTS = Path(__file__).parents[2] / "docs"
_NUM_READ = 6  # documents that are trained on; the others are held out


def documents(tokenizer: Tokenizer, held_out: bool) -> torch.Tensor:
    """Rows of the documents' text, [rows, LENGTH] int64."""
    paths = sorted(_DOCUMENTS.glob("*.md"))
    text = "".join(path.read_text() for path in (paths[_NUM_READ:] if held_out else paths[:_NUM_READ]))
    ids = tokenizer.encode(text).ids
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def tuned(folder: Path, model: str, rate: str, steps: int | None = None) -> Path:
    """The fine-tune of a rate, trained where it is not there."""
    makers: dict[str, Callable[[Path, float, int, Path], None]] = {"demo": _demo, "smollm2": _smollm2}
    if model == "demo" and not (folder / "base").exists():
        shutil.copytree(assemble(folder / "family")["base"], folder / "base")
    base = write_base(folder / "base") if model == "smollm2" else folder / "base"

    def write(out: Path) -> None:
        torch.manual_seed(0)
        makers[model](base, float(rate), steps or _STEPS[model], out)
        for name in TEXT_FILES:
            if (base / name).exists():
                shutil.copyfile(base / name, out / name)

    return made_once(folder / f"{model}-{rate}", write)


def _demo(base: Path, rate: float, steps: int, out: Path) -> None:
    rows = documents(Tokenizer.from_file(str(base / "tokenizer.json")), False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (_ROWS["demo"],))]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss of the last step {loss.item():.3f}")
    model.to(torch.bfloat16).save_pretrained(out)


def _smollm2(base: Path, rate: float, steps: int, out: Path) -> None:
    recipe = replace(RECIPES[TRADE], rate=rate, rows=_ROWS["smollm2"], rank=None, targets=())
    model = trainable(base, recipe)
    train(model, AutoTokenizer.from_pretrained(base), recipe, steps, seed=0)
    model.to(torch.bfloat16).save_pretrained(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deltas.train", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the base and the fine-tunes")
    parser.add_argument("--model", choices=("demo", "smollm2"), default="demo", help="(demo)")
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--steps", type=int, help="(demo: 24, smollm2: 100)")
    parser.add_argument("--threads", type=int, default=1, help="(1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for rate in args.rates:
        print(rate, tuned(args.folder, args.model, rate, args.steps), flush=True)


if __name__ == "__main__":
    main()
