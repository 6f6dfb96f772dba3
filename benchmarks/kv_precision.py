"""What K and V in 8 bits and in f16 cost and save: equal top tokens, KL, bytes a token, time of decode steps.

    python -m benchmarks.kv_precision [--models base sql] [--contexts 512 4096] [--decode-at 4096]

Quality: behind so many tokens of text each model says 64 more, greedily in f32. Over its last 256 positions,
these included, every side is compared with f32 throughout, tokens given: K and V rounded to bf16 (a page as
soon as it is full, all else in f32), K and V in f16 and in 8 bits (all else in f32), and everything in bf16,
which is zoo-compile's yardstick: a forward of the original files that rounds as engines in bf16 do. ZOO is of
the SmolLM2 family and --family the folders that it was compiled from; without them both are made.

Speed: an attention layer decodes 32 rows at --decode-at tokens, with the heads of the shape and with a KV
head for each of them. What it reads is many times the size of the processor's caches. Sides take turns;
ratios are of processor seconds with one thread, which others on the machine disturb less than time passed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Samples, arguments, interleave, machine_facts, print_table, save_report
from benchmarks.families import SHAPES, Shape
from blockzoo.build.likeness import divergence, log_probabilities
from blockzoo.build.originals import oracle_for
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.sources import open_sources
from blockzoo.build.yardstick import Bf16Oracle
from blockzoo.engines.base import PAGE_TOKENS, Precision
from blockzoo.engines.kv_pages import KVPrecision, pack_u8, page_bytes
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.blocks import AttnSpec, Block, tensor_shapes
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.tensors import BlockTensor, bf16_to_f32, f32_to_bf16

SAID = 64  # tokens of an answer
POSITIONS = 256
ROWS = 32
TEXTS = ("docs/serving.md", "docs/openai.md", "docs/benchmarks.md", "docs/reliability.md")
"""Of this repository: none of it is in anybody's training data."""


def main() -> None:
    """Print and keep the tables."""
    args = _parser().parse_args()
    machine, results = machine_facts(), {}
    if args.quality:
        with tempfile.TemporaryDirectory() as folder:
            results["quality"] = _quality(args, Path(folder))
    results["bytes a token and layer"] = {
        f"{heads} KV heads of {dim}": {
            kv: page_bytes(heads, dim, kv) / PAGE_TOKENS for kv in ("f32", "bf16", "f16", "u8")
        }
        for heads, dim in ((4, 64), (8, 128))
    }
    results["decode"] = _speed(args)
    print(save_report("kv_precision", args, machine, results))


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__ or "", shape="110m", repeats=9)
    parser.add_argument("--zoo", help="of the SmolLM2 family")
    parser.add_argument("--family", help="the folders it was compiled from")
    parser.add_argument("--models", nargs="+", default=["base", "sql", "label", "minutes"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--decode-at", type=int, default=4096, help="tokens of context, timed (4096)")
    parser.add_argument("--no-quality", dest="quality", action="store_false", help="only time steps")
    return parser


# ---- quality


def _quality(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    family = Path(args.family or folder / "family")
    if args.family is None:
        from benchmarks.smollm2_family.assemble import assemble

        assemble(family)
    given = {name: _source(family, name) for name in dict.fromkeys(("base", *args.models))}
    path = Path(args.zoo or folder / "zoo")
    if args.zoo is None:
        compile_models(given, path, CompileOptions(verify=False, profile=False, threads=args.threads))
    zoo, results = Zoo.open(path), {}
    for name in args.models:
        for context in args.contexts:
            found = _compared(zoo, given, name, context, args.threads)
            results[f"{name}, {context} tokens"] = found
            print(f"{name}, {context} tokens: {found}", flush=True)
    print_table(
        f"against f32 throughout, over {POSITIONS} positions",
        ("", "", "equal top tokens", "of its answer", "KL"),
        [
            (case, side, f"{r['top1']:.1%}", f"{r['answer']:.1%}", f"{r['kl']:.2e}")
            for case, sides in results.items()
            for side, r in sides.items()
        ],
    )
    return results


def _source(family: Path, name: str) -> str:
    is_adapter = (family / name / "adapter_config.json").exists()
    return f"{family / name}@base" if is_adapter else str(family / name)


def _compared(
    zoo: Zoo, given: dict[str, str], name: str, context: int, threads: int | None
) -> dict[str, Any]:
    record = zoo.manifest.models[name]
    blocks = [zoo.read_block(key) for key in record.chain]
    adapters = {at: zoo.read_adapter(key) for at, key in record.adapters.items()}
    longest = context + SAID
    plain = OpenVINOEngines("f32", threads)
    halved = OpenVINOEngines("f32", threads, kv_precision="f16")
    packed = OpenVINOEngines("f32", threads, kv_precision="u8")

    def chain(maker: OpenVINOEngines) -> ProbeChain:
        return ProbeChain(maker, blocks, record.config, longest, adapters)

    probe = chain(plain)
    tokens = _text(zoo, name, context)
    rows = [_last(probe, tokens)]
    for _ in range(SAID):
        tokens.append(int(rows[-1][-1].argmax()))
        rows.append(probe.forward(tokens[-1:], len(tokens) - 1))
    sides: dict[str, Callable[[], np.ndarray]] = {
        "K and V in bf16": lambda: _last(chain(plain), tokens, partial(_to_bf16, record.config.num_layers)),
        "K and V in f16": lambda: _last(chain(halved), tokens),
        "K and V in 8 bits": lambda: _last(chain(packed), tokens),
        "all in bf16": lambda: _oracle(given, name, tokens),
    }
    exact = log_probabilities(np.concatenate(rows)[-POSITIONS:])
    del probe, rows
    results = {}
    for side, logits in sides.items():
        theirs = log_probabilities(logits().copy())
        same = exact.argmax(1) == theirs.argmax(1)
        results[side] = {
            "top1": float(same.mean()),
            "answer": float(same[-SAID - 1 : -1].mean()),
            "kl": divergence([exact], [theirs]),
        }
    return results


def _text(zoo: Zoo, name: str, count: int) -> list[int]:
    tokenizer = Tokenizer.load(zoo.tokenizer_dir(name))
    text = "\n\n".join(Path(file).read_text() for file in TEXTS)
    return list(tokenizer.encode(text))[:count]


def _last(
    probe: ProbeChain,
    tokens: Sequence[int],
    after: Callable[[ProbeChain, int], None] = lambda probe, end: None,
) -> np.ndarray:
    """Logits of the last POSITIONS tokens; the chain runs a page at a time, `after` each."""
    kept: list[np.ndarray] = []
    for begin in range(0, len(tokens), PAGE_TOKENS):
        end = min(len(tokens), begin + PAGE_TOKENS)
        logits = probe.forward(tokens[begin:end], begin)
        after(probe, end)
        if end > len(tokens) - POSITIONS:
            kept.append(logits)
    return np.concatenate(kept)[-POSITIONS:]


def _to_bf16(num_layers: int, probe: ProbeChain, end: int) -> None:
    """Round the page that ends at a token, in all layers."""
    for kv in probe.pages:
        pages = kv.reshape(num_layers, -1, *kv.shape[1:])[:, (end - 1) // PAGE_TOKENS]
        pages[...] = bf16_to_f32(f32_to_bf16(pages))


def _oracle(given: dict[str, str], name: str, tokens: Sequence[int]) -> np.ndarray:
    names = ["base", name] if "@" in given[name] else [name]
    source = open_sources({key: given[key] for key in names}, Zoo(Path("none"), Manifest()))[-1]
    exact = oracle_for(source, True, None)
    return Bf16Oracle(exact.config, exact.weight, exact.dtype).logits([tokens], POSITIONS)[0]


# ---- speed


class _Layer:
    """An attention layer of a shape that decodes ROWS sequences of `context` tokens."""

    def __init__(self, maker: OpenVINOEngines, shape: Shape, context: int) -> None:
        block = _attention(shape, context + 64)
        self._engine = engine = maker.span([block])
        per_row = -(-(context + 64) // PAGE_TOKENS)
        rng = np.random.default_rng(0)
        for name in ("key_cache", "value_cache"):
            pages = maker.arrays.pages(ROWS * per_row, shape.num_kv_heads, shape.head_dim)
            values = rng.standard_normal((64, *pages.shape[1:3], shape.head_dim), dtype=np.float32)
            filled = pack_u8(values) if pages.dtype == np.uint8 else maker.arrays.activations(values)
            for begin in range(0, len(pages), len(filled)):
                pages[begin : begin + len(filled)] = filled[: len(pages) - begin]
            engine.bind(name, pages)
        spec = block.spec
        assert isinstance(spec, AttnSpec)
        cos, sin = (table[context] for table in spec.rope.tables(shape.head_dim, context + 1))
        for name, row in (("cos", cos), ("sin", sin)):
            engine.bind(name, np.tile(row, (ROWS, 1, 1, 1)))
        hidden = rng.standard_normal((ROWS, shape.hidden_size), dtype=np.float32)
        bound = {
            "hidden": maker.arrays.activations(hidden),
            "hidden_out": maker.arrays.zeros(hidden.shape, "activation"),
            "past_lens": np.full(ROWS, context, np.int32),
            "subsequence_begins": np.arange(ROWS + 1, dtype=np.int32),
            "block_indices_begins": np.arange(ROWS + 1, dtype=np.int32) * np.int32(per_row),
            "block_indices.0": rng.permutation(ROWS * per_row).astype(np.int32),
            "max_context_len": np.array(context + 1, np.int32),
        }
        for name, array in bound.items():
            engine.bind(name, array)
        self.run()

    def run(self) -> float:
        """Processor seconds of a run."""
        before = time.process_time()
        self._engine.run()
        return time.process_time() - before


def _attention(shape: Shape, longest: int) -> Block:
    rng = np.random.default_rng(1)
    rope = RopeConfig(rope_type="default", theta=shape.rope_theta)
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    spec = AttnSpec(shape.hidden_size, heads, kv_heads, dim, shape.rms_norm_eps, rope, 0, False, False, False)
    return Block(
        f"attention for {longest} tokens",
        spec,
        {
            name: BlockTensor("f32", (rng.standard_normal(s) / np.sqrt(s[-1])).astype(np.float32))
            for name, s in tensor_shapes(spec).items()
        },
    )


def _speed(args: argparse.Namespace) -> dict[str, Any]:
    context, shape = args.decode_at, SHAPES[args.shape]
    shapes = {
        f"{shape.num_heads} heads over {shape.num_kv_heads}": shape,
        f"{shape.num_heads} heads over {shape.num_heads}": replace(shape, num_kv_heads=shape.num_heads),
    }
    precision = OpenVINOEngines(args.precision).precision
    kinds: list[tuple[Precision, KVPrecision]] = [(precision, precision), (precision, "u8"), ("f32", "f16")]
    kinds += [("f32", "u8")] if precision != "f32" else []
    results: dict[str, Any] = {}
    for case, each in shapes.items():
        sides = {
            f"K and V in {kv}, all else in {rest}": _Layer(
                OpenVINOEngines(rest, 1, kv_precision=kv), each, context
            )
            for rest, kv in kinds
        }
        taken = interleave({name: partial(_times, side) for name, side in sides.items()}, args.repeats)
        first: Samples = next(iter(taken.values()))
        results[case] = {name: t.summary() | t.ratio_to(first) for name, t in taken.items()}
    print_table(
        f"one attention layer, {ROWS} rows at {context} tokens, processor seconds of one thread",
        ("", "", "median ms", "p10", "p90", "ratio"),
        [
            (case, side, r["median_ms"], r["p10_ms"], r["p90_ms"], r["ratio"])
            for case, of_sides in results.items()
            for side, r in of_sides.items()
        ],
    )
    return results


def _times(layer: _Layer) -> list[float]:
    return [layer.run() for _ in range(3)]


if __name__ == "__main__":
    main()
