"""Torch engines: spans run block by block on tensors that stay on one device."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch

from blockzoo.engines.arrays import Arrays
from blockzoo.engines.base import EngineError, Precision, SpanSpec
from blockzoo.engines.reference.arrays import TORCH_DTYPES, TorchArrays
from blockzoo.engines.reference.attention import DenseAttention, Inputs, Norms
from blockzoo.engines.reference.blocks import Operators, TorchAttn, TorchFfn, TorchHead, Weights
from blockzoo.zoo.blocks import AttnSpec, Block, FfnSpec, HeadSpec

Attention = Callable[[torch.Tensor, Inputs, torch.Tensor, AttnSpec, Norms | None], torch.Tensor]
TorchBlock = TorchAttn | TorchFfn | TorchHead


class ReferenceEngine:
    """A span in torch. Not thread-safe: one caller at a time."""

    def __init__(self, spec: SpanSpec, blocks: Sequence[TorchBlock], attention: Attention) -> None:
        self.spec = spec
        self._blocks, self._attention = tuple(blocks), attention
        self._bound: dict[str, torch.Tensor] = {}

    def bind(self, name: str, array: torch.Tensor) -> None:
        """Bind an input or output; see `engines.base.Engine` for names, types and shapes."""
        self._bound[name] = array

    def run(self) -> None:
        """Start the span on what is bound; on a GPU it returns before the outputs are written."""
        bound = self._bound
        x = bound["hidden"]
        num_layers = len(self.spec.layers)
        if self.spec.drops_rows and not num_layers:
            x = x[bound["rows"]]
        layer = 0
        for block in self._blocks:
            if isinstance(block, TorchAttn):
                page_ids = bound[f"block_indices.{layer}"]
                attended = self._attention(block.pre(x), bound, page_ids, block.spec, block.qk_norms)
                layer += 1
                if self.spec.drops_rows and layer == num_layers:
                    attended, x = attended[bound["rows"]], x[bound["rows"]]
                x = block.post(attended, x)
            else:
                x = block(x)
        bound["logits" if self.spec.head else "hidden_out"].copy_(x)


class ReferenceEngines:
    """Makes torch engines.

    Args:
        precision: None takes bf16 on a GPU and f32 on the CPU.
        device: "cpu", "cuda" or "cuda:<n>"; None takes a GPU where there is one.
        num_threads: torch's compute threads on the CPU, for the whole process; None leaves them.

    Raises:
        EngineError: there is no such device here.
    """

    name = "reference"

    def __init__(
        self, precision: Precision | None = None, device: str | None = None, num_threads: int | None = None
    ) -> None:
        self.device = _find_device(device)
        self.precision: Precision = precision or ("bf16" if self.device.type == "cuda" else "f32")
        self.arrays: Arrays = TorchArrays(self.device, self.precision)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.weights = Weights(TORCH_DTYPES[self.precision], self.device)
        self._ops = Operators()
        self._attention: Attention = DenseAttention()

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

    def span(self, blocks: Sequence[Block], *, drops_rows: bool = False) -> ReferenceEngine:
        """Put consecutive blocks (no embed) on the device; blocks that are there already are shared."""
        spec = SpanSpec(tuple(block.spec for block in blocks), drops_rows)
        return ReferenceEngine(spec, [self._block(block) for block in blocks], self._attention)

    def _block(self, block: Block) -> TorchBlock:
        makers: dict[type, Any] = {AttnSpec: TorchAttn, FfnSpec: TorchFfn, HeadSpec: TorchHead}
        loaded: TorchBlock = makers[type(block.spec)].load(block, self.weights, self._ops)
        return loaded


class TorchEmbedding:
    """An embed block's table on the device."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table
        self.vocab_size: int = table.shape[0]

    def lookup(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Write the rows of `token_ids` (int32 [n]) to `out` [n, hidden]."""
        torch.index_select(self._table, 0, token_ids, out=out)


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
