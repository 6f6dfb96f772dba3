"""What surrogates cost: steps of a model, runs of cheaper chains over its KV, and both in turn.

    python -m benchmarks.surrogate_costs [--shape 110m|0.5b|1.1b] [--layers N]

Random weights of one shape, one sequence behind a context. Surrogates: the model's blocks in 4 bits (int4),
and its own without the middle half of the layers (layers). A cycle is what speculation does: three runs of a
surrogate, one row each, then a step of the model with four rows. Beside it stands what that gives by how
often guesses come true.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, interleave, machine_facts, print_table, save_report, timed
from benchmarks.families import SHAPES, made_once, make_family
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.runtime.exec.rows import Rows
from blockzoo.runtime.serve.config import EngineConfig
from blockzoo.runtime.serve.loading import load_zoo, making
from blockzoo.zoo.manifest import Manifest, ModelRecord, SurrogateRecord
from blockzoo.zoo.packing import groups_dividing
from blockzoo.zoo.store import Zoo

DRAFTED = 3
ACCEPTANCE = (0.6, 0.7, 0.8, 0.85, 0.9)
NAMES = ("int4", "layers")


def surrogate_zoo(workdir: Path, shape: str) -> Zoo:
    """A zoo of one model under two names, with another surrogate each; without the model in 4 bits alone."""
    family = make_family(workdir, shape, 1)
    folder = family.checkpoint(family.tenants[0])
    given = CompileOptions(profile=False, verify=False)
    group, *_ = groups_dividing({family.shape.hidden_size, family.shape.intermediate_size})  # as theirs are
    four = replace(given, weights="int4", calibration_texts=0, group_size=group)

    def write(zoo: Path) -> None:
        compile_models(dict.fromkeys(NAMES, folder), zoo, given)
        compile_models({"small": folder}, zoo, four)

    path = made_once(family.path / "zoo-surrogates", write)
    models = Manifest.load(path / "manifest.json").models
    own = models[NAMES[0]].chain
    layers = len(own) // 2 - 1
    middle = range(1 + layers // 4 * 2, 1 + layers // 4 * 2 + layers // 2 * 2)
    chains = {
        NAMES[0]: dict(enumerate(models["small"].chain)),
        NAMES[1]: {at: key for at, key in enumerate(own) if at not in middle},
    }
    manifest = Manifest.load(path / "manifest.json")
    return Zoo(path, replace(manifest, models={n: _with(models[n], chains[n]) for n in NAMES}))


def _with(model: ModelRecord, blocks: Mapping[int, str]) -> ModelRecord:
    return replace(model, surrogate=SurrogateRecord("auto", None, dict(blocks), (0.8,), 0.5, 1.0, 1, "none"))


class Chains:
    """An executor with a sequence of its own for each of its chains' turns."""

    def __init__(self, zoo: Zoo, context: int, args: argparse.Namespace) -> None:
        maker = OpenVINOEngines(args.precision, args.threads)
        config = EngineConfig(
            precision=maker.precision, num_threads=args.threads, speculate="auto", kv_cache_bytes=1 << 28
        )
        self._loaded = load_zoo(zoo, making(zoo, config, maker))
        (self._executor,) = self._loaded.executors.values()
        self._context = context
        layers = self._loaded.topology.chains[0].num_layers
        pages = -(-(context + 32) // PAGE_TOKENS)
        self._table = np.arange(layers * pages, dtype=np.int32).reshape(layers, pages)

    def step(self, rows: int) -> None:
        """Of the model."""
        self._run(self._loaded.topology.chain_of_model[NAMES[0]], 0, rows)

    def run(self, name: str, ahead: int = 0) -> None:
        """Of a surrogate: one row."""
        self._run(self._loaded.topology.surrogate_of_model[name], ahead, 1)

    def cycle(self, name: str) -> None:
        """Drafts, and the step that checks them."""
        for ahead in range(DRAFTED):
            self.run(name, ahead)
        self.step(1 + DRAFTED)

    def _run(self, chain: int, ahead: int, rows: int) -> None:
        tokens = np.arange(2, 2 + rows, dtype=np.int32)
        self._executor.run([Rows(chain, tokens, self._context + ahead, self._table, rows)])


def main() -> None:
    """Print and keep the table."""
    parser = arguments(__doc__ or "", shape="110m", repeats=8)
    parser.add_argument("--context", type=int, default=256, help="tokens before (256)")
    parser.add_argument("--layers", type=int, help="as if the shape had so many")
    args = parser.parse_args()
    if args.layers:
        name = f"{args.shape}-{args.layers}"
        SHAPES[name] = replace(SHAPES[args.shape], num_layers=args.layers)
        args.shape = name
    machine = machine_facts()
    chains = Chains(surrogate_zoo(args.workdir, args.shape), args.context, args)
    sides: dict[str, Callable[[], None]] = {
        f"model, {rows} rows": partial(chains.step, rows) for rows in (1, 1 + DRAFTED, 16)
    }
    for name in NAMES:
        sides[f"{name}, 1 row"] = partial(chains.run, name)
        sides[f"{name}, cycle"] = partial(chains.cycle, name)
    turns = {side: partial(timed, run, 4, 2) for side, run in sides.items()}
    taken = interleave(turns, args.repeats)
    one = taken["model, 1 rows"]
    results: dict[str, Any] = {
        side: samples.summary() | {"relative": samples.ratio_to(one)["ratio"]}
        for side, samples in taken.items()
    }
    for name in NAMES:
        cycle = results[f"{name}, cycle"]["relative"]
        results[f"{name}, cycle"]["speedup"] = {
            str(rate): round(sum(rate**k for k in range(DRAFTED + 1)) / cycle, 3) for rate in ACCEPTANCE
        }
    rows = [
        (side, r["median_ms"], r["p10_ms"], r["p90_ms"], r["relative"], *r.get("speedup", {}).values())
        for side, r in results.items()
    ]
    rows = [row + ("",) * (5 + len(ACCEPTANCE) - len(row)) for row in rows]
    columns = ("", "median ms", "p10", "p90", "steps", *(f"at {rate:.0%}" for rate in ACCEPTANCE))
    print_table("one sequence", columns, rows)
    print(save_report("surrogate_costs", args, machine, results))


if __name__ == "__main__":
    main()
