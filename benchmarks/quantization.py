"""What quantized weights cost a real model: SmolLM2-135M-Instruct in bf16, int8, int4 and auto.

    python -m benchmarks.quantization [--weights int8 int4 auto] [--max-kl 0.02] [--texts 0] [--dtype bf16]

The file is in Q4_1, a grid that int4 and auto keep. With --dtype bf16 its values are rounded to bf16 first,
which leaves none, as in most checkpoints: what is measured then is rounding. Every side follows the answers
that the f32 model gives greedily to chats, token by token: how often its own likeliest token is that of the
f32 model, and how far its distributions are (KL, in nats). Bytes are those of the model's blocks in the zoo.
Nothing is timed. With --texts 0 matrices are rounded to nearest. Activations in 8 bits are rounded by
nodes of the graph where the CPU has no VNNI.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, machine_facts, print_table, save_report
from benchmarks.smollm2 import NotAvailableError, smollm2
from blockzoo.build.calibration import NUM_TEXTS
from blockzoo.build.likeness import divergence, log_probabilities, perplexity
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.quantized_models import MAX_KL, MIN_TOP1
from blockzoo.engines.base import EngineError, EngineMaker
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.openvino.engine import multiplies_int8, rounding_engines
from blockzoo.engines.probe import ProbeChain
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.packing import GROUPS, WHOLE_ROW
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.summary import model_bytes

ASKED = (
    *("What is the capital of France?", "Write a haiku about the sea.", "Explain gravity to a child."),
    *("List three prime numbers.", "Who wrote Hamlet?", "Translate 'good morning' into Spanish."),
    *("What is 17 times 3?", "Name a colour of the rainbow.", "How do plants make food?", "Tell me a joke."),
    *("Give me three tips for sleeping well.", "Write a Python function that reverses a string."),
    *("What is the difference between a virus and a bacterium?", "Summarize the story of Cinderella."),
    *("Why is the sky blue?", "How do I boil an egg?", "Write an email asking for a day off."),
    *("What are the benefits of exercise?", "Describe a sunset in two sentences."),
    *("How does a computer store numbers?", "What should I pack for a trip to the mountains?"),
    *("Explain what a database index is.", "Who was Marie Curie?", "Write the first lines of a fairy tale."),
)
MODEL = "chat"
NUM_TOKENS = 48
"""Of an answer, at most."""


def main() -> None:
    """Print and keep the table."""
    args = _parser().parse_args()
    try:
        file = smollm2()
    except NotAvailableError as error:
        raise SystemExit(f"error: {error}") from None
    machine = machine_facts()
    given = _zoo(args, file, "given")
    answers = _answers(args, given)
    reference = _log_probabilities(given, OpenVINOEngines("f32", args.threads), answers)
    results: dict[str, Any] = {}
    for weights in ("bf16", *args.weights):
        zoo = _zoo(args, file, weights)
        record = zoo.manifest.models[MODEL]
        for how, maker in _makers(args, weights).items():
            theirs = _log_probabilities(zoo, maker, answers)
            same = [a.argmax(axis=1) == b.argmax(axis=1) for a, b in zip(reference, theirs, strict=True)]
            tokens = [list(answer[start - 1 :]) for start, answer in answers]
            results[f"{weights}, {how}"] = {
                "agreement": float(np.concatenate(same).mean()),
                "kl": divergence(reference, theirs),
                "perplexity": perplexity(tokens, theirs),
                "bytes": model_bytes(zoo.manifest, record),
                "blocks": _counted(zoo),
            }
            print(f"{weights}, {how}: {results[f'{weights}, {how}']}", flush=True)
    num_tokens = sum(map(len, reference))
    print_table(
        f"along {num_tokens} tokens of f32's answers to {len(answers)} chats",
        ("weights, computed in", "equal top tokens", "KL", "perplexity", "MB", "blocks"),
        [
            (name, f"{r['agreement']:.2%}", f"{r['kl']:.5f}", r["perplexity"], r["bytes"] / 1e6, r["blocks"])
            for name, r in results.items()
        ],
    )
    print(save_report(_report(args), args, machine, {"num_tokens": num_tokens, "sides": results}))


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__ or "", shape="smollm2", repeats=1)
    parser.add_argument(
        "--weights", nargs="+", choices=("int8", "int4", "auto"), default=["int8", "int4", "auto"]
    )
    parser.add_argument("--max-kl", type=float, default=MAX_KL["auto"], help=f"of auto ({MAX_KL['auto']})")
    parser.add_argument(
        "--min-top1", type=float, default=MIN_TOP1, help=f"of auto ({MIN_TOP1}; 0: divergence alone bounds)"
    )
    parser.add_argument(
        "--texts", type=int, default=NUM_TEXTS, help=f"of its own that rounding looks at ({NUM_TEXTS})"
    )
    parser.add_argument(
        "--group-size", type=int, choices=(WHOLE_ROW, *sorted(GROUPS)), help="0: a row (default: as it bears)"
    )
    parser.add_argument("--dtype", choices=("bf16",), help="that weights are converted to first (none)")
    parser.add_argument("--max-tokens", type=int, default=NUM_TOKENS, help=f"of an answer ({NUM_TOKENS})")
    parser.add_argument("--chats", type=int, default=len(ASKED), help=f"how many of them (all {len(ASKED)})")
    return parser


def _how(args: argparse.Namespace) -> str:
    given = f"-from-{args.dtype}" if args.dtype else ""
    given += "" if args.group_size is None else f"-groups-of-{args.group_size}"
    return given if args.texts == NUM_TEXTS else f"{given}-{args.texts}-texts"


def _report(args: argparse.Namespace) -> str:
    bounds = (args.max_kl, args.min_top1)
    bound = _bounds(args) if "auto" in args.weights and bounds != (MAX_KL["auto"], MIN_TOP1) else ""
    length = "" if args.max_tokens == NUM_TOKENS else f"-{args.max_tokens}-tokens"
    alone = "-auto" if args.weights == ["auto"] and not bound else ""
    return f"quantization{_how(args)}{alone}{bound}{length}"


def _bounds(args: argparse.Namespace) -> str:
    return f"-{args.max_kl:g}-{args.min_top1:g}"


def _zoo(args: argparse.Namespace, file: Path, weights: str) -> Zoo:
    """The model's zoo in `weights`, compiled where it is not there yet."""
    how = _bounds(args) if weights == "auto" else ""
    how += _how(args) if weights in ("int8", "int4", "auto") else ""
    path = args.workdir / f"quantization-{weights}{how}"
    options = CompileOptions(
        dtype="bf16" if weights == "bf16" else None if weights == "given" else args.dtype,
        weights=weights if weights in ("int8", "int4", "auto") else None,  # type: ignore[arg-type]
        max_kl=args.max_kl if weights == "auto" else None,
        min_top1=args.min_top1 if weights == "auto" else None,
        verify=False,
        profile=False,
        threads=args.threads,
        calibration_texts=args.texts,
        group_size=args.group_size if weights != "auto" else None,
    )
    compile_models({MODEL: file}, path, options)
    return Zoo.open(path)


def _makers(args: argparse.Namespace, weights: str) -> dict[str, EngineMaker]:
    """By what a zoo is computed in here."""
    makers: dict[str, EngineMaker] = {"f32": OpenVINOEngines("f32", args.threads)}
    try:
        makers["bf16"] = OpenVINOEngines("bf16", args.threads)
    except EngineError as error:
        print(f"bf16 is left out: {error}")
    if weights != "bf16":
        how = "int8 activations" if multiplies_int8() else "int8 activations, in the graph"
        makers[how] = rounding_engines(args.threads)
    return makers


def _answers(args: argparse.Namespace, zoo: Zoo) -> list[tuple[int, tuple[int, ...]]]:
    """Of each chat: where its answer begins, and all token ids."""
    llm = LLM(zoo.path, precision="f32", num_threads=args.threads, kv_cache_bytes=512 << 20)
    tokenizer = llm.engine.tokenizer(MODEL)
    template = tokenizer.chat_template_of(MODEL)
    texts = [template.render([{"role": "user", "content": text}]) for text in ASKED[: args.chats]]
    prompts = [tokenizer.encode(text) for text in texts]
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.0)
    done = llm.generate(MODEL, prompts, params, progress=False)
    return [(len(ids), (*ids, *d.token_ids)) for ids, d in zip(prompts, done, strict=True)]


def _log_probabilities(
    zoo: Zoo, maker: EngineMaker, answers: Sequence[tuple[int, tuple[int, ...]]]
) -> list[np.ndarray]:
    """Of each answer, at the positions that chose its tokens, float32 [tokens, vocab]."""
    record = zoo.manifest.models[MODEL]
    blocks = [zoo.read_block(key) for key in record.chain]
    chain = ProbeChain(maker, blocks, record.config, max(len(tokens) for _, tokens in answers))
    return [log_probabilities(chain.forward(tokens[:-1], 0)[start - 1 :].copy()) for start, tokens in answers]


def _counted(zoo: Zoo) -> str:
    dtypes = [zoo.manifest.blocks[key].dtype for key in zoo.manifest.models[MODEL].chain]
    return ", ".join(f"{dtypes.count(dtype)} {dtype}" for dtype in sorted(set(dtypes)))


if __name__ == "__main__":
    main()
