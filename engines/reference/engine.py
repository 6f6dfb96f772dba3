"""Torch engines: spans run block by block on tensors that stay on one device."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from blockzoo.engines.arrays import Arrays
from blockzoo.engines.base import EngineError, Precision, SpanSpec
from blockzoo.engines.reference.arrays import TORCH_DTYPES, TorchArrays
from blockzoo.engines.reference.attention import Attention, DenseAttention, Inputs
from blockzoo.engines.reference.blocks import (
    Delta,
    Operators,
    TorchAttn,
    TorchFfn,
    TorchHead,
    Weights,
    no_delta,
)
from blockzoo.zoo.blocks import AttnSpec, Block, FfnSpec, HeadSpec


class AttnBlock(Protocol):
    """An attention block on the device, in two parts."""

    def attend(
        self,
        x: torch.Tensor,
        inputs: Inputs,
        page_ids: torch.Tensor,
        attention: Attention,
        delta: Delta = no_delta,
    ) -> torch.Tensor:
        """Hidden states [T, hidden] -> attention output; K and V are written."""

    def post(self, attended: torch.Tensor, x: torch.Tensor, delta: Delta = no_delta) -> torch.Tensor:
        """Attention output and the hidden states before it -> those after it."""


class RowBlock(Protocol):
    """A feed-forward or output block on the device: row by row (a feed-forward one takes a delta too)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, hidden] -> hidden states or logits."""


class ReferenceEngine:
    """A span in torch. Not thread-safe: one caller at a time."""

    def __init__(self, spec: SpanSpec, blocks: Sequence[AttnBlock | RowBlock], attention: Attention) -> None:
        self.spec = spec
        self._blocks: tuple[Any, ...] = tuple(blocks)  # of the protocol that its spec asks for
        self._attention, self._lora = attention, dict(spec.lora)
        self._bound: dict[str, torch.Tensor] = {}

    def bind(self, name: str, array: torch.Tensor) -> None:
        """Bind an input or output; see `engines.base.Engine` for names, types and shapes."""
        self._bound[name] = array

    def scores(self) -> torch.Tensor:
        """The caller's own; see `engines.base.Engine`."""
        return self._bound["scores"]

    def release_memory(self) -> None:
        """Nothing to give back: torch frees what a run took."""

    def run(self) -> None:
        """Start the span on what is bound; on a GPU it returns before the outputs are written."""
        bound = self._bound
        x = bound["hidden"]
        num_layers = len(self.spec.layers)
        if self.spec.drops_rows and not num_layers:
            x = x.index_select(0, bound["rows"])
        if self.spec.scores:
            context = int(bound["past_lens"].sum()) + len(x)
            bound["scores"] = torch.zeros(context, dtype=torch.float32, device=x.device)
        layer, dropped = 0, self.spec.drops_rows and not num_layers
        for index, (spec, block) in enumerate(zip(self.spec.specs, self._blocks, strict=True)):
            delta = self._delta(index, dropped)
            if isinstance(spec, AttnSpec):
                attended = block.attend(x, bound, bound[f"block_indices.{layer}"], self._attention, delta)
                layer += 1
                if self.spec.drops_rows and layer == num_layers:
                    attended, x = (rows.index_select(0, bound["rows"]) for rows in (attended, x))
                    dropped = True
                x = block.post(attended, x, self._delta(index, dropped))
            elif isinstance(spec, FfnSpec):
                x = block(x, delta)
            else:
                x = block(x)
        bound["logits" if self.spec.head else "hidden_out"].copy_(x)

    def _delta(self, index: int, dropped: bool) -> Delta:
        """What the adapters add to the products of a block, before or after rows have left."""
        names, bound = self._lora.get(index, ()), self._bound
        if not names:
            return no_delta

        def delta(x: torch.Tensor, name: str) -> torch.Tensor | None:
            if name not in names:
                return None
            mask = bound["lora_mask"]
            a, b = bound[f"lora_a.{index}.{name}"], bound[f"lora_b.{index}.{name}"]
            return ((x @ a.T) * (mask.index_select(0, bound["rows"]) if dropped else mask)) @ b

        return delta


class ReferenceEngines:
    """Makes torch engines.

    Args:
        precision: None takes bf16 on a GPU and f32 on the CPU.
        device: "cpu", "cuda" or "cuda:<n>"; None takes a GPU where there is one.
        cuda_graphs: on a GPU, record steps that repeat their shapes and replay them.
        num_threads: torch's compute threads on the CPU, for the whole process; None leaves them.

    Raises:
        EngineError: there is no such device here.
    """

    name = "reference"

    def __init__(
        self,
        precision: Precision | None = None,
        device: str | None = None,
        num_threads: int | None = None,
        *,
        cuda_graphs: bool = True,
    ) -> None:
        self.device = _find_device(device)
        self.precision: Precision = precision or ("bf16" if self.device.type == "cuda" else "f32")
        self.arrays: Arrays = TorchArrays(self.device, self.precision, record=cuda_graphs)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.weights = Weights(TORCH_DTYPES[self.precision], self.device)
        self._ops, self._attention = _operators(self.device)

    @property
    def version(self) -> str:
        """The torch version in use."""
        return str(torch.__version__)

    def facts(self) -> dict[str, Any]:
        """Backend, version, precision and device, for manifests and reports."""
        if self.device.type == "cuda":
            target = torch.cuda.get_device_name(self.device)
        else:
            target = platform.processor() or platform.machine()
        return {"backend": self.name, "version": self.version, "precision": self.precision, "target": target}

    def embedding(self, block: Block) -> TorchEmbedding:
        """The look-up of an embed block, on the device."""
        return TorchEmbedding(self.weights.load(block, "weight"))

    def span(
        self,
        blocks: Sequence[Block],
        *,
        drops_rows: bool = False,
        lora: Mapping[int, Sequence[str]] = {},
        scores: bool = False,
    ) -> ReferenceEngine:
        """Put consecutive blocks (no embed) on the device; blocks that are there already are shared.

        Raises:
            EngineError: scores are wanted of a GPU's kernels, which give none.
        """
        if scores and self.device.type != "cpu":
            raise EngineError(
                f"the attention kernels of {self.device} give no scores; choose another selector of "
                "approximate reuse, as head-of-run"
            )
        targets = tuple((index, tuple(names)) for index, names in sorted(lora.items()))
        spec = SpanSpec(tuple(block.spec for block in blocks), drops_rows, targets, scores)
        return ReferenceEngine(spec, [self._block(block) for block in blocks], self._attention)

    def _block(self, block: Block) -> AttnBlock | RowBlock:
        makers: dict[type, Any] = {AttnSpec: TorchAttn, FfnSpec: TorchFfn, HeadSpec: TorchHead}
        loaded: AttnBlock | RowBlock = makers[type(block.spec)].load(block, self.weights, self._ops)
        return loaded


class TorchEmbedding:
    """An embed block's table on the device."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table
        self.vocab_size: int = table.shape[0]

    def lookup(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Write the rows of `token_ids` (int32 [n]) to `out` [n, hidden]."""
        torch.index_select(self._table, 0, token_ids, out=out)


def _operators(device: torch.device) -> tuple[Operators, Attention]:
    """Kernels on a GPU, plain torch on the CPU."""
    if device.type != "cuda":
        return Operators(), DenseAttention()
    from blockzoo.engines.tensorrt.attention import FusedOperators, PagedAttention

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return FusedOperators(), PagedAttention(processors)


def _find_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device {name!r}: expected cpu, cuda or cuda:<n> ({error})") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            f"device {name!r} was asked for, but torch {torch.__version__} sees no GPU; use cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device {name!r}: expected cpu, cuda or cuda:<n>")
    return device
