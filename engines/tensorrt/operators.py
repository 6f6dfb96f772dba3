"""Operators on the GPU as Triton-language kernels: those beside matrix products, and products with packed
matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blockzoo.engines.reference.arrays import PackedMatrices, PackedMatrix
from blockzoo.engines.reference.blocks import Matrix, Operators
from blockzoo.engines.tensorrt import packed_kernels, row_kernels
from blockzoo.zoo.packing import GROUP, ROTATED, groups_dividing

_RANKS = 16  # of adapters, in a tile
_MANY_ROWS = 256  # from here on tiles of rows are large, and packed matrices are unpacked as a whole
_PROGRAMS = 128  # that keep a GPU busy
_SPLIT_COLUMNS = 512  # the least of a split


class FusedOperators(Operators):
    """One kernel for each operator between matrix products, two for what adapters add to one; one for a
    product with a packed matrix, while the rows are few."""

    def product(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T (+ bias): [T, in] -> [T, out]."""
        parts = _packed_parts(weight, len(x))
        if not parts:
            return super().product(x, weight, bias)
        y, turned = x.new_empty(len(x), weight.shape[0]), _rotated(x, parts)
        for part, columns in zip(parts, y.split([part.shape[0] for part in parts], 1), strict=True):
            _multiply(x if part.rotation is None else turned, part, columns)
        return y if bias is None else y + bias

    def product_added(self, to: torch.Tensor, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        """to + x W^T, rounded once: [T, out] and [T, in] -> [T, out]."""
        parts = _packed_parts(weight, len(x))
        if len(parts) != 1:
            return super().product_added(to, x, weight)
        y = torch.empty_like(to, memory_format=torch.contiguous_format)
        _multiply(_rotated(x, parts), parts[0], y, to.contiguous())
        return y

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


def _packed_parts(weight: Matrix, rows: int) -> tuple[PackedMatrix, ...]:
    """The matrices that are multiplied as they are stored; none where that is not done."""
    if isinstance(weight, torch.Tensor) or not 0 < rows < _MANY_ROWS:
        return ()
    parts = weight.parts if isinstance(weight, PackedMatrices) else (weight,)
    return parts if all(_block_k(part) for part in parts) else ()


def _block_k(matrix: PackedMatrix) -> int:
    """Columns of a tile, which divide a group, or all of a row less than one tile at its end; 0: none do."""
    width, groups = matrix.shape[1], matrix.scales.shape[1]
    sizes = groups_dividing([width // groups])
    return sizes[0] if sizes else GROUP * (groups == 1)


def _rotated(x: torch.Tensor, matrices: Sequence[PackedMatrix]) -> torch.Tensor:
    """x as those of the matrices that are rotated are multiplied with it; as it is, where none is."""
    rotation = next((each.rotation for each in matrices if each.rotation is not None), None)
    return x if rotation is None else (x.reshape(-1, ROTATED) @ rotation.to(x.dtype)).view(x.shape)


def _multiply(
    x: torch.Tensor, matrix: PackedMatrix, y: torch.Tensor, added: torch.Tensor | None = None
) -> None:
    """y = x W^T (+ added), of x rotated where the matrix is; y may be some columns of a matrix."""
    (rows, width), out = x.shape, matrix.shape[0]
    block_t, block_o = (16, 32) if rows <= 16 else (64, 64)
    packed_kernels.packed_product[(-(-rows // block_t), -(-out // block_o))](
        x.contiguous(),
        matrix.data,
        matrix.scales,
        matrix.scales if matrix.offsets is None else matrix.offsets,
        y if added is None else added,
        y,
        rows,
        WIDTH=width,
        OUT=out,
        GROUP=width // matrix.scales.shape[1],
        STRIDE=y.stride(0),
        FOUR_BITS=matrix.four_bits,
        HAS_OFFSETS=matrix.offsets is not None,
        HAS_ADDED=added is not None,
        BLOCK_T=block_t,
        BLOCK_O=block_o,
        BLOCK_K=_block_k(matrix),
        PRECISION=dot_precision(x),
    )


def dot_precision(x: torch.Tensor) -> str:
    """How Triton multiplies x: float32 exactly (its default, tf32, keeps 10 bits)."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def power_of_two(size: int) -> int:
    """The next power of two, which a Triton tile must have."""
    return 1 << (size - 1).bit_length()
