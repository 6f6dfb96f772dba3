"""How K and V lie in pages: in the precision of activations, in f16 beside f32, or in 8 bits.

    u8, for each token and head    | scale f32 | zero f32 | u8 x head_dim |    value = (u8 - zero) * scale

That is what OpenVINO's paged attention keeps on CPUs where it quantizes by token: what is stored of a token
depends on this token alone, so that pages can be appended to, copied in part and kept like any others.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS, Precision

KVPrecision = Literal["f32", "bf16", "f16", "u8"]
"""What pages hold."""
KVChoice = Literal["f32", "bf16", "f16", "u8", "auto"]
"""What may be asked for; "auto": 8 bits where a zoo's models were found to lose nothing by it."""

GRID_BYTES = 8
"""Of a token and head in 8 bits: its scale and its zero."""
_LEVELS = np.float32(255)
_FLAT = np.float32(1e-4)  # the scale of values that are all equal, as the operator has it


def kv_dtype(precision: KVPrecision) -> np.dtype[Any]:
    """The numpy dtype of pages: bf16 is held as uint16."""
    return np.dtype({"f32": np.float32, "bf16": np.uint16, "f16": np.float16, "u8": np.uint8}[precision])


def by_default(precision: Precision, int8_activations: bool) -> KVPrecision:
    """What OpenVINO pages hold where nothing is asked for."""
    return "f16" if int8_activations else precision


def goes_with(precision: Precision) -> tuple[KVPrecision, ...]:
    """What pages may hold beside activations in a precision."""
    return ("bf16", "u8") if precision == "bf16" else ("f32", "f16", "u8")


def page_width(head_dim: int, precision: KVPrecision) -> int:
    """Elements of a token and head in a page."""
    return head_dim + GRID_BYTES if precision == "u8" else head_dim


def page_bytes(kv_heads: int, head_dim: int, precision: KVPrecision) -> int:
    """K and V of 32 tokens in a layer."""
    return 2 * PAGE_TOKENS * kv_heads * page_width(head_dim, precision) * kv_dtype(precision).itemsize


def pack_u8(values: np.ndarray) -> np.ndarray:
    """float32 [..., head_dim] as a page holds it: uint8 [..., head_dim + 8], to nearest."""
    low, high = values.min(-1), values.max(-1)
    scale = (high - low) / _LEVELS
    scale[scale == 0] = _FLAT
    zero = -low / scale
    packed = np.empty((*values.shape[:-1], values.shape[-1] + GRID_BYTES), np.uint8)
    packed[..., :GRID_BYTES] = np.stack([scale, zero], -1).view(np.uint8)
    steps = values * (np.float32(1) / scale)[..., None]
    steps += zero[..., None]
    packed[..., GRID_BYTES:] = np.clip(np.rint(steps, out=steps), 0, _LEVELS, out=steps)
    return packed


def unpack_u8(packed: np.ndarray) -> np.ndarray:
    """The float32 values [..., head_dim] of what a page holds, uint8 [..., head_dim + 8]."""
    grid = grid_of(packed)
    values = packed[..., GRID_BYTES:].astype(np.float32)
    values -= grid[..., 1:]
    values *= grid[..., :1]
    return values


def grid_of(packed: np.ndarray) -> np.ndarray:
    """Scale and zero of what a page holds, float32 [..., 2]; a copy."""
    return np.ascontiguousarray(packed[..., :GRID_BYTES]).view(np.float32)
