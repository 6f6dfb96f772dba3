"""The held-out figures of the SmolLM2 family, asked of the runtime as it is shipped: base against fine-tune.

    python -m benchmarks.smollm2_family.evaluate [ZOO | --weights int8|int4|auto] [--tuned]

Every model gets the same prompt (the trade's system line and the sample's text, by the chat template),
answers greedily, and is judged by the same function. `base, told` has besides in its prompt what a fine-tune
learnt instead: the form of the answer, the rules of the house, the meanings of the codes. ZOO is one that has
`base`, such as `make demo` makes; all its models whose names begin with a trade's are asked, and so is a full
fine-tune that is compiled into it as `minutes-full`. Without it the family is assembled and compiled first,
in `--weights`. A zoo of quantized weights has a report of its own. --tuned leaves the base out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import machine_facts, print_table, save_report
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.store import Zoo

from . import samples
from .assemble import assemble
from .recipes import RECIPES

MEBIBYTE = 1 << 20


def answers(llm: LLM, model: str, asked: Sequence[samples.Sample], max_tokens: int) -> list[str]:
    """Greedy answers, all in one batch."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    chats = [sample.messages for sample in asked]
    return [completion.text for completion in llm.chat(model, chats, params, progress=False)]


def figures(llm: LLM, name: str, count: int, tuned: bool = False) -> dict[str, Any]:
    """Share of right answers of the base and of every model of a trade, and their first answers.

    `tuned`: without the base.
    """
    trade = RECIPES[name].trade
    asked = samples.held_out(trade, count)
    told = [replace(sample, system=sample.system + trade.RULES) for sample in asked]
    sides = {} if tuned else {"base": ("base", asked), "base, told": ("base", told)}
    sides |= {model: (model, asked) for model in llm.models if model.split("-")[0] == name}
    found: dict[str, Any] = {"prompt": asked[0].user, "right": {}, "first answer": {}}
    for side, (model, prompts) in sides.items():
        said = answers(llm, model, prompts, trade.MAX_NEW_TOKENS)
        judged = [trade.right(sample, answer) for sample, answer in zip(asked, said, strict=True)]
        found["right"][side] = round(sum(judged) / count, 4)
        found["first answer"][side] = said[0]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2_family.evaluate", description=__doc__)
    parser.add_argument("zoo", nargs="?", help="a zoo of the family")
    parser.add_argument("--samples", type=int, default=100, help="held-out samples of a trade (100)")
    parser.add_argument("--trades", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--tuned", action="store_true", help="the fine-tunes alone")
    parser.add_argument("--weights", choices=("int8", "int4", "auto"), help="of the family (as given)")
    parser.add_argument("--precision", choices=("f32", "bf16"), help="default: bf16 where the CPU has it")
    parser.add_argument("--int8-activations", action="store_true", default=None, help="also beside AMX")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the report")
    args = parser.parse_args(arguments)
    args.shape = "smollm2-135m"
    machine = machine_facts()
    with tempfile.TemporaryDirectory() as temporary:
        zoo = args.zoo or str(Path(temporary) / "zoo")
        if args.zoo is None:
            models = assemble(Path(temporary) / "models")
            compile_models(models, zoo, CompileOptions(verify=False, profile=False, weights=args.weights))
        quantized = Zoo.open(zoo).manifest.models["base"].quantization
        args.weights = quantized.weights if quantized is not None else None
        llm = LLM(
            zoo,
            precision=args.precision,
            int8_activations=args.int8_activations,
            kv_cache_bytes=512 * MEBIBYTE,
        )
        del args.zoo  # where it lay is nobody's business
        results: dict[str, Any] = {}
        for name in args.trades:
            results[name] = figures(llm, name, args.samples, args.tuned)
            _show(name, results[name])
            path = save_report("smollm2_family", args, machine, results)  # as it grows: it takes minutes
    print(path)


def _show(name: str, found: dict[str, Any]) -> None:
    rows = [
        (side, f"{right:.1%}", found["first answer"][side].replace("\n", "\\n")[:90])
        for side, right in found["right"].items()
    ]
    print_table(f"{name}: {found['prompt']!r}", ("asked", "right", "first answer"), rows)


if __name__ == "__main__":
    main()
