"""Operators between matrix products on the GPU, one Triton-language kernel each, and adapters."""

from __future__ import annotations

import torch

from blockzoo.engines.reference.blocks import Operators
from blockzoo.engines.tensorrt import row_kernels


class FusedOperators(Operators):
    """The operators between matrix products, one kernel each."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm over the last dimension."""
        x = x.contiguous()
        out, width = torch.empty_like(x), x.shape[-1]
        rows = x.numel() // width
        row_kernels.rms_norm[(rows,)](
            x, weight, out, eps, WIDTH=width, BLOCK=power_of_two(width), num_warps=8
        )
        return out

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 * inner]: gate first."""
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        row_kernels.silu_times[(rows, -(-width // 1024))](gate_up, out, WIDTH=width, BLOCK=1024, num_warps=4)
        return out


def add_adapters(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor
) -> None:
    """y += ((x A^T) * mask) B in place, at the cost of the adapters that each tile of rows uses.

    Args:
        y: [T, out]. x: [T, in]. a: [ranks, in]. b: [ranks, out]: all adapters' ranks side by side.
        mask: [T, ranks]: not 0 in the ranks of the row's own adapter.
    """
    rows, ranks = mask.shape
    if len({tensor.dtype for tensor in (y, x, a, b, mask)}) > 1:
        raise ValueError("y, x, a, b and mask must have one type")
    narrow = x.new_empty(rows, ranks)
    tiles = -(-rows // 16)
    row_kernels.lora_shrink[(tiles, -(-ranks // 16))](
        x,
        a,
        mask,
        narrow,
        rows,
        ranks,
        WIDTH=x.shape[1],
        BLOCK_T=16,
        BLOCK_R=16,
        BLOCK_K=128,
        PRECISION=dot_precision(x),
    )
    row_kernels.lora_expand[(tiles, -(-y.shape[1] // 128))](
        narrow,
        b,
        mask,
        y,
        rows,
        ranks,
        WIDTH=y.shape[1],
        BLOCK_T=16,
        BLOCK_R=16,
        BLOCK_O=128,
        PRECISION=dot_precision(x),
    )


def dot_precision(x: torch.Tensor) -> str:
    """How Triton multiplies x: float32 exactly (its default, tf32, keeps 10 bits)."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def power_of_two(size: int) -> int:
    """The next power of two, which a Triton tile must have."""
    return 1 << (size - 1).bit_length()
