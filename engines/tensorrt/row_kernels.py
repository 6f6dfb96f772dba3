"""Triton-language kernels of one row at a time: norm, gated product, adapters in the masked form.

Dots take bf16, fp16 or float32 operands and sum in float32; the interpreter computes bf16 dots wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: x / rms(x) * weight, in float32 inside."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    value = tl.load(x + row * WIDTH + d, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps)
    scaled = value * scale * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + d, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_times(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row and block of columns: silu(gate) * up of [T, 2 * WIDTH]."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + d, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + d, product.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "ranks", "splits"])
def lora_shrink(
    x,  # [T, WIDTH]
    a,  # [ranks, WIDTH]
    mask,  # [T, ranks]
    out,  # float32 [splits, T, ranks]
    num_rows,
    ranks,
    splits,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per tile of rows and ranks and split of the columns: x A^T over the split's columns.

    A tile whose rows have no adapter among its ranks is neither computed nor written.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    inside = (t < num_rows)[:, None] & (r < ranks)[None, :]
    share = tl.load(mask + t[:, None] * ranks + r[None, :], mask=inside, other=0.0).to(tl.float32)
    if tl.max(tl.abs(share)) > 0.0:
        per_split = tl.cdiv(tl.cdiv(WIDTH, BLOCK_K), splits) * BLOCK_K
        first = split * per_split
        acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for begin in range(first, tl.minimum(first + per_split, WIDTH), BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            x_mask = (t < num_rows)[:, None] & (k < WIDTH)[None, :]
            rows = tl.load(x + t[:, None].to(tl.int64) * WIDTH + k[None, :], mask=x_mask, other=0.0)
            a_mask = (r < ranks)[None, :] & (k < WIDTH)[:, None]
            columns = tl.load(a + r[None, :] * WIDTH + k[:, None], mask=a_mask, other=0.0)
            acc += tl.dot(rows, columns, input_precision=PRECISION)
        place = (split * num_rows + t)[:, None] * ranks + r[None, :]
        tl.store(out + place, acc, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "ranks", "splits"])
def lora_expand(
    h,  # float32 [splits, T, ranks], of `lora_shrink`
    b,  # [ranks, WIDTH]
    mask,  # [T, ranks]
    y,  # [T, WIDTH] of rows STRIDE apart, added to
    num_rows,
    ranks,
    splits,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,  # as for lora_shrink
    BLOCK_R: tl.constexpr,  # as for lora_shrink
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y += (h * mask) B, passing over the ranks that no row of the tile uses."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for begin in range(0, ranks, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        inside = (t < num_rows)[:, None] & (r < ranks)[None, :]
        share = tl.load(mask + t[:, None] * ranks + r[None, :], mask=inside, other=0.0).to(tl.float32)
        if tl.max(tl.abs(share)) > 0.0:
            rows = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for split in range(splits):
                place = (split * num_rows + t)[:, None] * ranks + r[None, :]
                rows += tl.load(h + place, mask=inside, other=0.0)
            b_mask = (o < WIDTH)[None, :] & (r < ranks)[:, None]
            columns = tl.load(b + r[:, None] * WIDTH + o[None, :], mask=b_mask, other=0.0)
            acc += tl.dot((rows * share).to(b.dtype.element_ty), columns, input_precision=PRECISION)
    place = y + t[:, None].to(tl.int64) * STRIDE + o[None, :]
    stored = (t < num_rows)[:, None] & (o < WIDTH)[None, :]
    before = tl.load(place, mask=stored, other=0.0).to(tl.float32)
    tl.store(place, (before + acc).to(y.dtype.element_ty), mask=stored)
