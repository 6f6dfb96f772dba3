"""A Triton-language kernel of products with matrices of 8 and 4 bits, which are unpacked tile by tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def packed_product(
    x,  # [T, WIDTH]
    data,  # int8 [OUT, WIDTH], or uint8 [OUT, WIDTH / 2]: even columns in the lower halves
    scales,  # float32 [OUT, WIDTH / GROUP]
    offsets,  # as the scales, with HAS_OFFSETS
    added,  # [T, OUT], with HAS_ADDED
    y,  # [T, OUT] of rows STRIDE apart
    num_rows,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP, unless that is all of a row
    PRECISION: tl.constexpr,
):
    """One program per tile of rows and outputs: y = x W^T (+ added), summed in float32 and rounded once.

    Integers are exact in the type of x; a group's scale is multiplied with its part of the sum.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = x + t[:, None].to(tl.int64) * WIDTH
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for begin in range(0, WIDTH, BLOCK_K):
        group = o * (WIDTH // GROUP) + begin // GROUP
        scale = tl.load(scales + group, mask=o < OUT, other=0.0)
        if FOUR_BITS:
            k = begin // 2 + tl.arange(0, BLOCK_K // 2)
            w_mask = (o < OUT)[None, :] & (k < WIDTH // 2)[:, None]
            place = data + o[None, :].to(tl.int64) * (WIDTH // 2) + k[:, None]
            both = tl.load(place, mask=w_mask, other=0).to(tl.int32)
            low, high = ((both & 15) ^ 8) - 8, ((both >> 4) ^ 8) - 8  # of two's complement
            x_mask = (t < num_rows)[:, None] & (k < WIDTH // 2)[None, :]
            even = tl.load(row + 2 * k[None, :], mask=x_mask, other=0.0)
            odd = tl.load(row + 2 * k[None, :] + 1, mask=x_mask, other=0.0)
            part = tl.dot(even, low.to(even.dtype), input_precision=PRECISION)
            part += tl.dot(odd, high.to(odd.dtype), input_precision=PRECISION)
            total = tl.sum(even.to(tl.float32) + odd.to(tl.float32), 1)
        else:
            k = begin + tl.arange(0, BLOCK_K)
            w_mask = (o < OUT)[None, :] & (k < WIDTH)[:, None]
            place = data + o[None, :].to(tl.int64) * WIDTH + k[:, None]
            values = tl.load(place, mask=w_mask, other=0)
            x_mask = (t < num_rows)[:, None] & (k < WIDTH)[None, :]
            columns = tl.load(row + k[None, :], mask=x_mask, other=0.0)
            part = tl.dot(columns, values.to(columns.dtype), input_precision=PRECISION)
            total = tl.sum(columns.to(tl.float32), 1)
        acc += part * scale[None, :]
        if HAS_OFFSETS:
            offset = tl.load(offsets + group, mask=o < OUT, other=0.0)
            acc += total[:, None] * offset[None, :]
    stored = (t < num_rows)[:, None] & (o < OUT)[None, :]
    if HAS_ADDED:
        place = added + t[:, None].to(tl.int64) * OUT + o[None, :]
        acc += tl.load(place, mask=stored, other=0.0).to(tl.float32)
    place = y + t[:, None].to(tl.int64) * STRIDE + o[None, :]
    tl.store(place, acc.to(y.dtype.element_ty), mask=stored)
