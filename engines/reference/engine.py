"""Torch engines: spans run block by block on tensors that stay on one device."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from blockzoo.engines.arrays import Arrays
from blockzoo.engines.base import EngineError, Precision, SpanSpec
from blockzoo.engines.kv_pages import KVPrecision, goes_with
from blockzoo.engines.reference.arrays import TORCH_DTYPES, PackedMatrix, TorchArrays
from blockzoo.engines.reference.attention import Attention, DenseAttention
from blockzoo.engines.reference.blocks import (
    NO_LORA,
    LayerCall,
    Lora,
    Matrix,
    Operators,
    TorchAttn,
    TorchFfn,
    TorchHead,
    Weights,
)
from blockzoo.zoo.blocks import AttnSpec, Block, FfnSpec, HeadSpec
from blockzoo.zoo.store import Zoo


class AttnBlock(Protocol):
    """An attention block on the device, in two parts."""

    def attend(self, x: torch.Tensor, call: LayerCall, lora: Lora = NO_LORA) -> torch.Tensor:
        """Hidden states [T, hidden] -> attention output; K and V are written."""

    def post(self, attended: torch.Tensor, x: torch.Tensor, lora: Lora = NO_LORA) -> torch.Tensor:
        """Attention output and the hidden states before it -> those after it."""


class RowBlock(Protocol):
    """A feed-forward or output block on the device: row by row (no adapter changes an output block)."""

    def __call__(self, x: torch.Tensor, lora: Lora = NO_LORA) -> torch.Tensor:
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
        return self._attention.packed_scores(self._bound)

    def release_memory(self) -> None:
        """Nothing to give back: torch frees what a run took."""

    def run(self) -> None:
        """Start the span on what is bound; on a GPU it returns before the outputs are written."""
        with torch.cuda.device_of(self._bound["hidden"]):  # what kernels are launched on, per thread
            self._run()

    def _run(self) -> None:
        bound = self._bound
        x, mask = bound["hidden"], self._lora_mask()
        num_layers = len(self.spec.layers)
        if self.spec.drops_rows and not num_layers:
            x, mask = self._kept(x), self._kept(mask)
        if self.spec.scores:
            bound["scores"] = self._attention.no_scores(bound)
        layer = 0
        for index, (spec, block) in enumerate(zip(self.spec.specs, self._blocks, strict=True)):
            if isinstance(spec, AttnSpec):
                call = LayerCall(bound, bound[f"block_indices.{layer}"], self._attention)
                attended = block.attend(x, call, self._adapters(index, mask))
                layer += 1
                if self.spec.drops_rows and layer == num_layers:
                    attended, x, mask = self._kept(attended), self._kept(x), self._kept(mask)
                x = block.post(attended, x, self._adapters(index, mask))
            else:
                x = block(x, self._adapters(index, mask))
        bound["logits" if self.spec.head else "hidden_out"].copy_(x)

    def _lora_mask(self) -> torch.Tensor | None:
        """The mask of the call's adapters; None where it has none."""
        mask = self._bound["lora_mask"] if self._lora else None
        return mask if mask is not None and mask.shape[1] else None

    def _kept(self, rows: torch.Tensor | None) -> Any:
        return None if rows is None else rows.index_select(0, self._bound["rows"])

    def _adapters(self, index: int, mask: torch.Tensor | None) -> Lora:
        """What the adapters add to the products of a block, on the rows of `mask`."""
        names, bound = self._lora.get(index, ()), self._bound
        if mask is None or not names:
            return NO_LORA
        pairs = {name: (bound[f"lora_a.{index}.{name}"], bound[f"lora_b.{index}.{name}"]) for name in names}
        return Lora(mask, pairs)


class ReferenceEngines:
    """Makes torch engines.

    Args:
        precision: None takes bf16 on a GPU and f32 on the CPU.
        device: "cpu", "cuda" or "cuda:<n>"; None takes a GPU where there is one.
        cuda_graphs: on a GPU, record steps that repeat their shapes and replay them.
        num_threads: torch's compute threads on the CPU, for the whole process; None leaves them.
        kv_precision: of K and V in pages (`kv_pages`), on the CPU alone: see `OpenVINOEngines`. None: the
            precision.

    Raises:
        EngineError: there is no such device here, or it has no kernels for such KV.
    """

    name = "reference"

    def __init__(
        self,
        precision: Precision | None = None,
        device: str | None = None,
        num_threads: int | None = None,
        *,
        cuda_graphs: bool = True,
        kv_precision: KVPrecision | None = None,
    ) -> None:
        self.device = _find_device(device)
        self.precision: Precision = precision or ("bf16" if self.device.type == "cuda" else "f32")
        self.kv_precision: KVPrecision = kv_precision or self.precision
        fit = goes_with(self.precision) if self.device.type == "cpu" else (self.precision,)
        if self.kv_precision not in fit:
            raise EngineError(
                f"KV in {kv_precision} was asked for, which on {self.device.type} beside activations in "
                f"{self.precision} is {' or '.join(fit)}: leave it out"
            )
        torch_arrays = TorchArrays(self.device, self.precision, cuda_graphs, self.kv_precision)
        self.arrays: Arrays = torch_arrays
        self._is_settling = lambda: torch_arrays.settling
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.weights = Weights(TORCH_DTYPES[self.precision], self.device)
        self.operators, self._attention = _operators(self.device)

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
        facts = {"backend": self.name, "version": self.version, "precision": self.precision, "target": target}
        return facts | ({"kv": self.kv_precision} if self.kv_precision != self.precision else {})

    def expect(self, num_spans: int) -> None:
        """Nothing to share out: engines keep their weights alone."""

    def follow(self, zoo: Zoo) -> None:
        """Nothing to do: engines are made of blocks alone."""

    def embedding(self, block: Block) -> TorchEmbedding:
        """The look-up of an embed block, on the device."""
        return TorchEmbedding(self.weights.matrix(block, "weight"))

    def span(
        self,
        blocks: Sequence[Block],
        *,
        drops_rows: bool = False,
        lora: Mapping[int, Sequence[str]] = {},
        scores: bool = False,
        drafts: bool = False,
    ) -> ReferenceEngine:
        """Put consecutive blocks (no embed) on the device; blocks that are there already are shared."""
        targets = tuple((index, tuple(names)) for index, names in sorted(lora.items()))
        spec = SpanSpec(tuple(block.spec for block in blocks), drops_rows, targets, scores)
        found = dict(targets)
        loaded = [self._block(block, found.get(index, ())) for index, block in enumerate(blocks)]
        return self._engine(spec, loaded)

    def _engine(self, spec: SpanSpec, blocks: Sequence[AttnBlock | RowBlock]) -> ReferenceEngine:
        return ReferenceEngine(spec, blocks, self._attention)

    def _block(self, block: Block, lora: Sequence[str]) -> AttnBlock | RowBlock:
        makers: dict[type, Any] = {AttnSpec: TorchAttn, FfnSpec: TorchFfn, HeadSpec: TorchHead}
        loaded: AttnBlock | RowBlock = makers[type(block.spec)].load(block, self.weights, self.operators)
        return loaded


class TorchEmbedding:
    """An embed block's table on the device."""

    def __init__(self, table: Matrix) -> None:
        self._table = table
        self.vocab_size: int = table.shape[0]

    def lookup(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Write the rows of `token_ids` (int32 [n]) to `out` [n, hidden]."""
        if isinstance(self._table, PackedMatrix):
            out.copy_(self._table.dense(token_ids))
        else:
            torch.index_select(self._table, 0, token_ids, out=out)


def _operators(device: torch.device) -> tuple[Operators, Attention]:
    """Kernels on a GPU, plain torch on the CPU."""
    if device.type != "cuda":
        return Operators(), DenseAttention()
    from blockzoo.engines.tensorrt.attention import PagedAttention
    from blockzoo.engines.tensorrt.operators import FusedOperators

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
