"""Operators beside the matrix products on the GPU, as Triton-language kernels."""

from __future__ import annotations

import torch

from blockzoo.engines.reference.blocks import Operators
from blockzoo.engines.tensorrt import row_kernels

_RANKS = 16  # of adapters, in a tile
_MANY_ROWS = 256  # from here on tiles of rows are large
_PROGRAMS = 128  # that keep a GPU busy
_SPLIT_COLUMNS = 512  # the least of a split


class FusedOperators(Operators):
    """One kernel for each operator between matrix products, two for what adapters add to one."""

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
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """y += ((x A^T) * mask) B in place, at the cost of the adapters that each tile of rows uses."""
        (rows, ranks), width = mask.shape, x.shape[1]
        if len({tensor.dtype for tensor in (y, x, a, b, mask)}) > 1:
            raise ValueError("y, x, a, b and mask must have one type")
        block = 16 if rows <= _MANY_ROWS else 64
        tiles, rank_tiles = -(-rows // block), -(-ranks // _RANKS)
        # a short batch has few tiles: the columns are split until the GPU has work
        splits = max(1, min(_PROGRAMS // (tiles * rank_tiles), width // _SPLIT_COLUMNS))
        narrow = x.new_empty(splits, rows, ranks, dtype=torch.float32)
        sizes = {"BLOCK_T": block, "BLOCK_R": _RANKS, "PRECISION": dot_precision(x)}
        row_kernels.lora_shrink[(tiles, rank_tiles, splits)](
            x, a, mask, narrow, rows, ranks, splits, WIDTH=width, BLOCK_K=128, **sizes
        )
        out = y.shape[1]
        row_kernels.lora_expand[(tiles, -(-out // 128))](
            narrow, b, mask, y, rows, ranks, splits, WIDTH=out, STRIDE=y.stride(0), BLOCK_O=128, **sizes
        )


def dot_precision(x: torch.Tensor) -> str:
    """How Triton multiplies x: float32 exactly (its default, tf32, keeps 10 bits)."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def power_of_two(size: int) -> int:
    """The next power of two, which a Triton tile must have."""
    return 1 << (size - 1).bit_length()
