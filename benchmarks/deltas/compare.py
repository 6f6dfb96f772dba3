"""How near full fine-tunes stay to themselves as they are stored, for how many bytes.

    python -m benchmarks.deltas.compare FOLDER [--model demo|smollm2] [--samples 12] [--sides "rank 32" ...]

FOLDER is that of `benchmarks.deltas.train`. Every way to store a fine-tune follows held-out text: of the demo
model rows of documents, of SmolLM2 the answers that its f32 model gives greedily to samples of its trade. How
often is its own likeliest token that of the model in f32, and how far are its distributions (KL, in nats)?
Bytes are those of what is not the base's, over those of the model in bf16. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.common import machine_facts, print_table, save_report
from benchmarks.deltas import sides
from benchmarks.deltas.sides import Side, Stored
from benchmarks.deltas.train import RATES, TRADE, documents
from benchmarks.families import made_once
from benchmarks.smollm2_family import samples
from benchmarks.smollm2_family.recipes import RECIPES
from blockzoo.build.calibration import Met, calibrate
from blockzoo.build.likeness import divergence, log_probabilities
from blockzoo.build.low_rank import Factors, factors
from blockzoo.build.originals import oracle_for
from blockzoo.build.own_text import OwnText
from blockzoo.build.partition import chain_names
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.progress import ProgressPrinter
from blockzoo.build.sources import open_sources
from blockzoo.engines.base import Precision
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.adapter import LoraPair
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.tensors import TensorFile, write_tensor_file

RANKS = (8, 16, 32, 64, 96)
TEXTS = 24
"""Of its own that the inputs of matrices are summed up over."""


class Model:
    """One fine-tune and its base, in a zoo."""

    def __init__(self, folder: Path, model: str, rate: str, num_samples: int, threads: int | None) -> None:
        self.name, self._folder, self._threads = f"{model}-{rate}", folder, threads
        self._given = {"base": folder / "base", self.name: folder / self.name}
        self.zoo = self._compiled("exact", CompileOptions(share="exact"), ["base", self.name])
        models = self.zoo.manifest.models
        self.config = models[self.name].config
        self.tuned, self.base = (
            [self.zoo.read_block(key) for key in models[name].chain] for name in (self.name, "base")
        )
        self.answers = self._rows(num_samples) if model == "demo" else self._answered(num_samples)
        self.exact = self.log_probs("f32", sides.own(self.tuned))

    def _compiled(self, how: str, options: CompileOptions, models: Sequence[str]) -> Zoo:
        """The zoo of some models, compiled where it is not there."""
        options = replace(options, verify=False, profile=False, threads=self._threads)
        given, printer = {name: self._given[name] for name in models}, ProgressPrinter()

        def compile_all(path: Path) -> None:
            for model in compile_models(given, path, options, progress=printer).models:
                print(f"{how}: {model.name}: {'; '.join(model.notes)}", flush=True)

        return Zoo.open(made_once(self._folder / f"zoo-{self.name}-{how}", compile_all))

    def stored(self, how: str, options: CompileOptions, models: Sequence[str]) -> Stored:
        """As zoo-compile stores it."""
        zoo = self._compiled(how, options, models)
        record = zoo.manifest.models[self.name]
        shared = zoo.manifest.models["base"].chain if "base" in models else ()
        adapters = {at: zoo.read_adapter(key) for at, key in record.adapters.items()}
        own = sum(zoo.manifest.blocks[key].num_bytes for key in record.chain if key not in shared)
        own += sum(zoo.manifest.adapters[key].num_bytes for key in record.adapters.values())
        return Stored([zoo.read_block(key) for key in record.chain], adapters, own)

    def _rows(self, count: int) -> list[tuple[int, list[int]]]:
        rows = documents(Tokenizer.from_file(str(self._folder / "base" / "tokenizer.json")), True)
        return [(1, row) for row in rows[:: len(rows) // count][:count].tolist()]

    def _answered(self, count: int) -> list[tuple[int, list[int]]]:
        """Of each sample: where the answer begins, and all token ids."""
        trade = RECIPES[TRADE].trade
        llm = LLM(self.zoo.path, precision="f32", num_threads=self._threads, kv_cache_bytes=256 << 20)
        params = SamplingParams(max_tokens=trade.MAX_NEW_TOKENS, temperature=0.0)
        tokenizer = llm.engine.tokenizer(self.name)
        template = tokenizer.chat_template_of(self.name)
        prompts = [
            tokenizer.encode(template.render(sample.messages)) for sample in samples.held_out(trade, count)
        ]
        done = llm.generate(self.name, prompts, params, progress=False)
        return [(len(ids), [*ids, *d.token_ids]) for ids, d in zip(prompts, done, strict=True)]

    def log_probs(self, precision: Precision, stored: Stored) -> list[np.ndarray]:
        """Of each answer, at the positions that chose its tokens, float32 [tokens, vocab]."""
        longest = max(len(tokens) for _, tokens in self.answers)
        maker = OpenVINOEngines(precision, self._threads)
        chain = ProbeChain(maker, stored.blocks, self.config, longest, stored.adapters)
        return [
            log_probabilities(chain.forward(tokens[:-1], 0)[start - 1 :].copy())
            for start, tokens in self.answers
        ]

    def factors(self, weighted: bool) -> dict[int, Factors]:
        """The differences in the largest rank, by position; kept in the folder."""
        path = self._folder / f"factors-{self.name}{'' if weighted else '-plain'}.safetensors"
        if not path.exists():
            found = self._made_factors(weighted)
            tensors = {
                f"{at}.{name}.{which}": tensor
                for at, each in found.items()
                for name, pair in each.items()
                for which, tensor in (("a", pair.a), ("b", pair.b))
            }
            write_tensor_file(path, tensors, {})
        file = TensorFile(path)
        loaded: dict[int, dict[str, LoraPair]] = {}
        for key in file.names:
            at, name, which = key.split(".")
            if which == "a":
                pair = LoraPair(file.tensor(key), file.tensor(f"{at}.{name}.b"), 1.0)
                loaded.setdefault(int(at), {})[name] = pair
        return {at: loaded[at] for at in sorted(loaded)}

    def _made_factors(self, weighted: bool) -> dict[int, Factors]:
        found: dict[int, Factors] = {}
        names, progress = chain_names(self.config), ProgressPrinter()
        inner = range(1, len(self.tuned) - 1)

        if not weighted:
            for at in inner:
                tuned, base = self.tuned[at], self.base[at]
                progress(f"differences of {self.name}", at, len(inner))
                found[at] = factors(tuned.spec, tuned.tensors, base.tensors, RANKS[-1])
            return found

        def on_block(at: int, met: Met) -> None:
            progress(f"differences of {self.name}", at, len(inner))
            found[at] = sides.weighted(
                self.tuned[at], self.base[at], RANKS[-1], lambda name: met.gram(names[at][name])
            )

        (source,) = open_sources({self.name: self._folder / self.name}, None)
        record = self.zoo.manifest.models[self.name]

        def maker(precision: Precision | None) -> OpenVINOEngines:
            return OpenVINOEngines(precision, self._threads)

        text = OwnText(source, record, self.zoo, TEXTS, "", [], maker, progress)
        calibrate(oracle_for(source, True, None), text.calibration(), on_block)
        return found


def ways(model: Model) -> dict[str, tuple[Precision, Side]]:
    """By name: the precision it is computed in, and what makes it."""
    tuned, base = model.tuned, model.base
    found: dict[str, tuple[Precision, Side]] = {
        "own, bf16": ("bf16", lambda: sides.own(tuned)),
        "own, i4 to nearest": ("f32", lambda: sides.own_nearest(tuned)),
        "own, the base's ends": ("f32", lambda: sides.with_ends(sides.own(tuned), base, "base's")),
        "own, ends in i8": ("f32", lambda: sides.with_ends(sides.own(tuned), base, "i8")),
        "base": ("f32", lambda: sides.own(base)),
    }
    compiled = {
        "int4": (CompileOptions(weights="int4", max_kl=10.0), [model.name]),
        "equivalent": (CompileOptions(share="equivalent"), ["base", model.name]),
        "delta": (CompileOptions(share="delta"), ["base", model.name]),
    }
    for how, (options, models) in compiled.items():

        def made_by_compiler(
            how: str = how, options: CompileOptions = options, models: Sequence[str] = models
        ) -> Stored:
            return model.stored(how, options, models)

        found[f"compiled, {how}"] = "f32", made_by_compiler
        found[f"compiled, {how}, bf16"] = "bf16", made_by_compiler
    for bits in (4, 3, 2, 1):
        found[f"differences, {bits} bits"] = "f32", lambda bits=bits: sides.dense(tuned, base, bits)  # type: ignore[misc]
    for kind, weighted in (("plain", False), ("weighted", True)):
        for rank in RANKS:

            def made(rank: int = rank, weighted: bool = weighted, bits: int = 16) -> Stored:
                return sides.low_rank(tuned, base, model.factors(weighted), rank, bits)

            found[f"rank {rank}, {kind}"] = "f32", made
    for rank in (32, 64):

        def narrow(rank: int = rank) -> Stored:
            return sides.low_rank(tuned, base, model.factors(False), rank, 8)

        def ends(rank: int = rank, share: str = "base's") -> Stored:
            return sides.with_ends(sides.low_rank(tuned, base, model.factors(False), rank), base, share)

        found[f"rank {rank}, plain, 8 bits"] = "f32", narrow
        found[f"rank {rank}, plain, the base's ends"] = "f32", ends
        found[f"rank {rank}, plain, ends in i8"] = "f32", lambda made=ends: made(share="i8")  # type: ignore[misc]
        found[f"rank {rank}, plain, the base's ends, bf16"] = "bf16", ends
    return found


def compared(model: Model, wanted: Sequence[str]) -> dict[str, Any]:
    """Figures of all ways whose names begin with one of `wanted`; those in bf16 where the CPU has it."""
    size = sides.own(model.tuned).num_bytes
    lacks_bf16 = OpenVINOEngines().precision != "bf16"
    results: dict[str, Any] = {}
    for name, (precision, make) in ways(model).items():
        if wanted and not any(name.startswith(each) for each in wanted):
            continue
        if precision == "bf16" and lacks_bf16:
            print(f"{model.name}: {name}: left out, as this CPU has no bf16", flush=True)
            continue
        stored = make()
        theirs = model.log_probs(precision, stored)
        same = [a.argmax(axis=1) == b.argmax(axis=1) for a, b in zip(model.exact, theirs, strict=True)]
        results[name] = {
            "agreement": float(np.concatenate(same).mean()),
            "kl": divergence(model.exact, theirs),
            "equal texts": float(np.mean([each.all() for each in same])),
            "bytes": 0.0 if name == "base" else stored.num_bytes / size,
        }
        print(f"{model.name}: {name}: {results[name]}", flush=True)
    return results


def _known(folder: Path, shape: str, num_tokens: int) -> dict[str, Any]:
    """What was measured before, over as many tokens."""
    path = folder / "deltas.json"
    kept = json.loads(path.read_text())["shapes"].get(shape) if path.exists() else None
    if kept is None or kept["results"]["num_tokens"] != num_tokens:
        return {}
    return dict(kept["results"]["sides"])


def main() -> None:
    """Print and keep the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deltas.compare", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the base and the fine-tunes")
    parser.add_argument("--model", choices=("demo", "smollm2"), default="demo", help="(demo)")
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--samples", type=int, default=12, help="held-out samples or rows (12)")
    parser.add_argument("--sides", nargs="+", default=[], help="beginnings of their names (all)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the report")
    args = parser.parse_args()
    machine = machine_facts()
    for rate in args.rates:
        model = Model(args.folder, args.model, rate, args.samples, args.threads)
        num_tokens = sum(map(len, model.exact))
        args.shape = model.name
        results = _known(args.out, model.name, num_tokens) | compared(model, args.sides)
        kept = argparse.Namespace(**{k: v for k, v in vars(args).items() if k != "folder"})
        path = save_report("deltas", kept, machine, {"num_tokens": num_tokens, "sides": results})
        print_table(
            f"{model.name}: along {num_tokens} held-out tokens",
            ("stored as", "equal top tokens", "KL", "equal texts", "of bf16's bytes"),
            [
                (k, f"{r['agreement']:.2%}", f"{r['kl']:.5f}", f"{r['equal texts']:.0%}", r["bytes"])
                for k, r in results.items()
            ],
        )
    print(path)


if __name__ == "__main__":
    main()
