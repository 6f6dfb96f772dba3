"""TensorRT engines: plans of a zoo, run on one stream with the paged attention kernel between their parts.

A plan is loaded once however many blocks use it; a block is that plan and its weights on the device, which
are handed over by address before each run (`device`). A block that takes adapters has a second plan with
them as inputs over the same weights: calls without adapters run the first.

Quantized blocks have no plans: torch and Triton-language kernels run them, over weights that stay packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from blockzoo.engines.base import EngineError, Precision, SpanSpec
from blockzoo.engines.reference.attention import Attention
from blockzoo.engines.reference.blocks import NO_LORA, LayerCall, Lora, Weights
from blockzoo.engines.reference.engine import AttnBlock, ReferenceEngine, ReferenceEngines, RowBlock
from blockzoo.engines.tensorrt.device import DeviceRuntime
from blockzoo.engines.tensorrt.parts import WEIGHT_PARTS, Part, part_lora
from blockzoo.engines.tensorrt.plans import Machine, choose_plan
from blockzoo.engines.tensorrt.shim import RTX_TARGETS, TensorRT, load_tensorrt, native_target
from blockzoo.zoo.blocks import AttnSpec, Block, FfnSpec
from blockzoo.zoo.manifest import TensorRTPlanRecord
from blockzoo.zoo.store import Zoo


class Plan(Protocol):
    """A loaded plan."""

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run it on its inputs by name, the weights among them; its only output."""


class PlanAttn:
    """An attention block as two plans."""

    def __init__(self, pre: _PlanPart, post: _PlanPart, spec: AttnSpec) -> None:
        self._pre, self._post, self._spec = pre, post, spec

    def attend(self, x: torch.Tensor, call: LayerCall, lora: Lora = NO_LORA) -> torch.Tensor:
        """Hidden states [T, hidden] -> attention output; K and V are written."""
        rotary = {name: call.inputs[name].flatten(1) for name in ("cos", "sin")}
        qkv = self._pre({"x": x, **rotary}, lora)
        return call.attention.rotated(qkv, call.inputs, call.page_ids, self._spec)

    def post(self, attended: torch.Tensor, x: torch.Tensor, lora: Lora = NO_LORA) -> torch.Tensor:
        """Attention output and the hidden states before it -> those after it."""
        return self._post({"x": x, "attended": attended}, lora)


class PlanRows:
    """A feed-forward or output block as one plan."""

    def __init__(self, part: _PlanPart) -> None:
        self._part = part

    def __call__(self, x: torch.Tensor, lora: Lora = NO_LORA) -> torch.Tensor:
        """Hidden states [T, hidden] -> hidden states or logits."""
        return self._part({"x": x}, lora)


class _Loaded(NamedTuple):
    """A plan and the weights of one block that it takes; none where they are baked in."""

    plan: Plan
    record: TensorRTPlanRecord
    weights: Mapping[str, torch.Tensor]


class _PlanPart:
    """One part of a block: its plan, and that with adapters where it takes some.

    More rows than the largest profile are run piece by piece.
    """

    def __init__(self, plain: _Loaded, adapted: _Loaded | None) -> None:
        self._plain, self._adapted = plain, adapted

    def __call__(self, rows: Mapping[str, torch.Tensor], lora: Lora) -> torch.Tensor:
        chosen, fixed = self._plain, {}
        if lora.mask is not None and self._adapted is not None:
            chosen, record = self._adapted, self._adapted.record
            if lora.mask.shape[1] > record.max_lora_ranks:
                raise EngineError(
                    f"the adapters of a step have {lora.mask.shape[1]} ranks together, the plans have room "
                    f"for {record.max_lora_ranks}: run zoo-compile --backend tensorrt on the zoo again, or "
                    "lower max_num_seqs"
                )
            rows = {**rows, "lora_mask": lora.mask}
            for name in record.lora:
                fixed[f"lora_a.{name}"], fixed[f"lora_b.{name}"] = lora.pairs[name]
        fixed |= chosen.weights
        most = max(profile.max for profile in chosen.record.profiles)
        pieces = [
            chosen.plan({name: t[begin : begin + most] for name, t in rows.items()} | fixed)
            for begin in range(0, len(rows["x"]), most)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class SideStreamEngine(ReferenceEngine):
    """A span on a stream of its own where it would run on the default one: there TensorRT waits for the GPU
    in every run. What comes before and after on the default stream keeps its order."""

    def __init__(
        self,
        spec: SpanSpec,
        blocks: Sequence[AttnBlock | RowBlock],
        attention: Attention,
        stream: torch.cuda.Stream,
    ) -> None:
        super().__init__(spec, blocks, attention)
        self._stream = stream

    def run(self) -> None:
        """Start the span on what is bound."""
        device = self._stream.device
        current = torch.cuda.current_stream(device)
        if current != torch.cuda.default_stream(device):
            super().run()
            return
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            super().run()
        current.wait_stream(self._stream)


class TensorRTEngines(ReferenceEngines):
    """Makes engines from a zoo's TensorRT plans.

    Args:
        zoo: with plans for this machine (`zoo-compile --backend tensorrt`).
        precision: of the plans; None: bf16.
        device: "cuda" or "cuda:<n>"; None: the first GPU.
        cuda_graphs: record steps that repeat their shapes and replay them.
        machine, library: which plans are taken, and what runs them; None: this machine's GPU and TensorRT.

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
        library: TensorRT | None = None,
    ) -> None:
        if machine is None or library is None:
            if device is not None and not device.startswith("cuda"):
                raise EngineError(f"device {device!r}: the tensorrt backend runs on cuda or cuda:<n> only")
            if not torch.cuda.is_available():
                raise EngineError(
                    f"the tensorrt backend needs an NVIDIA GPU, and torch {torch.__version__} sees none; "
                    "use backend openvino or reference"
                )
            device = device or "cuda"
        super().__init__(precision or "bf16", device, cuda_graphs=cuda_graphs)
        self._records = zoo.manifest.tensorrt_plans
        if machine is None or library is None:
            target = native_target(self.device) or ""
            library = load_tensorrt("tensorrt_rtx" if target in RTX_TARGETS else "tensorrt")
            machine = Machine(target, library.library, library.version)
        self._machine = machine
        self._load = DeviceRuntime(zoo.read_tensorrt_plan, library, self.device, self._is_settling)
        self._plans: dict[str, Plan] = {}
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def follow(self, zoo: Zoo) -> None:
        """Take plans from this zoo."""
        self._records, self._load.read = zoo.manifest.tensorrt_plans, zoo.read_tensorrt_plan

    def facts(self) -> dict[str, Any]:
        """Backend, library version, precision and target."""
        machine = self._machine
        facts = {"backend": self.name, "version": machine.library_version, "library": machine.library}
        return facts | {"precision": self.precision, "target": machine.target}

    def _engine(self, spec: SpanSpec, blocks: Sequence[AttnBlock | RowBlock]) -> ReferenceEngine:
        if self._stream is None:
            return super()._engine(spec, blocks)
        return SideStreamEngine(spec, blocks, self._attention, self._stream)

    def _block(self, block: Block, lora: Sequence[str]) -> AttnBlock | RowBlock:
        if any(tensor.scales is not None for tensor in block.tensors.values()):
            return super()._block(block, lora)
        if isinstance(block.spec, AttnSpec):
            pre, post = (self._part(block, part, lora) for part in ("attn_pre", "attn_post"))
            return PlanAttn(pre, post, block.spec)
        return PlanRows(self._part(block, "ffn" if isinstance(block.spec, FfnSpec) else "head", lora))

    def _part(self, block: Block, part: Part, lora: Sequence[str]) -> _PlanPart:
        adapted = self._loaded(block, part, lora) if part_lora(part, lora) else None
        return _PlanPart(self._loaded(block, part, ()), adapted)

    def _loaded(self, block: Block, part: Part, lora: Sequence[str]) -> _Loaded:
        records = self._records
        key = choose_plan(records, block.id, block.spec, part, self.precision, self._machine, lora)
        if key not in self._plans:
            self._plans[key] = self._load(key, records[key])
        baked = records[key].baked_block is not None
        weights = {} if baked else part_tensors(block, part, self.weights)
        return _Loaded(self._plans[key], records[key], weights)


def part_tensors(block: Block, part: Part, weights: Weights) -> dict[str, torch.Tensor]:
    """The weights of one part of a block on the device, by input name."""
    return {
        name: weights.load(block, *sources)
        for name, sources in WEIGHT_PARTS[part].items()
        if sources[0] in block.tensors
    }
