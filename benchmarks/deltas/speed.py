"""A step of eight full fine-tunes: as differences to one base, and as blocks of their own.

    python -m benchmarks.deltas.speed [--shape 110m] [--ranks 32] [--own bf16 int4]

Random weights: what a step costs does not depend on their values. Each tenant has one running request at a
context of 512 tokens; the executor alone is timed. The tenants' embedding is the base's.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, interleave, machine_facts, print_table, save_report
from benchmarks.families import SHAPES, Family, made_once, make_family
from benchmarks.sides import ExecutorSide, Settings, Side, decode_turn, served_in
from blockzoo.build.partition import chain_names
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.zoo.blocks import PROJECTIONS, tensor_shapes
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.tensors import BlockTensor, f32_to_bf16, write_tensor_file

STEPS = 8
LEFT_IN = 0.02  # of the size of weights: of the differences


def adapter_folder(base: Zoo, number: int, rank: int, folder: Path) -> None:
    """A LoRA on every projection with random values, in bf16."""
    rng, tensors = np.random.default_rng(number), {}
    record = base.manifest.models["base"]
    for key, names in zip(record.chain, chain_names(record.config), strict=True):
        spec = base.manifest.blocks[key].spec
        for name in PROJECTIONS.get(spec.kind, ()):
            out, columns = tensor_shapes(spec)[name]
            stem = "base_model.model." + names[name].removesuffix(".weight")
            for which, shape in (("A", (rank, columns)), ("B", (out, rank))):
                values = LEFT_IN * rng.standard_normal(shape, dtype=np.float32)
                tensors[f"{stem}.lora_{which}.weight"] = BlockTensor("bf16", f32_to_bf16(values))
    write_tensor_file(folder / "adapter_model.safetensors", tensors, {})
    targets = [f"{name}_proj" for names in PROJECTIONS.values() for name in names]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    config |= {"base_model_name_or_path": "base", "bias": "none", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def differences(family: Family, rank: int) -> Zoo:
    """A zoo of a base and as many differences to it as the family has tenants."""

    def compile_all(path: Path) -> None:
        options = CompileOptions(verify=False, profile=False)
        compile_models({"base": family.checkpoint(family.tenants[0])}, path, options)
        base = Zoo.open(path)
        given = {}
        for number, tenant in enumerate(family.tenants):
            folder = family.path / f"difference-{rank}-{number}"
            made_once(folder, partial(adapter_folder, base, number, rank))
            given[f"{tenant}-difference"] = f"{folder}@base"
        compile_models(given, path, options)

    return Zoo.open(made_once(family.path / f"zoo-differences-{rank}", compile_all))


def main() -> None:
    """Print and keep the table."""
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=4)
    parser.add_argument("--tenants", type=int, default=8, help="(8)")
    parser.add_argument("--context", type=int, default=512, help="(512)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32], help="of the differences (32)")
    parser.add_argument("--own", nargs="+", default=["bf16", "int4"], choices=("bf16", "int8", "int4"))
    parser.add_argument("--prepare", action="store_true", help="only make the zoos")
    args = parser.parse_args()
    machine = machine_facts()
    family = make_family(args.workdir, args.shape, args.tenants, SHAPES[args.shape].num_layers)
    zoos: dict[str, tuple[Zoo, str | None]] = {
        f"rank {rank}": (differences(family, rank), None) for rank in args.ranks
    }
    for own in args.own:
        zoos[f"own {own}"] = family.zoo(None if own == "bf16" else own), None if own == "bf16" else own
    if args.prepare:
        return
    settings = Settings(
        precision=OpenVINOEngines(args.precision).precision,
        num_threads=args.threads,
        max_seqs=args.tenants,
        context=args.context,
        max_tokens=args.context,
        longest_prompt=args.context,
    )
    sides: dict[str, Side] = {}
    for name, (zoo, weights) in zoos.items():
        models = [model for model in zoo.manifest.models if model != "base"]
        sides[name] = ExecutorSide(zoo, models, served_in(settings, weights))  # type: ignore[arg-type]
    turns = {name: partial(decode_turn, side, args.tenants, STEPS) for name, side in sides.items()}
    samples = interleave(turns, args.repeats)
    for side in sides.values():
        side.close()
    first = samples[next(iter(samples))]
    results: dict[str, Any] = {
        name: {**taken.summary(), "ratio": taken.ratio_to(first)["ratio"]} for name, taken in samples.items()
    }
    rows = [(name, r["median_ms"], r["p10_ms"], r["p90_ms"], r["ratio"]) for name, r in results.items()]
    print_table(f"{args.tenants} tenants, a step", ("", "median ms", "p10", "p90", "time to first"), rows)
    print(save_report("deltas_speed", args, machine, results))


if __name__ == "__main__":
    main()
