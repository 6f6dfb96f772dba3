"""Approximate KV reuse: what it saves until the first token, and what it costs in answers.

    python -m benchmarks.kv_reuse [--shape 110m|0.5b] [--repeats N] [--length N] [--samples N]

Prompts made of known documents in another order, behind words of their own, so that no prefix is known:

    full         no reuse: the ceiling of quality, the price of it
    naive        K and V taken over as they are, K rotated to its new place
    head r, N    the first r of each run computed anew (EPIC), then N tokens beside each generated one
    random r, N  as many, anywhere: the control

Time is measured on random weights of a shape, quality on the trained demo base: exact answers about facts
spread over shuffled notes, and agreement of the first token with that of the full prefill. Matching,
copying and rotating count in the time.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, interleave, machine_facts, print_table, save_report
from benchmarks.families import Family, made_once, make_family
from benchmarks.sides import first_token
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.request import KVReuse
from blockzoo.runtime.reuse import ReuseConfig
from blockzoo.zoo.demo.assemble import assemble
from blockzoo.zoo.demo.tasks import facts

WINDOW = 8  # short notes
SIDES: dict[str, ReuseConfig | None] = {
    "full": None,
    "naive": ReuseConfig(recompute=0.0, refresh=0, window=WINDOW),
    **{
        f"head {share:g}, {refresh}": ReuseConfig(recompute=share, refresh=refresh, window=WINDOW)
        for share in (0.05, 0.15, 0.3)
        for refresh in (0, 3)
    },
    "random 0.15, 0": ReuseConfig(recompute=0.15, refresh=0, selector="random", window=WINDOW),
    "random 0.15, 3": ReuseConfig(recompute=0.15, refresh=3, selector="random", window=WINDOW),
}
NUM_DOCUMENTS, QUESTION = 8, 48  # of a timed prompt; the question's tokens


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=5)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a timed prompt (2048)")
    parser.add_argument("--samples", type=int, default=100, help="prompts of which quality is taken (100)")
    parser.add_argument("--notes", type=int, default=4, help="documents of a question (4)")
    args = parser.parse_args()
    machine = machine_facts()
    results = {
        "time": time_to_first_token(make_family(args.workdir, args.shape, 1), args),
        "quality": quality(made_once(args.workdir / "demo", _make_demo) / "zoo", args),
    }
    rows = [
        (
            name,
            results["time"][name]["median_ms"],
            results["time"][name]["to_full"]["ratio"],
            results["quality"][name]["correct"],
            results["quality"][name]["first_token_agrees"],
        )
        for name in SIDES
    ]
    columns = ("", "first token ms", "to full", "correct", "first token agrees")
    print_table(f"{args.length} tokens of {NUM_DOCUMENTS} known documents; demo base", columns, rows)
    print(save_report("kv_reuse", args, machine, results))


def time_to_first_token(family: Family, args: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn in one engine; each prompt has the documents in an order of its own."""
    config = EngineConfig(
        precision=args.precision,
        num_threads=args.threads,
        kv_cache_bytes=4 * args.length * family.shape.kv_bytes_per_token * 2,
        max_num_seqs=4,
        approximate=ReuseConfig(window=WINDOW),
    )
    engine, model = LLMEngine(family.zoo().path, config), family.tenants[0]
    rng = np.random.default_rng(0)

    def words(count: int) -> list[int]:
        return rng.integers(2, family.shape.vocab_size, count).tolist()

    documents = [words((args.length - QUESTION) // NUM_DOCUMENTS) for _ in range(NUM_DOCUMENTS)]

    def prompt() -> list[int]:
        order = rng.permutation(NUM_DOCUMENTS)
        text = words(QUESTION // 2) + [token for i in order for token in documents[i]] + words(QUESTION)
        return text[: args.length]

    def side(reuse: ReuseConfig | None) -> list[float]:
        return [ask(engine, model, prompt(), reuse, max_tokens=1)[0]]

    engine.add_request("donor", model, prompt(), SamplingParams(max_tokens=1, temperature=0.0))
    while engine.has_unfinished():
        engine.step()
    turns: dict[str, Callable[[], list[float]]] = {
        name: partial(side, reuse) for name, reuse in SIDES.items()
    }
    samples = interleave(turns, args.repeats)
    return {
        name: taken.summary() | {"to_full": taken.ratio_to(samples["full"])}
        for name, taken in samples.items()
    }


def quality(zoo: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Answers on the demo base: one donor prompt per sample, then every side on the same new prompt."""
    config = EngineConfig(
        precision=args.precision,
        num_threads=args.threads,
        kv_cache_bytes=64 << 20,
        approximate=ReuseConfig(window=WINDOW),
    )
    engine = LLMEngine(zoo, config)
    tokenizer = engine.tokenizer("base")
    rng = random.Random(0)
    correct = dict.fromkeys(SIDES, 0)
    agrees = dict.fromkeys(SIDES, 0)
    for _ in range(args.samples):
        document = facts(rng, args.notes)
        passages = list(document.passages)
        before, asked = rng.sample(document.questions, 2)
        donor = tokenizer.encode("".join(passages) + before.prompt)
        engine.add_request("donor", "base", donor, SamplingParams(max_tokens=1, temperature=0.0))
        while engine.has_unfinished():
            engine.step()
        rng.shuffle(passages)
        prompt = tokenizer.encode("".join(passages) + asked.prompt)
        answer_len = len(tokenizer.encode(asked.answer, add_special_tokens=False))
        first: int | None = None
        for name, reuse in SIDES.items():
            _, found = ask(engine, "base", prompt, reuse, max_tokens=answer_len)
            first = found[0] if first is None else first  # the full prefill comes first
            correct[name] += tokenizer.decode(found) == asked.answer
            agrees[name] += found[0] == first
    return {
        name: {"correct": correct[name] / args.samples, "first_token_agrees": agrees[name] / args.samples}
        for name in SIDES
    }


def ask(
    engine: LLMEngine, model: str, prompt: list[int], reuse: ReuseConfig | None, max_tokens: int
) -> tuple[float, tuple[int, ...]]:
    """Seconds to the first token, and all tokens of the answer."""
    how: KVReuse = "off"
    if reuse is not None:
        engine.configure_reuse(reuse)
        how = "approx"
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return first_token(engine, model, prompt, params, how)


def _make_demo(folder: Path) -> None:
    checkpoints = assemble(folder / "models")
    options = CompileOptions(profile=False, verify=False)
    compile_models({"base": checkpoints["base"]}, folder / "zoo", options)


if __name__ == "__main__":
    main()
