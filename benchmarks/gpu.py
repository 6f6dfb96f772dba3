"""What an NVIDIA GPU does with chains, as a share of what the same GPU can do: one command, one JSON file.

    python3 -m benchmarks.gpu [--shapes 0.5b,8b] [--out FOLDER]            on a GPU: torch and triton
    python3 -m benchmarks.gpu --shapes tiny --device cpu                   dry run, no figure means anything

Random weights, made on the device. Ceilings (copy and read bandwidth, matrix rate) are measured first, in
the same process; every time is the median of repeated runs after warm-up, with the device waited for.
Needs nothing but this source tree, torch, triton, numpy, safetensors and tokenizers. Each part is on its own:
one that fails is recorded with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.source_tree import use_source_tree

use_source_tree()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.gpu_peers import PEERS  # noqa: E402
from benchmarks.random_chains import SHAPES, RandomZoo  # noqa: E402
from blockzoo.engines.reference import ReferenceEngines  # noqa: E402

Facts = dict[str, Any]


class Bench:
    """The device, the sizes, and how time is taken."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.on_gpu = device.startswith("cuda")
        self.ceilings: Facts = {}

    def wait(self) -> None:
        """Return when the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], inner: int = 1) -> float:
        """Median over `repeats` of the time of one run, `inner` runs being started at once."""
        for _ in range(4 if self.on_gpu else 1):  # on a GPU the third records a CUDA graph
            run()
        times = []
        for _ in range(self.repeats):
            self.wait()
            start = time.perf_counter()
            for _ in range(inner):
                run()
            self.wait()
            times.append((time.perf_counter() - start) / inner)
        return float(np.median(times))

    def free(self) -> None:
        """Give device memory back that nothing holds any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def engines(self, cuda_graphs: bool = True) -> ReferenceEngines:
        """Torch engines on the device, in bf16 on a GPU."""
        precision = "bf16" if self.on_gpu else "f32"
        return ReferenceEngines(precision, self.device, cuda_graphs=cuda_graphs)

    def step(self, zoo: RandomZoo, batch: list[Any], inner: int = 8) -> float:
        """One step of the executor without the logits' way to the host (the sampler's affair)."""
        arrays = zoo.engines.arrays
        arrays.to_host = lambda array: array  # type: ignore[method-assign]
        try:
            return self.seconds(lambda: zoo.executor.run(batch), inner if self.on_gpu else 1)
        finally:
            del arrays.to_host


def measure_ceilings(bench: Bench) -> Facts:
    size = 2**31 if bench.on_gpu else 2**22
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    a, b = (torch.randn(size // 2, device=bench.device).to(dtype) for _ in range(2))
    copy = bench.seconds(lambda: b.copy_(a))
    tall = a.view(-1, 4096)
    row = torch.randn(4096, device=bench.device, dtype=dtype)
    read = bench.seconds(lambda: torch.mv(tall, row))
    side = 8192 if bench.on_gpu else 256
    x, y = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
    product = bench.seconds(lambda: torch.mm(x, y))
    return {
        "copy_bytes_per_s": 2 * a.nbytes / copy,
        "read_bytes_per_s": a.nbytes / read,
        "matrix_flops_per_s": 2 * side**3 / product,
    }


def decode(bench: Bench, shape: str) -> Facts:
    """Decode steps at batch 1, 8, 64 over 512 tokens of context, with and without CUDA graphs."""
    past = 512 if bench.on_gpu else 40
    batches = (1, 8, 64) if bench.on_gpu else (1, 3)
    facts: Facts = {"context": past}
    for graphs in (True, False) if bench.on_gpu else (False,):
        engines = bench.engines(graphs)
        zoo = RandomZoo(shape, engines, max_tokens=512, max_seqs=max(batches), context=past + 32)
        for size in batches:
            seconds = bench.step(zoo, [zoo.rows(i, 0, 1, past) for i in range(size)])
            floor = zoo.step_bytes(size, past) / bench.ceilings["copy_bytes_per_s"]
            facts[f"batch {size}{'' if graphs else ' without graphs'}"] = {
                "step_ms": seconds * 1e3,
                "tokens_per_s": size / seconds,
                "over_memory_floor": seconds / floor,
            }
        del zoo, engines
        bench.free()
    return facts


def prefill(bench: Bench, shape: str) -> Facts:
    """Prefill of 512 and 4096 tokens, one step each."""
    facts: Facts = {}
    lengths = (512, 4096) if bench.on_gpu else (48,)
    zoo = RandomZoo(shape, bench.engines(), max_tokens=max(lengths), max_seqs=1, context=max(lengths) + 32)
    for length in lengths:
        seconds = bench.step(zoo, [zoo.rows(0, 0, length, 0)], inner=1)
        rate = zoo.step_flops(length) / seconds
        facts[f"{length} tokens"] = {
            "ms": seconds * 1e3,
            "tokens_per_s": length / seconds,
            "share_of_matrix_rate": rate / bench.ceilings["matrix_flops_per_s"],
        }
    return facts


def tenants(bench: Bench, shape: str) -> Facts:
    """Eight models that share all but their last eighth of layers, against eight alone in turn."""
    layers = SHAPES[shape]["num_hidden_layers"]
    shared, past = layers - max(1, layers // 8), 512 if bench.on_gpu else 40
    common = {"max_tokens": 64, "context": past + 32}
    zoo = RandomZoo(shape, bench.engines(), 8, shared, max_seqs=8, **common)
    together = bench.step(zoo, [zoo.rows(i, i, 1, past) for i in range(8)])
    num_bytes = zoo.weights.num_bytes
    calls = zoo.executor.run([zoo.rows(i, i, 1, past) for i in range(8)]).num_calls
    del zoo
    bench.free()
    zoo = RandomZoo(shape, bench.engines(), max_seqs=1, **common)
    alone = bench.step(zoo, [zoo.rows(0, 0, 1, past)])
    return {
        "shared_layers": shared,
        "layers": layers,
        "step_ms": together * 1e3,
        "engine_calls": calls,
        "tokens_per_s": 8 / together,
        "alone_step_ms": alone * 1e3,
        "in_turn_tokens_per_s": 1 / alone,
        "times_faster": 8 * alone / together,
        "weight_bytes": num_bytes,
        "weight_bytes_apart": 8 * zoo.weights.num_bytes,
    }


def scattered(bench: Bench, shape: str) -> Facts:
    """Recomputing rows at scattered positions (DHD) against a full prefill of the same prompt."""
    length = 4096 if bench.on_gpu else 40
    zoo = RandomZoo(
        shape, bench.engines(False), max_tokens=length, max_seqs=length, context=length, sequences=1
    )
    whole = bench.step(zoo, [zoo.rows(0, 0, length, 0)], inner=1)
    facts: Facts = {"prefill_ms": whole * 1e3, "tokens": length}
    rng = np.random.default_rng(0)
    for share in (0.05, 0.15):
        places = np.sort(rng.choice(length - 1, int(share * length), replace=False))
        batch = [zoo.rows(0, 0, 1, int(p))._replace(wants_logits=False) for p in places]
        batch[-1] = batch[-1]._replace(wants_logits=True)
        seconds = bench.step(zoo, batch, inner=1)
        facts[f"{share:.0%} of rows"] = {"ms": seconds * 1e3, "times_faster": whole / seconds}
    return facts


def adapters(bench: Bench, shape: str) -> Facts:
    """Eight tenants with adapters of rank 16 on every projection, in one batch, against bare base rows."""
    past = 512 if bench.on_gpu else 40
    sizes = (8, 64) if bench.on_gpu else (8,)
    common = {"max_tokens": max(sizes), "max_seqs": max(sizes), "context": past + 32}
    layers = SHAPES[shape]["num_hidden_layers"]
    zoo = RandomZoo(shape, bench.engines(), 9, layers, lora_rank=16, **common)
    facts: Facts = {}
    for size in sizes:
        bare = bench.step(zoo, [zoo.rows(i, 0, 1, past) for i in range(size)])
        mixed = bench.step(zoo, [zoo.rows(i, 1 + i % 8, 1, past) for i in range(size)])
        facts[f"batch {size}"] = {
            "base_step_ms": bare * 1e3,
            "adapters_step_ms": mixed * 1e3,
            "share_of_base_rate": bare / mixed,
        }
    return facts | (masked_products(bench, shape) if bench.on_gpu else {"kernels": "need a GPU"})


def masked_products(bench: Bench, shape: str) -> Facts:
    """The masked form of 8 adapters of rank 16 beside its own projection: our kernels and torch."""
    from blockzoo.engines.tensorrt.operators import FusedOperators

    width, out = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]

    def drawn(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, device=bench.device).bfloat16()

    weight, a, b, kernels = drawn(out, width), drawn(128, width), drawn(128, out), FusedOperators()
    facts: Facts = {}
    for rows in (8, 64):
        x, y = drawn(rows, width), drawn(rows, out)
        mask = torch.zeros(rows, 128, device=bench.device, dtype=torch.bfloat16)
        for row in range(rows):
            mask[row, row % 8 * 16 : row % 8 * 16 + 16] = 1.0
        sides = {
            "projection": lambda x=x: torch.mm(x, weight.T),
            "kernels": lambda x=x, y=y, mask=mask: kernels.add_adapters(y, x, a, b, mask),
            "torch": lambda x=x, y=y, mask=mask: y.addmm_(torch.mm(x, a.T) * mask, b),
        }
        facts[f"{rows} rows, us"] = {name: bench.seconds(run, 50) * 1e6 for name, run in sides.items()}
    return facts


PARTS: dict[str, Callable[[Bench, str], Facts]] = {
    "decode": decode,
    "prefill": prefill,
    "tenants": tenants,
    "scattered": scattered,
    "adapters": adapters,
    **PEERS,
}


def attempt(run: Callable[[], Facts]) -> Facts:
    """What a part gave, or how it failed."""
    try:
        return run()
    except Exception as error:  # one part's failure is a result too
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="0.5b,8b", help=f"of {', '.join(SHAPES)} (0.5b,8b)")
    parser.add_argument("--parts", default=",".join(PARTS), help="all: " + ",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no GPU; --shapes tiny --device cpu is a dry run", file=sys.stderr)
        return 2
    bench = Bench(args.device, args.repeats)
    report: Facts = {"torch": torch.__version__, "device": args.device, "time": time.strftime("%F %T")}
    if bench.on_gpu:
        report["gpu"] = torch.cuda.get_device_name()
    bench.ceilings = report["ceilings"] = measure_ceilings(bench)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{args.device.replace(':', '')}.json"
    for shape in args.shapes.split(","):
        for name in args.parts.split(","):
            start = time.perf_counter()
            facts = attempt(lambda part=PARTS[name], shape=shape: part(bench, shape))
            bench.free()
            report.setdefault(shape, {})[name] = facts
            path.write_text(json.dumps(report, indent=1))  # what there is, whatever comes next
            print(f"{shape} {name} ({time.perf_counter() - start:.0f} s): {json.dumps(facts)}", flush=True)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
