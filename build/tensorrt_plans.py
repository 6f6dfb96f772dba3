"""TensorRT plans of a zoo: one per part of each shape class and target, built when it is not there yet.

Quantized blocks have none (see `engines.tensorrt.engine`).
"""

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from blockzoo.build.progress import Progress
from blockzoo.engines.base import EngineError, Precision
from blockzoo.engines.tensorrt.parts import part_lora, parts_of
from blockzoo.engines.tensorrt.plans import PlanRequest, plan_requests, shape_class
from blockzoo.engines.tensorrt.shim import TensorRT, library_for, native_target
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import BlockRecord, Manifest, TensorRTPlanRecord
from blockzoo.zoo.store import Zoo, tensorrt_plan_path, timing_cache_name
from blockzoo.zoo.writer import ZooWriter

if TYPE_CHECKING:
    from blockzoo.engines.tensorrt.builder import OnPhase


@dataclass(frozen=True, slots=True)
class TensorRTOptions:
    """What to build plans for."""

    targets: tuple[str, ...] = ("native",)
    """Compute capabilities ("sm89"), or "native": this machine's GPU."""
    precision: Precision = "bf16"
    """Of activations and weights."""
    workspace_bytes: int | None = None
    """Bound on the scratch memory of a plan; None: the library's own."""
    bake_weights: bool = False
    """Whether each block gets plans of its own with its weights as constants."""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What was done."""

    built: int
    reused: int
    num_bytes: int
    """Of all plans of the targets."""
    num_packed: int
    """Blocks that have none, as they are quantized."""


def build_plans(
    zoo: Zoo,
    writer: ZooWriter | None,
    options: TensorRTOptions,
    progress: Progress,
) -> PlanReport:
    """Enter the plans of every block of `zoo` into its manifest; without a writer (a dry run) only count.

    Plans of other targets, versions and settings stay as long as some block has their shape class.

    Raises:
        ZooError: a target cannot be compiled for here. EngineError: the library refused a network.
    """
    if find_spec("onnx") is None:
        raise ZooError("TensorRT plans are built from ONNX graphs: pip install blockzoo[tensorrt]")
    built = reused = num_bytes = 0
    for target, library in _targets(options.targets).items():
        wanted = _requests(zoo, target, library, options)
        missing = {key: request for key, request in wanted.items() if not _is_there(zoo, key)}
        reused += len(wanted) - len(missing)
        built += len(missing)
        if missing and writer is not None:
            _build(zoo, writer, library, target, missing, progress)
        num_bytes += sum(plan.num_bytes for key, plan in zoo.manifest.tensorrt_plans.items() if key in wanted)
    num_packed = len(zoo.manifest.blocks) - len(blocks_with_plans(zoo.manifest))
    return PlanReport(built, reused, num_bytes, num_packed)


def _targets(names: tuple[str, ...]) -> dict[str, TensorRT]:
    native = native_target()
    if "native" in names and native is None:
        raise ZooError(
            "--target native: this machine has no NVIDIA GPU that torch can see; name the target: "
            "--target sm89 (L4, L40S), sm120 (RTX 50, RTX PRO 6000), sm86 (A10, RTX 30), sm80 (A100)"
        )
    chosen = [native if name == "native" and native else name for name in names]
    try:
        return {target: library_for(target, native) for target in chosen}
    except EngineError as error:
        raise ZooError(str(error)) from error


def _requests(zoo: Zoo, target: str, library: TensorRT, options: TensorRTOptions) -> dict[str, PlanRequest]:
    """By key: blocks of one shape class ask for the same plans."""
    if target == "sm75" and options.precision == "bf16":
        raise ZooError("target sm75 does not compute in bf16; choose a newer target")
    requests = {}
    lora, ranks = adapted_projections(zoo.manifest)
    for block_id, block in blocks_with_plans(zoo.manifest).items():
        for request in plan_requests(
            block.spec,
            options.precision,
            target,
            library.library,
            library.version,
            workspace_bytes=options.workspace_bytes,
            # both plans of a block with adapters take the same weights: baked in, they would lie there twice
            baked_block=block_id if options.bake_weights and block_id not in lora else None,
            lora=lora.get(block_id, ()),
            lora_ranks=ranks,
        ):
            requests[request.key()] = request
    return requests


def blocks_with_plans(manifest: Manifest) -> dict[str, BlockRecord]:
    """All but those with quantized matrices, and the heads that are tied to one."""
    blocks = manifest.blocks
    return {
        block_id: record
        for block_id, record in blocks.items()
        if not (record.is_quantized or (record.tied_to is not None and blocks[record.tied_to].is_quantized))
    }


def adapted_projections(manifest: Manifest) -> tuple[dict[str, tuple[str, ...]], int]:
    """By id of a block, the projections that adapters change; and the ranks of all models' together."""
    found: dict[str, set[str]] = {}
    ranks: dict[tuple[str, ...], int] = {}  # by the adapters of a model: equal ones share theirs
    for model in manifest.models.values():
        specs = [manifest.adapters[key].spec for key in model.adapters.values()]
        ranks[tuple(model.adapters.values())] = max((spec.rank for spec in specs), default=0)
        for position, spec in zip(model.adapters, specs, strict=True):
            found.setdefault(model.chain[position], set()).update(lora.projection for lora in spec.loras)
    return {block_id: tuple(sorted(names)) for block_id, names in found.items()}, sum(ranks.values())


def _is_there(zoo: Zoo, key: str) -> bool:
    record = zoo.manifest.tensorrt_plans.get(key)
    path = tensorrt_plan_path(zoo.path, key)
    return record is not None and path.exists() and path.stat().st_size == record.num_bytes


def _build(
    zoo: Zoo,
    writer: ZooWriter,
    library: TensorRT,
    target: str,
    missing: dict[str, PlanRequest],
    progress: Progress,
) -> None:
    from blockzoo.engines.tensorrt.builder import PlanBuilder

    cache_name = timing_cache_name(library.library, library.version, target)
    cache = tensorrt_plan_path(zoo.path, cache_name)
    builder = PlanBuilder(library, cache.read_bytes() if cache.exists() else b"")
    what, total = f"building plans for {target}", len(missing)
    for done, (key, request) in enumerate(missing.items()):
        progress(what, done, total, request.part)
        block = zoo.read_block(request.baked_block) if request.baked_block is not None else None
        content, record = builder.build(request, block, _telling(progress, what, done, total, request.part))
        if block is not None:
            block.drop_pages()
        writer.add_tensorrt_plan(key, content)
        zoo.manifest.tensorrt_plans[key] = record
    if builder.timing_cache():
        writer.add_tensorrt_plan(cache_name, builder.timing_cache())
    progress(what, total, total)


def _telling(progress: Progress, what: str, done: int, total: int, part: str) -> "OnPhase":
    return lambda phase: progress(what, done, total, f"{part}: {phase}")


def unused_plans(zoo: Zoo) -> set[str]:
    """Keys of the plans that no block of the manifest can use."""
    return {key for key, count in users_of_plans(zoo.manifest).items() if not count}


def users_of_plans(manifest: Manifest) -> dict[str, int]:
    """By plan key, how many blocks can use it."""
    lora, _ = adapted_projections(manifest)
    blocks = blocks_with_plans(manifest)
    users = Counter(
        (shape_class(block.spec), part, names)
        for block_id, block in blocks.items()
        for part in parts_of(block.spec)
        for names in {(), part_lora(part, lora.get(block_id, ()))}
    )

    def count(plan: TensorRTPlanRecord) -> int:
        if plan.baked_block is not None:
            return int(plan.baked_block in blocks)
        return users[plan.spec, plan.part, plan.lora]

    return {key: count(plan) for key, plan in manifest.tensorrt_plans.items()}
