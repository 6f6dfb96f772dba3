"""The networks that a block is compiled to, and the weights that each takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from blockzoo.zoo.blocks import Block, BlockSpec, BlockTensor, Dtype
from blockzoo.zoo.tensors import from_f32, stacked

Part = Literal["attn_pre", "attn_post", "ffn", "head"]

WEIGHT_PARTS: dict[Part, dict[str, tuple[str, ...]]] = {
    "attn_pre": {
        "norm": ("norm",),
        "qkv": ("q", "k", "v"),
        "qkv_bias": ("q_bias", "k_bias", "v_bias"),
        "q_norm": ("q_norm",),
        "k_norm": ("k_norm",),
    },
    "attn_post": {"o": ("o",), "o_bias": ("o_bias",)},
    "ffn": {
        "norm": ("norm",),
        "gate_up": ("gate", "up"),
        "gate_up_bias": ("gate_bias", "up_bias"),
        "down": ("down",),
        "down_bias": ("down_bias",),
    },
    "head": {"norm": ("norm",), "weight": ("weight",)},
}
"""Weight inputs of each part, and the canonical tensors that each has on top of each other."""

PART_LORA: dict[Part, tuple[str, ...]] = {
    "attn_pre": ("q", "k", "v"),
    "attn_post": ("o",),
    "ffn": ("gate", "up", "down"),
    "head": (),
}
"""Projections of each part that may take adapters."""


def part_lora(part: Part, projections: Iterable[str]) -> tuple[str, ...]:
    """Those of a block's `projections` that belong to a part, in the order of `PART_LORA`."""
    chosen = set(projections)
    return tuple(name for name in PART_LORA[part] if name in chosen)


def parts_of(spec: BlockSpec) -> tuple[Part, ...]:
    """The networks of a block, in the order in which they run; an embedding has none."""
    kinds: dict[str, tuple[Part, ...]] = {
        "embed": (),
        "attn": ("attn_pre", "attn_post"),
        "ffn": ("ffn",),
        "head": ("head",),
    }
    return kinds[spec.kind]


def part_weights(block: Block, part: Part, dtype: Dtype) -> dict[str, BlockTensor]:
    """The weights of one part of a block by input name, in `dtype`."""
    return {
        name: _converted(stacked([block.tensors[source] for source in sources]), dtype)
        for name, sources in WEIGHT_PARTS[part].items()
        if sources[0] in block.tensors
    }


def _converted(tensor: BlockTensor, dtype: Dtype) -> BlockTensor:
    return tensor if tensor.dtype == dtype else from_f32(tensor.to_f32(), dtype)
