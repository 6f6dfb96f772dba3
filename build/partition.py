"""A checkpoint cut into the blocks of its chain: canonical tensors, checked shapes, block ids."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blockzoo.zoo.adapter import LoraPair
from blockzoo.zoo.blocks import (
    PROJECTIONS,
    AdapterSpec,
    BlockSpec,
    Dtype,
    HeadSpec,
    LoraSpec,
    StoredDtype,
    chain_specs,
    main_dtype,
    tensor_shapes,
)
from blockzoo.zoo.checkpoint import Checkpoint
from blockzoo.zoo.errors import CheckpointError
from blockzoo.zoo.fingerprint import block_id
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.tensors import BlockTensor, from_f32, narrowed

_ATTN = {"norm": "input_layernorm.weight"}
_ATTN |= {name: f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o")}
_ATTN |= {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in ("q", "k", "v", "o")}
_ATTN |= {name: f"self_attn.{name}.weight" for name in ("q_norm", "k_norm")}
_FFN = {"norm": "post_attention_layernorm.weight"}
_FFN |= {name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
_FFN |= {f"{name}_bias": f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")}
_ENDS = {
    ("embed", "weight"): "model.embed_tokens.weight",
    ("head", "norm"): "model.norm.weight",
    ("head", "weight"): "lm_head.weight",
}
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # a constant that old exporters saved; computed from the config


@dataclass(frozen=True, slots=True, eq=False)
class CutBlock:
    """A block cut out of a checkpoint, in memory: its tensors are views of the checkpoint where possible."""

    id: str
    spec: BlockSpec
    tensors: dict[str, BlockTensor]
    """Without a tied head's weight."""
    tied_to: str | None

    @property
    def dtype(self) -> StoredDtype:
        """The dtype of the largest tensor."""
        return main_dtype(list(self.tensors.values()))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True, eq=False)
class CutAdapter:
    """The adapter of one block, in memory."""

    id: str
    spec: AdapterSpec
    tensors: dict[str, BlockTensor]

    @property
    def dtype(self) -> StoredDtype:
        """The dtype of the largest tensor."""
        return main_dtype(list(self.tensors.values()))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


TensorReader = Callable[[str], BlockTensor]
"""HF tensor name -> the tensor as it was given."""


def chain_names(config: ModelConfig) -> list[dict[str, str]]:
    """For each block of the chain: canonical tensor name -> HF name."""
    named = []
    for index, spec in enumerate(chain_specs(config)):
        layer = f"model.layers.{(index - 1) // 2}."  # attn and ffn of layer l stand at 1 + 2l and 2 + 2l
        if spec.kind == "attn":
            names = {tensor: layer + _ATTN[tensor] for tensor in tensor_shapes(spec)}
        elif spec.kind == "ffn":
            names = {tensor: layer + _FFN[tensor] for tensor in tensor_shapes(spec)}
        else:
            names = {tensor: _ENDS[spec.kind, tensor] for tensor in tensor_shapes(spec)}
        named.append(names)
    return named


def checkpoint_reader(checkpoint: Checkpoint) -> TensorReader:
    """Read tensors out of a checkpoint.

    Raises CheckpointError when the folder holds tensors that belong to no block: dropping them would serve
    another model than the one given.
    """
    expected = {hf for names in chain_names(checkpoint.config) for hf in names.values()}
    unknown = [n for n in checkpoint.files if n not in expected and not n.endswith(_IGNORED_SUFFIX)]
    if checkpoint.config.tie_word_embeddings and "lm_head.weight" in unknown:
        _check_tied(checkpoint)
        unknown.remove("lm_head.weight")
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path}: {len(unknown)} tensors belong to no block of a "
            f"{checkpoint.config.architecture} as config.json describes it: {', '.join(sorted(unknown)[:3])}"
        )
    return checkpoint.tensor


def _check_tied(checkpoint: Checkpoint) -> None:
    head, embed = checkpoint.tensor("lm_head.weight"), checkpoint.tensor("model.embed_tokens.weight")
    if head.dtype != embed.dtype or not np.array_equal(head.data, embed.data):
        raise CheckpointError(
            f"{checkpoint.path}: config.json ties the word embeddings, but lm_head.weight differs from "
            "model.embed_tokens.weight; set tie_word_embeddings to false if the saved head is meant"
        )


def cut(config: ModelConfig, read: TensorReader, dtype: Dtype | None, where: str) -> Iterator[CutBlock]:
    """Cut a model into the blocks of its chain, one at a time (a converted model is never whole in memory).

    `dtype` converts every tensor; None keeps each as given (f32 that is exactly bf16 becomes bf16). `where`
    names the model in messages. Raises CheckpointError for wrong shapes and for NaN or infinite weights.
    """
    embed = ""
    for position, spec in enumerate(chain_specs(config)):
        tensors = block_tensors(config, read, dtype, where, position)
        tied_to = embed if isinstance(spec, HeadSpec) and spec.tied else None
        block = CutBlock(block_id(spec, tensors, tied_to), spec, tensors, tied_to)
        embed = embed or block.id
        yield block


def block_tensors(
    config: ModelConfig, read: TensorReader, dtype: Dtype | None, where: str, position: int
) -> dict[str, BlockTensor]:
    """The canonical tensors of one block of the chain; arguments and errors as of `cut`."""
    spec, names = chain_specs(config)[position], chain_names(config)[position]
    return {
        name: _canonical(read(names[name]), shape, dtype, f"{where}: tensor {names[name]}")
        for name, shape in tensor_shapes(spec).items()
    }


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor of a model."""
    named = zip(chain_specs(config), chain_names(config), strict=True)
    return {names[tensor]: shape for spec, names in named for tensor, shape in tensor_shapes(spec).items()}


def _canonical(tensor: BlockTensor, shape: tuple[int, ...], dtype: Dtype | None, what: str) -> BlockTensor:
    if tensor.shape != shape:
        raise CheckpointError(f"{what} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
    if not tensor.is_finite():
        raise CheckpointError(f"{what} holds NaN or infinite values")
    if tensor.scales is not None and dtype is not None:
        raise CheckpointError(f"{what} is quantized: --dtype cannot convert it; compile its model anew")
    if dtype is None or tensor.dtype == dtype:
        return narrowed(tensor) if dtype is None else tensor
    converted = from_f32(tensor.to_f32(), dtype)
    if not converted.is_finite():
        raise CheckpointError(f"{what} holds values beyond the range of {dtype}: choose another --dtype")
    return converted


def cut_adapters(
    config: ModelConfig, pairs: Mapping[str, Sequence[LoraPair]]
) -> Iterator[tuple[int, CutAdapter]]:
    """The adapters of a model by position in its chain; `pairs` as in `sources.Source`."""
    for position, names in enumerate(chain_names(config)):
        found = {tensor: list(pairs[hf]) for tensor, hf in names.items() if hf in pairs}
        if found:
            yield position, make_adapter({name: _one_pair(loras) for name, loras in found.items()})


def _one_pair(loras: list[LoraPair]) -> LoraPair:
    """Several LoRAs of one weight as one: their ranks side by side, each scale folded into its b."""
    if len(loras) == 1:
        return loras[0]
    a = np.concatenate([lora.a.to_f32() for lora in loras])
    b = np.concatenate([np.float32(lora.scale) * lora.b.to_f32() for lora in loras], axis=1)
    return LoraPair(from_f32(a, "f32"), from_f32(b, "f32"), 1.0)


def make_adapter(pairs: Mapping[str, LoraPair]) -> CutAdapter:
    """The adapter of one block from the LoRAs of its projections by canonical tensor name."""
    order = [name for names in PROJECTIONS.values() for name in names if name in pairs]
    loras, tensors = [], {}
    for name in order:
        pair = pairs[name]
        tensors[f"{name}.a"], tensors[f"{name}.b"] = narrowed(pair.a), narrowed(pair.b)
        rank, in_features = pair.a.shape
        loras.append(LoraSpec(name, rank, in_features, pair.b.shape[0], float(pair.scale)))
    spec = AdapterSpec(tuple(loras))
    return CutAdapter(block_id(spec, tensors), spec, tensors)
