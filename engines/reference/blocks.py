"""Blocks in torch: weights on the device, and the operators between the attentions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch.nn.functional import linear, rms_norm, silu

from blockzoo.engines.reference.arrays import PackedMatrices, PackedMatrix, weight_tensor
from blockzoo.engines.reference.attention import Attention, Inputs
from blockzoo.zoo.blocks import AttnSpec, Block, FfnSpec, HeadSpec
from blockzoo.zoo.tensors import runs_of_a_type
from blockzoo.zoo.tensors import stacked as stacked_tensor

Pair = tuple[torch.Tensor, torch.Tensor]
Matrix: TypeAlias = torch.Tensor | PackedMatrix | PackedMatrices


@dataclass(frozen=True, slots=True)
class Lora:
    """What the adapters of a call add to the projections of one block (see `engines.base.Engine`).

    Attributes:
        mask: [T, Q]; None in a call without adapters.
        pairs: by projection, A [Q, in] and B [Q, out].
    """

    mask: torch.Tensor | None = None
    pairs: Mapping[str, Pair] = field(default_factory=dict)

    def add_to(self, y: torch.Tensor, x: torch.Tensor, name: str, ops: Operators) -> None:
        """Add to y [T, out], the projection `name` of x, in place; y may be some columns of a matrix."""
        if self.mask is not None and name in self.pairs:
            ops.add_adapters(y, x, *self.pairs[name], self.mask)


NO_LORA = Lora()


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One layer's attention in one call: the engine's inputs, the layer's `block_indices`, who attends."""

    inputs: Inputs
    page_ids: torch.Tensor
    attention: Attention


class Weights:
    """Device copies of blocks' tensors: one that several use is loaded once, and goes with them.

    Args:
        dtype, device: of the copies.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._loaded: WeakValueDictionary[tuple[str, ...], Matrix] = WeakValueDictionary()

    def load(self, block: Block, *names: str) -> torch.Tensor:
        """The block's tensors of these names, none of them quantized, on top of each other (one product
        instead of three)."""
        return self._kept(block, names, lambda: self._dense(block, names))

    def matrix(self, block: Block, *names: str) -> Matrix:
        """The same of matrices, which stay packed where they are quantized."""
        return self._kept(block, names, lambda: self._packed(block, names))

    def maybe(self, block: Block, *names: str) -> torch.Tensor | None:
        """`load`, or None where the block has no such tensors."""
        return self.load(block, *names) if names[0] in block.tensors else None

    @property
    def num_bytes(self) -> int:
        """Device memory of all that was loaded."""
        return sum(tensor.nbytes for tensor in self._loaded.values())

    def _kept(self, block: Block, names: tuple[str, ...], make: Callable[[], Any]) -> Any:
        # the tied matrix of a head is keyed by its file, which is the embed block's
        owner = str(block.files[-1].path) if names == ("weight",) and block.files else block.id
        key = (owner, *names)
        found = self._loaded.get(key)
        if found is None:
            found = self._loaded[key] = make()
        return found

    def _dense(self, block: Block, names: tuple[str, ...]) -> torch.Tensor:
        parts = [weight_tensor(block.tensors[name], self._dtype, self._device) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _packed(self, block: Block, names: tuple[str, ...]) -> Matrix:
        tensors = [block.tensors[name] for name in names]
        if any(tensor.scales is None for tensor in tensors):
            return weight_tensor(stacked_tensor(tensors), self._dtype, self._device)
        packed = [
            PackedMatrix(stacked_tensor(run), self._dtype, self._device) for run in runs_of_a_type(tensors)
        ]
        return packed[0] if len(packed) == 1 else PackedMatrices(packed)


def dense(matrix: Matrix) -> torch.Tensor:
    """The values of a matrix: packed ones are unpacked."""
    return matrix if isinstance(matrix, torch.Tensor) else matrix.dense()


class Operators:
    """Operators of blocks, in torch; a backend with kernels of its own replaces them."""

    def product(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T (+ bias): [T, in] -> [T, out]."""
        return linear(x, dense(weight), bias)

    def product_added(self, to: torch.Tensor, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        """to + x W^T, rounded once: [T, out] and [T, in] -> [T, out]."""
        return torch.addmm(to, x, dense(weight).T)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm over the last dimension, in float32 inside."""
        return rms_norm(x, x.shape[-1:], weight, eps)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 * inner]: gate first."""
        gate, up = gate_up.chunk(2, 1)
        return silu(gate) * up

    def add_adapters(
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """y += ((x A^T) * mask) B in place.

        Args:
            y: [T, out], columns side by side; its rows may be any number of elements apart.
            x: [T, in]. a: [ranks, in]. b: [ranks, out]: all adapters' ranks side by side.
            mask: [T, ranks]: not 0 in the ranks of the row's own adapter.
        """
        y.add_(((x @ a.T) * mask) @ b)


@dataclass(frozen=True, slots=True)
class TorchAttn:
    """The two sides of an attention block."""

    spec: AttnSpec
    norm: torch.Tensor
    qkv: Matrix
    qkv_bias: torch.Tensor | None
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    o: Matrix
    o_bias: torch.Tensor | None
    ops: Operators

    @classmethod
    def load(cls, block: Block, weights: Weights, ops: Operators) -> TorchAttn:
        """Put the block on the device."""
        assert isinstance(block.spec, AttnSpec)
        norms = (weights.load(block, "q_norm"), weights.load(block, "k_norm")) if block.spec.qk_norm else None
        return cls(
            spec=block.spec,
            norm=weights.load(block, "norm"),
            qkv=weights.matrix(block, "q", "k", "v"),
            qkv_bias=weights.maybe(block, "q_bias", "k_bias", "v_bias"),
            qk_norms=norms,
            o=weights.matrix(block, "o"),
            o_bias=weights.maybe(block, "o_bias"),
            ops=ops,
        )

    def pre(self, x: torch.Tensor, lora: Lora = NO_LORA) -> torch.Tensor:
        """Hidden states [T, hidden] -> q, k, v side by side, neither normed nor rotated."""
        normed = self.ops.norm(x, self.norm, self.spec.rms_norm_eps)
        qkv = self.ops.product(normed, self.qkv, self.qkv_bias)
        q_size, kv_size = (n * self.spec.head_dim for n in (self.spec.num_heads, self.spec.num_kv_heads))
        _add_side_by_side(qkv, normed, {"q": q_size, "k": kv_size, "v": kv_size}, lora, self.ops)
        return qkv

    def attend(self, x: torch.Tensor, call: LayerCall, lora: Lora = NO_LORA) -> torch.Tensor:
        """Hidden states [T, hidden] -> attention output; K and V are written."""
        qkv = self.pre(x, lora)
        return call.attention(qkv, call.inputs, call.page_ids, self.spec, self.qk_norms)

    def post(self, attended: torch.Tensor, x: torch.Tensor, lora: Lora = NO_LORA) -> torch.Tensor:
        """Attention output [T, heads * head_dim] and the hidden states before it -> those after it."""
        out = _with_bias(self.ops.product_added(x, attended, self.o), self.o_bias)
        lora.add_to(out, attended, "o", self.ops)
        return out


@dataclass(frozen=True, slots=True)
class TorchFfn:
    """A feed-forward block."""

    spec: FfnSpec
    norm: torch.Tensor
    gate_up: Matrix
    gate_up_bias: torch.Tensor | None
    down: Matrix
    down_bias: torch.Tensor | None
    ops: Operators

    @classmethod
    def load(cls, block: Block, weights: Weights, ops: Operators) -> TorchFfn:
        """Put the block on the device."""
        assert isinstance(block.spec, FfnSpec)
        return cls(
            spec=block.spec,
            norm=weights.load(block, "norm"),
            gate_up=weights.matrix(block, "gate", "up"),
            gate_up_bias=weights.maybe(block, "gate_bias", "up_bias"),
            down=weights.matrix(block, "down"),
            down_bias=weights.maybe(block, "down_bias"),
            ops=ops,
        )

    def __call__(self, x: torch.Tensor, lora: Lora = NO_LORA) -> torch.Tensor:
        """Hidden states [T, hidden] -> hidden states."""
        normed = self.ops.norm(x, self.norm, self.spec.rms_norm_eps)
        gate_up = self.ops.product(normed, self.gate_up, self.gate_up_bias)
        size = self.spec.intermediate_size
        _add_side_by_side(gate_up, normed, {"gate": size, "up": size}, lora, self.ops)
        inner = self.ops.gated(gate_up)
        out = _with_bias(self.ops.product_added(x, inner, self.down), self.down_bias)
        lora.add_to(out, inner, "down", self.ops)
        return out


@dataclass(frozen=True, slots=True)
class TorchHead:
    """The output block."""

    spec: HeadSpec
    norm: torch.Tensor
    weight: Matrix
    ops: Operators

    @classmethod
    def load(cls, block: Block, weights: Weights, ops: Operators) -> TorchHead:
        """Put the block on the device."""
        assert isinstance(block.spec, HeadSpec)
        return cls(block.spec, weights.load(block, "norm"), weights.matrix(block, "weight"), ops)

    def __call__(self, x: torch.Tensor, lora: Lora = NO_LORA) -> torch.Tensor:
        """Hidden states [T, hidden] -> logits [T, vocab] in the precision of the weights."""
        return self.ops.product(self.ops.norm(x, self.norm, self.spec.rms_norm_eps), self.weight)


def _add_side_by_side(
    y: torch.Tensor, x: torch.Tensor, widths: dict[str, int], lora: Lora, ops: Operators
) -> None:
    """Add what the adapters add to the projections of x that lie side by side in y."""
    for part, name in zip(y.split(list(widths.values()), 1), widths, strict=True):
        lora.add_to(part, x, name, ops)


def _with_bias(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return out if bias is None else out + bias
