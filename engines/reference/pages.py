"""Pages of KV in 8 bits, in torch (`engines.kv_pages`): one grid for each token and head."""

from __future__ import annotations

import torch

from blockzoo.engines.kv_pages import GRID_BYTES


def pack_u8(values: torch.Tensor) -> torch.Tensor:
    """Values [..., head_dim] as a page holds them: uint8 [..., head_dim + 8], to nearest."""
    values = values.float()
    low, high = values.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1e-4, scale)
    zero = -low / scale
    steps = (values * (1 / scale) + zero).round().clamp(0, 255).to(torch.uint8)
    return torch.cat([torch.cat([scale, zero], -1).view(torch.uint8), steps], -1)


def unpack_u8(packed: torch.Tensor) -> torch.Tensor:
    """The float32 values [..., head_dim] of what a page holds, uint8 [..., head_dim + 8]."""
    scale, zero = packed[..., :GRID_BYTES].contiguous().view(torch.float32).split(1, -1)
    return (packed[..., GRID_BYTES:].float() - zero) * scale
