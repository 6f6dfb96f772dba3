"""TensorRT engines: plans of a zoo, run on one stream with the paged attention kernel between their parts.

A plan is loaded once however many blocks use it; a block is that plan and its weights on the device, which
are handed over by address before each run. All contexts work in one scratch arena.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from blockzoo.engines.base import EngineError, Precision
from blockzoo.engines.reference.attention import Attention, Inputs
from blockzoo.engines.reference.blocks import Delta, Weights, no_delta
from blockzoo.engines.reference.engine import AttnBlock, ReferenceEngine, ReferenceEngines, RowBlock
from blockzoo.engines.tensorrt.parts import WEIGHT_PARTS, Part
from blockzoo.engines.tensorrt.plans import Machine, choose_plan
from blockzoo.engines.tensorrt.shim import RTX_TARGETS, TensorRT, load_tensorrt, native_target
from blockzoo.zoo.blocks import AttnSpec, Block, FfnSpec
from blockzoo.zoo.manifest import TensorRTPlanRecord
from blockzoo.zoo.store import Zoo

_ALIGNMENT = 256  # bytes, of every address that TensorRT is given


class Plan(Protocol):
    """A loaded plan."""

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run it on its inputs by name, the weights among them; its only output."""


PlanLoader = Callable[[str, TensorRTPlanRecord], Plan]
"""(key, record) -> the loaded plan."""


class PlanAttn:
    """An attention block as two plans."""

    def __init__(self, pre: _PlanPart, post: _PlanPart, spec: AttnSpec) -> None:
        self._pre, self._post, self._spec = pre, post, spec

    def attend(
        self,
        x: torch.Tensor,
        inputs: Inputs,
        page_ids: torch.Tensor,
        attention: Attention,
        delta: Delta = no_delta,
    ) -> torch.Tensor:
        """Hidden states [T, hidden] -> attention output; K and V are written."""
        rotary = {name: inputs[name].flatten(1) for name in ("cos", "sin")}
        return attention.rotated(self._pre({"x": x, **rotary}), inputs, page_ids, self._spec)

    def post(self, attended: torch.Tensor, x: torch.Tensor, delta: Delta = no_delta) -> torch.Tensor:
        """Attention output and the hidden states before it -> those after it."""
        return self._post({"x": x, "attended": attended})


class PlanRows:
    """A feed-forward or output block as one plan."""

    def __init__(self, part: _PlanPart) -> None:
        self._part = part

    def __call__(self, x: torch.Tensor, delta: Delta = no_delta) -> torch.Tensor:
        """Hidden states [T, hidden] -> hidden states or logits."""
        return self._part({"x": x})


class _PlanPart:
    """A plan with one block's weights; more rows than its largest profile are run piece by piece."""

    def __init__(self, plan: Plan, record: TensorRTPlanRecord, weights: Mapping[str, torch.Tensor]) -> None:
        self._plan, self._weights = plan, weights
        self._max_rows = max(profile.max for profile in record.profiles)

    def __call__(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        count = len(rows["x"])
        pieces = [
            self._plan(
                {name: t[begin : begin + self._max_rows] for name, t in rows.items()} | dict(self._weights)
            )
            for begin in range(0, count, self._max_rows)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class TensorRTEngines(ReferenceEngines):
    """Makes engines from a zoo's TensorRT plans.

    Args:
        zoo: with plans for this machine (`zoo-compile --backend tensorrt`).
        precision: of the plans; None: bf16.
        device: "cuda" or "cuda:<n>"; None: the first GPU.
        cuda_graphs: record steps that repeat their shapes and replay them.
        machine, load: which plans are taken, and what runs them; None: this machine's GPU and TensorRT.

    Raises:
        EngineError: no GPU or no TensorRT here; later, from `span`, that no plan fits.
    """

    name = "tensorrt"

    def __init__(
        self,
        zoo: Zoo,
        precision: Precision | None = None,
        device: str | None = None,
        *,
        cuda_graphs: bool = True,
        machine: Machine | None = None,
        load: PlanLoader | None = None,
    ) -> None:
        if machine is None or load is None:
            if not torch.cuda.is_available():
                raise EngineError(
                    f"the tensorrt backend needs an NVIDIA GPU, and torch {torch.__version__} sees none; "
                    "use backend openvino or reference"
                )
            device = device or "cuda"
        super().__init__(precision or "bf16", device, cuda_graphs=cuda_graphs)
        self._zoo = zoo
        if machine is None or load is None:
            target = native_target() or ""
            library = load_tensorrt("tensorrt_rtx" if target in RTX_TARGETS else "tensorrt")
            machine = Machine(target, library.library, library.version)
            load = _DeviceRuntime(zoo, library, self.device)
        self._machine, self._load = machine, load
        self._plans: dict[str, Plan] = {}

    def facts(self) -> dict[str, Any]:
        """Backend, library version, precision and target."""
        machine = self._machine
        facts = {"backend": self.name, "version": machine.library_version, "library": machine.library}
        return facts | {"precision": self.precision, "target": machine.target}

    def span(
        self,
        blocks: Sequence[Block],
        *,
        drops_rows: bool = False,
        lora: Mapping[int, Sequence[str]] = {},
        scores: bool = False,
    ) -> ReferenceEngine:
        """Plans for consecutive blocks (no embed). Raises EngineError for blocks that take adapters."""
        if lora:
            raise EngineError(
                "the tensorrt backend serves no adapters yet: use backend reference, or merge them into "
                "checkpoints before zoo-compile"
            )
        return super().span(blocks, drops_rows=drops_rows, scores=scores)

    def _block(self, block: Block) -> AttnBlock | RowBlock:
        if isinstance(block.spec, AttnSpec):
            pre, post = self._part(block, "attn_pre"), self._part(block, "attn_post")
            return PlanAttn(pre, post, block.spec)
        return PlanRows(self._part(block, "ffn" if isinstance(block.spec, FfnSpec) else "head"))

    def _part(self, block: Block, part: Part) -> _PlanPart:
        records = self._zoo.manifest.tensorrt_plans
        key = choose_plan(records, block.id, block.spec, part, self.precision, self._machine)
        if key not in self._plans:
            self._plans[key] = self._load(key, records[key])
        baked = records[key].baked_block is not None
        weights = {} if baked else part_tensors(block, part, self.weights)
        return _PlanPart(self._plans[key], records[key], weights)


def part_tensors(block: Block, part: Part, weights: Weights) -> dict[str, torch.Tensor]:
    """The weights of one part of a block on the device, by input name."""
    return {
        name: weights.load(block, *sources)
        for name, sources in WEIGHT_PARTS[part].items()
        if sources[0] in block.tensors
    }


class _DeviceRuntime:
    """Loads plans on a GPU; all that it loads work in one scratch arena, on the current stream."""

    def __init__(self, zoo: Zoo, library: TensorRT, device: torch.device) -> None:
        self._zoo, self._library, self._device = zoo, library, device
        self._log = library.logger()
        self._runtime = library.module.Runtime(self._log.native)
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def __call__(self, key: str, record: TensorRTPlanRecord) -> _DevicePlan:
        engine = self._runtime.deserialize_cuda_engine(self._zoo.read_tensorrt_plan(key))
        if engine is None:
            raise EngineError(
                f"{self._library.title} could not load the plan {key[:12]} ({record.part} for "
                f"{record.target}, built by {record.library_version}): {self._log.text()}"
            )
        return _DevicePlan(engine, record, self)

    def scratch(self, num_bytes: int) -> torch.Tensor:
        """The arena, at least this large. It only grows, and while plans are loaded: never in a step."""
        if self._scratch.numel() < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._scratch

    def context(self, engine: Any) -> Any:
        """An execution context without memory of its own."""
        trt = self._library.module
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(f"{self._library.title} could not make a context: {self._log.text()}")
        return context

    def text(self) -> str:
        """What the library said last."""
        return self._log.text()


class _DevicePlan:
    """One deserialized plan with a context per profile; blocks take turns on one stream."""

    def __init__(self, engine: Any, record: TensorRTPlanRecord, runtime: _DeviceRuntime) -> None:
        self._engine, self._record, self._runtime = engine, record, runtime
        (self._output,) = record.outputs
        self._contexts = []
        for index in range(len(record.profiles)):
            context = runtime.context(engine)
            context.set_optimization_profile_async(index, torch.cuda.current_stream().cuda_stream)
            size = engine.get_device_memory_size_for_profile_v2(index)
            runtime.scratch(size)
            self._contexts.append((context, size))

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        rows = len(tensors["x"])
        profiles = self._record.profiles
        fitting = [i for i, p in enumerate(profiles) if p.min <= rows <= p.max]
        if not fitting:
            raise EngineError(f"{rows} rows fit no profile of {self._record.part}")
        context, size = self._contexts[fitting[0]]
        context.set_device_memory(self._runtime.scratch(size).data_ptr(), size)
        held = []  # copies live until the launch
        for value in self._record.inputs:
            tensor = tensors[value.name]
            if not tensor.is_contiguous() or tensor.data_ptr() % _ALIGNMENT:
                tensor = tensor.clone(memory_format=torch.contiguous_format)
                held.append(tensor)
            if -1 in value.shape:
                context.set_input_shape(value.name, tuple(tensor.shape))
            context.set_tensor_address(value.name, tensor.data_ptr())
        dtype = torch.float32 if self._output.dtype == "f32" else torch.bfloat16
        shape = [rows if size == -1 else size for size in self._output.shape]
        out = torch.empty(shape, dtype=dtype, device=tensors["x"].device)
        context.set_tensor_address(self._output.name, out.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError(f"TensorRT could not run {self._record.part}: {self._runtime.text()}")
        return out
