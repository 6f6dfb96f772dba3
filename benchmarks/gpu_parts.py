"""The parts of benchmarks.gpu: how time is taken, and what blockzoo does on its own."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.random_chains import SHAPES, RandomZoo
from blockzoo.build.rounding import rounded_in_haste
from blockzoo.engines.base import Precision
from blockzoo.engines.reference import ReferenceEngines
from blockzoo.engines.reference.arrays import TORCH_DTYPES, PackedMatrix
from blockzoo.engines.reference.blocks import Matrix, Operators
from blockzoo.zoo.packing import GROUP, QuantizedDtype

Facts = dict[str, Any]
"""What a part found out, by name; a part fills it as it goes, so that what it has is kept if it fails."""


class Bench:
    """The device, and how time is taken.

    Args:
        device: of torch.
        repeats: of what is timed.
        tensorrt_llm: the interpreter of TensorRT-LLM's environment, where it has one.
    """

    def __init__(self, device: str, repeats: int, tensorrt_llm: str | None = None) -> None:
        self.device, self.repeats, self.tensorrt_llm = device, repeats, tensorrt_llm
        self.on_gpu = device.startswith("cuda")
        self._untimed = 4 if self.on_gpu else 1  # on a GPU the third records a CUDA graph
        self.ceilings: Facts = {}

    def wait(self) -> None:
        """Return when the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], inner: int = 1) -> float:
        """Median over `repeats` of the time of one run, `inner` runs being started at once."""
        for _ in range(self._untimed):
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

    def num_runs(self, inner: int = 1) -> int:
        """How often `seconds` runs what it is given."""
        return self._untimed + self.repeats * inner

    def free(self) -> None:
        """Give device memory back that nothing holds any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def engines(self, cuda_graphs: bool = True) -> ReferenceEngines:
        """Torch engines on the device, in bf16 on a GPU."""
        precision: Precision = "bf16" if self.on_gpu else "f32"
        return ReferenceEngines(precision, self.device, cuda_graphs=cuda_graphs)

    def step(self, zoo: RandomZoo, batch: list[Any], inner: int = 8) -> float:
        """One step of the executor without the logits' way to the host (the sampler's affair)."""
        arrays = zoo.engines.arrays
        arrays.to_host = lambda array: array  # type: ignore[method-assign]
        try:
            return self.seconds(lambda: zoo.executor.run(batch), inner if self.on_gpu else 1)
        finally:
            del arrays.to_host


def ceilings(bench: Bench, shape: str, facts: Facts) -> None:
    """What the device is, and does at best: copying, reading, multiplying."""
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        facts |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
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
    facts |= {"copy_bytes_per_s": 2 * a.nbytes / copy, "read_bytes_per_s": a.nbytes / read}
    facts["matrix_flops_per_s"] = 2 * side**3 / product


def decode(bench: Bench, shape: str, facts: Facts) -> None:
    """Decode steps at batch 1, 8, 64 over 512 tokens of context, with and without CUDA graphs."""
    past = 512 if bench.on_gpu else 40
    batches = (1, 8, 64) if bench.on_gpu else (1, 3)
    facts["context"] = past
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


def prefill(bench: Bench, shape: str, facts: Facts) -> None:
    """Prefill of 512 and 4096 tokens, one step each."""
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


def tenants(bench: Bench, shape: str, facts: Facts) -> None:
    """Eight models that share all but their last eighth of layers, against eight alone in turn.

    The eight alone are one, run eight times: eight models of the 8B shape do not fit into 80 GiB together.
    """
    layers = SHAPES[shape]["num_hidden_layers"]
    shared, past = layers - max(1, layers // 8), 512 if bench.on_gpu else 40
    common = {"max_tokens": 64, "context": past + 32}
    zoo = RandomZoo(shape, bench.engines(), 8, shared, max_seqs=8, **common)
    together = bench.step(zoo, [zoo.rows(i, i, 1, past) for i in range(8)])
    facts |= {"shared_layers": shared, "layers": layers, "weight_bytes": zoo.weights.num_bytes}
    facts["engine_calls"] = zoo.executor.run([zoo.rows(i, i, 1, past) for i in range(8)]).num_calls
    facts |= {"step_ms": together * 1e3, "tokens_per_s": 8 / together}
    del zoo
    bench.free()
    zoo = RandomZoo(shape, bench.engines(), max_seqs=1, **common)
    alone = bench.step(zoo, [zoo.rows(0, 0, 1, past)])
    facts |= {"alone_step_ms": alone * 1e3, "in_turn_tokens_per_s": 1 / alone}
    facts |= {"times_faster": 8 * alone / together, "weight_bytes_apart": 8 * zoo.weights.num_bytes}


def scattered(bench: Bench, shape: str, facts: Facts) -> None:
    """Recomputing rows at scattered positions (DHD) against a full prefill of the same prompt."""
    length = 4096 if bench.on_gpu else 40
    zoo = RandomZoo(
        shape, bench.engines(False), max_tokens=length, max_seqs=length, context=length, sequences=1
    )
    whole = bench.step(zoo, [zoo.rows(0, 0, length, 0)], inner=1)
    facts |= {"prefill_ms": whole * 1e3, "tokens": length}
    rng = np.random.default_rng(0)
    for share in (0.05, 0.15):
        places = np.sort(rng.choice(length - 1, int(share * length), replace=False))
        batch = [zoo.rows(0, 0, 1, int(p))._replace(num_logits=0) for p in places]
        batch[-1] = batch[-1]._replace(num_logits=1)
        seconds = bench.step(zoo, batch, inner=1)
        facts[f"{share:.0%} of rows"] = {"ms": seconds * 1e3, "times_faster": whole / seconds}


def adapters(bench: Bench, shape: str, facts: Facts) -> None:
    """Eight tenants with adapters in one batch, and what adapters add to one projection alone."""
    adapted_steps(bench, shape, bench.engines(), facts)
    bench.free()
    if bench.on_gpu:
        masked_products(bench, shape, facts)
    else:
        facts["kernels"] = "need a GPU"


def adapted_steps(bench: Bench, shape: str, engines: ReferenceEngines, facts: Facts) -> None:
    """Eight tenants with adapters of rank 16 on every projection, in one batch, against bare base rows."""
    past = 512 if bench.on_gpu else 40
    sizes = (8, 64) if bench.on_gpu else (8,)
    common = {"max_tokens": max(sizes), "max_seqs": max(sizes), "context": past + 32}
    layers = SHAPES[shape]["num_hidden_layers"]
    zoo = RandomZoo(shape, engines, 9, layers, lora_rank=16, **common)
    for size in sizes:
        bare = bench.step(zoo, [zoo.rows(i, 0, 1, past) for i in range(size)])
        mixed = bench.step(zoo, [zoo.rows(i, 1 + i % 8, 1, past) for i in range(size)])
        facts[f"batch {size}"] = {
            "base_step_ms": bare * 1e3,
            "adapters_step_ms": mixed * 1e3,
            "share_of_base_rate": bare / mixed,
        }


def masked_products(bench: Bench, shape: str, facts: Facts) -> None:
    """The masked form of 8 adapters of rank 16 beside its own projection: our kernels and torch."""
    from blockzoo.engines.tensorrt.operators import FusedOperators

    width, out = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]

    def drawn(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, device=bench.device).bfloat16()

    weight, a, b, kernels = drawn(out, width), drawn(128, width), drawn(128, out), FusedOperators()
    for rows in (8, 64):
        x, y = drawn(rows, width), drawn(rows, out)
        mask = torch.zeros(rows, 128, device=bench.device, dtype=torch.bfloat16)
        for row in range(rows):
            mask[row, row % 8 * 16 : row % 8 * 16 + 16] = 1.0
        sides = {
            "projection": partial(torch.mm, x, weight.T),
            "kernels": partial(kernels.add_adapters, y, x, a, b, mask),
            "torch": partial(_add_adapters, y, x, a, b, mask),
        }
        facts[f"{rows} rows, us"] = {name: bench.seconds(run, 50) * 1e6 for name, run in sides.items()}


def quantized(bench: Bench, shape: str, facts: Facts) -> None:
    """A product with a matrix as it is, and in 8 and 4 bits: by our kernel, and unpacked as a whole first."""
    width, out = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    values = np.random.default_rng(0).standard_normal((out, width)).astype(np.float32) / 64
    engines = bench.engines()
    dtype, plain, kernels = TORCH_DTYPES[engines.precision], Operators(), engines.operators
    matrices: dict[str, Matrix] = {"given": torch.from_numpy(values).to(bench.device, dtype)}
    kinds: dict[str, tuple[QuantizedDtype, int]] = {
        "8 bits": ("i8", min(width, 128)),
        "4 bits": ("i4", GROUP),
    }
    for name, (bits, group) in kinds.items():
        tensor = rounded_in_haste(values, bits, group)
        matrices[name] = PackedMatrix(tensor, dtype, engines.device)
    for rows in (1, 8, 64):
        x = torch.randn(rows, width, device=bench.device).to(dtype)
        sides = {name: partial(kernels.product, x, matrix) for name, matrix in matrices.items()}
        sides |= {f"{name}, unpacked": partial(plain.product, x, matrices[name]) for name in list(sides)[1:]}
        facts[f"{rows} rows, us"] = {name: bench.seconds(run, 50) * 1e6 for name, run in sides.items()}


OWN: dict[str, Callable[[Bench, str, Facts], None]] = {
    "decode": decode,
    "prefill": prefill,
    "tenants": tenants,
    "scattered": scattered,
    "adapters": adapters,
    "quantized": quantized,
}


def _add_adapters(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The kernel's work in torch, in place."""
    return y.addmm_(torch.mm(x, a.T) * mask, b)
