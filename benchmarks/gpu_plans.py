"""TensorRT plans of random chains, built in memory: for benchmarks.gpu and the tests on a GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from benchmarks.gpu_parts import Bench, Facts, adapted_steps
from benchmarks.random_chains import RandomZoo, hf_config
from blockzoo.engines.base import EngineError, Precision
from blockzoo.engines.tensorrt.builder import PlanBuilder
from blockzoo.engines.tensorrt.engine import TensorRTEngines
from blockzoo.engines.tensorrt.plans import plan_requests
from blockzoo.engines.tensorrt.shim import TensorRT, library_for, native_target
from blockzoo.zoo.blocks import PROJECTIONS, chain_specs
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.model_config import ModelConfig


@dataclass
class PlanStore:
    """What TensorRT engines need of a zoo."""

    manifest: Manifest = field(default_factory=Manifest)
    contents: dict[str, bytes] = field(default_factory=dict)

    def read_tensorrt_plan(self, key: str) -> bytes:
        """The serialized plan."""
        return self.contents[key]


def build_plans(
    shape: str, library: TensorRT, target: str, precision: Precision = "bf16", lora_ranks: int = 0
) -> PlanStore:
    """Plans of every block of a shape; with `lora_ranks`, also such as take adapters on all projections."""
    store, builder = PlanStore(), PlanBuilder(library)
    for spec in set(chain_specs(ModelConfig.from_hf(hf_config(shape), None))):
        lora = PROJECTIONS.get(spec.kind, ()) if lora_ranks else ()
        for request in plan_requests(
            spec, precision, target, library.library, library.version, lora=lora, lora_ranks=lora_ranks
        ):
            content, record = builder.build(request)
            store.contents[request.key()] = content
            store.manifest.tensorrt_plans[request.key()] = record
    return store


def native_engines(shape: str, *, cuda_graphs: bool = True, lora_ranks: int = 0) -> TensorRTEngines:
    """The tensorrt backend on this machine's GPU, with plans of a shape. Raises EngineError."""
    target = native_target()
    if target is None:
        raise EngineError("torch sees no NVIDIA GPU")
    store = build_plans(shape, library_for(target, target), target, lora_ranks=lora_ranks)
    return TensorRTEngines(store, cuda_graphs=cuda_graphs)  # type: ignore[arg-type]


def plans(bench: Bench, shape: str, facts: Facts) -> None:
    """Decode and prefill through TensorRT plans; the parts `decode` and `prefill` have torch's figures."""
    target = native_target()
    try:
        library = library_for(target or "", target)
    except EngineError as error:
        facts["skipped"] = str(error)
        return
    start = time.perf_counter()
    store = build_plans(shape, library, target or "")
    facts |= {"library": library.title, "target": target, "build_s": time.perf_counter() - start}
    facts["plan_bytes"] = {p.part: p.num_bytes for p in store.manifest.tensorrt_plans.values()}
    past, ceilings = 512, bench.ceilings
    for graphs in (True, False):
        engines = TensorRTEngines(store, cuda_graphs=graphs)  # type: ignore[arg-type]
        zoo = RandomZoo(shape, engines, max_tokens=64, max_seqs=64, context=past + 32)
        for size in (1, 8, 64):
            seconds = bench.step(zoo, [zoo.rows(i, 0, 1, past) for i in range(size)])
            floor = zoo.step_bytes(size, past) / ceilings["copy_bytes_per_s"]
            name = f"batch {size}{'' if graphs else ' without graphs'}"
            facts[name] = {"step_ms": seconds * 1e3, "over_memory_floor": seconds / floor}
        del zoo, engines
        bench.free()
    engines = TensorRTEngines(store, cuda_graphs=False)  # type: ignore[arg-type]
    zoo = RandomZoo(shape, engines, max_tokens=4096, max_seqs=1, context=4096 + 32)
    for length in (512, 4096):
        seconds = bench.step(zoo, [zoo.rows(0, 0, length, 0)], inner=1)
        share = zoo.step_flops(length) / seconds / ceilings["matrix_flops_per_s"]
        facts[f"prefill {length}"] = {"ms": seconds * 1e3, "share_of_matrix_rate": share}


def plans_with_adapters(bench: Bench, shape: str, facts: Facts) -> None:
    """Eight adapters of rank 16 in a batch through plans; the part `adapters` has torch's."""
    try:
        engines = native_engines(shape, lora_ranks=8 * 16)
    except EngineError as error:
        facts["skipped"] = str(error)
        return
    adapted_steps(bench, shape, engines, facts)
