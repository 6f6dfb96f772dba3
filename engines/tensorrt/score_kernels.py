"""Triton-language kernels of attention scores: what each key receives from a sequence's last rows."""

from __future__ import annotations

import triton
import triton.language as tl

from blockzoo.engines.tensorrt.kernels import PAGE, POINTERS


@triton.jit(do_not_specialize=["num_seqs", "window_rows", "width"], do_not_specialize_on_alignment=POINTERS)
def attention_scores(
    qkv,
    keys,
    page_ids,
    begins,
    past_lens,
    positions,
    table_begins,
    tops,  # float32 [T * HEADS]: scratch, the exponent of each row's softmax; then its sum
    totals,
    out,  # float32 [S, width]
    num_seqs,
    window_rows,
    width,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # a power of two that holds the heads of a group
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMMING: tl.constexpr,
):
    """Attention that each key receives from the last `window_rows` rows of its sequence, over all heads.

    Two passes: with SUMMING one program per row of the window and sequence finds the softmax sums; then one
    per key tile and sequence adds the shares up, always in the same order.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    seq = tl.program_id(1)
    begin = tl.load(begins + seq)
    end = tl.load(begins + seq + 1)
    first = tl.maximum(begin, end - window_rows)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    grouped = m < GROUP
    table = page_ids + tl.load(table_begins + seq)
    past = tl.load(past_lens + seq)
    if SUMMING:
        begin_row = first + tl.program_id(0)
        end_row = tl.minimum(begin_row + 1, end)
    else:
        begin_row = first
        end_row = end
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    received = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(begin_row, end_row):
        if HAS_POSITIONS:  # noqa: SIM108
            position = tl.load(positions + row)
        else:
            position = past + row - begin
        for kv_head in range(KV_HEADS):
            head = kv_head * GROUP + m
            q_offset = (row * (HEADS + 2 * KV_HEADS) + head)[:, None] * D + d[None, :]
            q = tl.load(qkv + q_offset, mask=grouped[:, None] & (d < D)[None, :], other=0.0)
            if SUMMING:
                top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
                total = tl.zeros((BLOCK_M,), tl.float32)
                for tile in range(0, position // BLOCK_N + 1):
                    at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
                    scores = _tile_scores(
                        q, keys, table, at, position, kv_head, d, scale, KV_HEADS, D, WINDOW, PRECISION
                    )
                    new_top = tl.maximum(top, tl.max(scores, 1))
                    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
                    total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
                    top = new_top
                tl.store(tops + row * HEADS + head, top, mask=grouped)
                tl.store(totals + row * HEADS + head, total, mask=grouped)
            else:
                scores = _tile_scores(
                    q, keys, table, n, position, kv_head, d, scale, KV_HEADS, D, WINDOW, PRECISION
                )
                top = tl.load(tops + row * HEADS + head, mask=grouped, other=0.0)
                total = tl.load(totals + row * HEADS + head, mask=grouped, other=1.0)
                share = tl.exp2(scores - top[:, None]) / total[:, None]
                received += tl.sum(tl.where(grouped[:, None], share, 0.0), 0)
    if not SUMMING:
        tl.store(out + seq * width + n, received, mask=n < width)


@triton.jit
def _tile_scores(
    q,
    keys,
    table,
    n,
    position,
    kv_head,
    d,
    scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    visible = n <= position
    if WINDOW > 0:
        visible &= n > position - WINDOW
    page = tl.load(table + n // PAGE, mask=visible, other=0).to(tl.int64)
    offset = ((page * KV_HEADS + kv_head) * PAGE + n % PAGE) * D
    k = tl.load(keys + offset[None, :] + d[:, None], mask=(d < D)[:, None] & visible[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    return tl.where(visible[None, :], scores, -float("inf"))
