"""Blocks: the operator specs, their canonical tensors, and a block with its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.tensors import BlockTensor, Dtype, StoredDtype, TensorFile

__all__ = [
    "PROJECTIONS",
    "Adapter",
    "AdapterSpec",
    "AttnSpec",
    "Block",
    "BlockSpec",
    "BlockTensor",
    "Dtype",
    "EmbedSpec",
    "FfnSpec",
    "HeadSpec",
    "LoraSpec",
    "StoredDtype",
    "chain_specs",
    "main_dtype",
    "matrix_names",
    "tensor_shapes",
]


@dataclass(frozen=True, slots=True)
class EmbedSpec:
    """Token ids -> hidden states."""

    kind: ClassVar[str] = "embed"
    vocab_size: int
    hidden_size: int


@dataclass(frozen=True, slots=True)
class AttnSpec:
    """x + o(attention(rope(q(norm(x))), rope(k(norm(x))), v(norm(x)))), causal."""

    kind: ClassVar[str] = "attn"
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    sliding_window: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """x + down(silu(gate(norm(x))) * up(norm(x)))."""

    kind: ClassVar[str] = "ffn"
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    bias: bool


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """norm(x) times the output matrix; tied: the matrix is the embed block's."""

    kind: ClassVar[str] = "head"
    hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    tied: bool


BlockSpec = EmbedSpec | AttnSpec | FfnSpec | HeadSpec

PROJECTIONS: dict[str, tuple[str, ...]] = {"attn": ("q", "k", "v", "o"), "ffn": ("gate", "up", "down")}
"""By kind of block, the matrices that a LoRA may change."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A LoRA of one projection: y = x W^T becomes x W^T + scale * (x A^T) B^T (arXiv 2106.09685)."""

    projection: str
    rank: int
    in_features: int
    out_features: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The LoRAs that one model puts on one attn or ffn block, in the order of PROJECTIONS."""

    kind: ClassVar[str] = "adapter"
    loras: tuple[LoraSpec, ...]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(lora.rank for lora in self.loras)


def tensor_shapes(spec: BlockSpec | AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Canonical tensor names of a block with their shapes, in order (a tied head has no `weight`).

    An adapter has `<projection>.a` [rank, in] and `<projection>.b` [out, rank] of every LoRA.
    """
    if isinstance(spec, AdapterSpec):
        shapes: dict[str, tuple[int, ...]] = {}
        for lora in spec.loras:
            shapes[f"{lora.projection}.a"] = (lora.rank, lora.in_features)
            shapes[f"{lora.projection}.b"] = (lora.out_features, lora.rank)
        return shapes
    hidden = spec.hidden_size
    if isinstance(spec, EmbedSpec):
        return {"weight": (spec.vocab_size, hidden)}
    if isinstance(spec, HeadSpec):
        weight = {} if spec.tied else {"weight": (spec.vocab_size, hidden)}
        return {"norm": (hidden,), **weight}
    if isinstance(spec, FfnSpec):
        inner = spec.intermediate_size
        matrices = {
            "norm": (hidden,),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        return matrices | (
            {"gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,)} if spec.bias else {}
        )
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attn: dict[str, tuple[int, ...]] = {"norm": (hidden,), "q": (q_size, hidden), "k": (kv_size, hidden)}
    attn |= {"v": (kv_size, hidden), "o": (hidden, q_size)}
    if spec.qkv_bias:
        attn |= {"q_bias": (q_size,), "k_bias": (kv_size,), "v_bias": (kv_size,)}
    if spec.o_bias:
        attn |= {"o_bias": (hidden,)}
    if spec.qk_norm:
        attn |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    return attn


def chain_specs(config: ModelConfig) -> tuple[BlockSpec, ...]:
    """The specs of a model's chain: embed, then attn and ffn of every layer, then head."""
    specs: list[BlockSpec] = [EmbedSpec(config.vocab_size, config.hidden_size)]
    for window in config.layer_windows:
        specs.append(
            AttnSpec(
                hidden_size=config.hidden_size,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                rms_norm_eps=config.rms_norm_eps,
                rope=config.rope,
                sliding_window=window,
                qkv_bias=config.qkv_bias,
                o_bias=config.o_bias,
                qk_norm=config.qk_norm,
            )
        )
        specs.append(
            FfnSpec(config.hidden_size, config.intermediate_size, config.rms_norm_eps, config.mlp_bias)
        )
    tied = config.tie_word_embeddings
    specs.append(HeadSpec(config.hidden_size, config.vocab_size, config.rms_norm_eps, tied))
    return tuple(specs)


def main_dtype(tensors: Sequence[BlockTensor]) -> StoredDtype:
    """The dtype of the largest tensor: what a block is said to be in (each tensor keeps its own)."""
    return max(tensors, key=lambda tensor: tensor.size).dtype


def matrix_names(spec: BlockSpec) -> tuple[str, ...]:
    """The tensors of a block that are quantized: its matrices."""
    return tuple(name for name, shape in tensor_shapes(spec).items() if len(shape) == 2)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A block with its canonical tensors; a tied head has the embed block's `weight` filled in."""

    id: str
    spec: BlockSpec
    tensors: dict[str, BlockTensor]
    files: tuple[TensorFile, ...] = ()

    def drop_pages(self) -> None:
        """Give the mapped weights' memory back once an engine has its own copy (a later read reloads)."""
        for file in self.files:
            file.drop_pages()


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter with its tensors, see `tensor_shapes`."""

    id: str
    spec: AdapterSpec
    tensors: dict[str, BlockTensor]
    files: tuple[TensorFile, ...] = ()

    def drop_pages(self) -> None:
        """As `Block.drop_pages`."""
        for file in self.files:
            file.drop_pages()
