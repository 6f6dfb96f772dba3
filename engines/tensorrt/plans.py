"""Plans by what they are built from: their keys, and which of a zoo's plans fit a machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from blockzoo.engines.base import EngineError, Precision
from blockzoo.engines.tensorrt.parts import Part, part_lora, parts_of
from blockzoo.engines.tensorrt.shim import TITLES
from blockzoo.zoo.blocks import AttnSpec, BlockSpec, HeadSpec
from blockzoo.zoo.fingerprint import canonical_json
from blockzoo.zoo.manifest import OptimizationProfileRecord, TensorRTLibrary, TensorRTPlanRecord
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.strict_json import encode

DECODE = OptimizationProfileRecord("decode", 1, 8, 64)
PREFILL = OptimizationProfileRecord("prefill", 64, 512, 4096)

REVISION = 2
"""Of networks and builder settings: raise it when they change, so that no old plan is taken for a new one."""

_LORA_RANKS = (64, 4096)  # the least and the most that plans get room for


def shape_class(spec: BlockSpec) -> BlockSpec:
    """The operator without what its networks do not depend on.

    Rotary tables and attention windows reach the GPU as inputs and in the attention kernel; a tied head's
    network is that of any head.
    """
    if isinstance(spec, AttnSpec):
        return replace(spec, rope=RopeConfig("default", 0.0), sliding_window=0)
    return replace(spec, tied=False) if isinstance(spec, HeadSpec) else spec


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Everything that decides a plan's bytes.

    Attributes:
        part, spec: the network; `spec` is a `shape_class`.
        precision: of activations and weights.
        target: compute capability, "sm89".
        library, library_version: what compiles it.
        profiles: token count ranges.
        workspace_bytes: bound on scratch memory; None: the library's own.
        baked_block: id of the block whose weights become constants; None: weights are inputs.
        lora: projections of the part that take adapters.
        max_lora_ranks: of all adapters of a call together; 0 without `lora`.
        revision: of the networks.
    """

    part: Part
    spec: BlockSpec
    precision: Precision
    target: str
    library: TensorRTLibrary
    library_version: str
    profiles: tuple[OptimizationProfileRecord, ...]
    workspace_bytes: int | None = None
    baked_block: str | None = None
    lora: tuple[str, ...] = ()
    max_lora_ranks: int = 0
    revision: int = REVISION

    def key(self) -> str:
        """sha256 hex of the request."""
        return hashlib.sha256(canonical_json(encode(self))).hexdigest()


def plan_requests(
    spec: BlockSpec,
    precision: Precision,
    target: str,
    library: TensorRTLibrary,
    library_version: str,
    *,
    workspace_bytes: int | None = None,
    baked_block: str | None = None,
    lora: Sequence[str] = (),
    lora_ranks: int = 0,
) -> tuple[PlanRequest, ...]:
    """The plans of one block on one target, in the order in which they run; none for an embedding.

    The head runs on the last row of each sequence only: it has no prefill profile. A part with projections
    in `lora` gets a second plan that takes adapters, with room for `lora_ranks` ranks or more: calls without
    adapters run the first, and pay nothing for them.
    """
    profiles = (DECODE,) if spec.kind == "head" else (DECODE, PREFILL)
    plain = [
        PlanRequest(
            part=part,
            spec=shape_class(spec),
            precision=precision,
            target=target,
            library=library,
            library_version=library_version,
            profiles=profiles,
            workspace_bytes=workspace_bytes,
            baked_block=baked_block,
        )
        for part in parts_of(spec)
    ]
    least, most = _LORA_RANKS
    room = min(max(least, 1 << (lora_ranks - 1).bit_length()), most)
    adapted = [
        replace(request, lora=names, max_lora_ranks=room)
        for request in plain
        if (names := part_lora(request.part, lora))
    ]
    return (*plain, *adapted)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan must fit: this machine's compute capability and TensorRT library."""

    target: str
    library: TensorRTLibrary
    library_version: str

    def runs(self, plan: TensorRTPlanRecord) -> bool:
        """Whether the plan was built for this target by this library at the same major.minor version."""
        return (
            plan.target == self.target
            and plan.library == self.library
            and _minor(plan.library_version) == _minor(self.library_version)
        )

    def __str__(self) -> str:
        return f"{self.target} and {TITLES[self.library]} {_minor(self.library_version)}"


def choose_plan(
    plans: Mapping[str, TensorRTPlanRecord],
    block_id: str,
    spec: BlockSpec,
    part: Part,
    precision: Precision,
    machine: Machine,
    lora: Sequence[str] = (),
) -> str:
    """The key of the plan that serves one part of a block here; a plan with its weights baked in wins.

    Args:
        plans: of the zoo, by key.
        block_id, spec, part: what is to run.
        precision, machine: where.
        lora: projections of the block whose adapters the plan takes as inputs.

    Raises:
        EngineError: the zoo has no such plan, or only for other machines.
    """
    wanted, names = shape_class(spec), part_lora(part, lora)
    of_part = {
        key: plan
        for key, plan in plans.items()
        if plan.part == part
        and plan.spec == wanted
        and plan.precision == precision
        and plan.baked_block in (None, block_id)
        and plan.lora == names
    }
    fitting = [key for key, plan in of_part.items() if machine.runs(plan)]
    if fitting:
        return max(
            fitting, key=lambda key: (plans[key].baked_block is not None, plans[key].max_lora_ranks, key)
        )
    advice = f"run zoo-compile --backend tensorrt --target {machine.target} on the zoo"
    if not of_part:
        what = f"{part} of block {block_id[:12]} in {precision}"
        what += f" with adapters on {', '.join(names)}" if names else ""
        raise EngineError(f"the zoo has no TensorRT plan for {what}; {advice}")
    seen = sorted({f"{p.target} / {TITLES[p.library]} {_minor(p.library_version)}" for p in of_part.values()})
    raise EngineError(
        f"plan is for {', '.join(seen)}, this machine has {machine} ({part} of block {block_id[:12]}); "
        f"{advice}"
    )


def _minor(version: str) -> str:
    """Major and minor: serialized plans are good for one of these."""
    return ".".join(version.split(".")[:2])
