"""Triton-language kernels of attention scores: what each token of the context receives from the last rows."""

from __future__ import annotations

import triton
import triton.language as tl

from blockzoo.engines.tensorrt.kernels import PAGE, POINTERS, sequence_of

_POINTERS = [*POINTERS, "windows"]


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=_POINTERS)
def softmax_sums(
    qkv,
    keys,
    page_ids,
    begins,
    past_lens,
    table_begins,
    windows,  # int32 [S]: the last so many rows of each sequence count
    tops,  # float32 [T * HEADS]: the largest exponent of each row and head
    totals,  # float32 [T * HEADS]: the sum of their softmax
    num_seqs,
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # a power of two that holds the heads of a group
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per row and kv head; those of rows that do not count have nothing to do."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = sequence_of(begins, row, num_seqs, 0)
    begin = tl.load(begins + seq)
    if row >= tl.load(begins + seq + 1) - tl.load(windows + seq):
        GROUP: tl.constexpr = HEADS // KV_HEADS
        position = tl.load(past_lens + seq) + row - begin
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        q = _query(qkv, row, kv_head, m, d, HEADS, KV_HEADS, D)
        table = page_ids + tl.load(table_begins + seq)
        top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        begin_tile = 0
        if WINDOW > 0:
            begin_tile = tl.maximum(position - WINDOW + 1, 0) // BLOCK_N
        for tile in range(begin_tile, position // BLOCK_N + 1):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            scores = _scores(q, keys, table, n, position, kv_head, d, scale, KV_HEADS, D, WINDOW, PRECISION)
            new_top = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
            top = new_top
        at = row * HEADS + kv_head * GROUP + m
        tl.store(tops + at, top, mask=m < GROUP)
        tl.store(totals + at, total, mask=m < GROUP)


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=_POINTERS)
def add_scores(
    qkv,
    keys,
    page_ids,
    begins,
    past_lens,
    table_begins,
    windows,
    tops,
    totals,
    out,  # float32 [E * 32], added to: the tokens of all page tables, side by side
    num_seqs,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per tile of a sequence's page table: the shares of its tokens, always in the same order."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    PAGES: tl.constexpr = BLOCK_N // PAGE
    block = tl.program_id(0)
    seq = sequence_of(table_begins, block, num_seqs, PAGES)
    first_page = tl.load(table_begins + seq)
    tile = block - first_page // PAGES - seq
    begin = tl.load(begins + seq)
    end = tl.load(begins + seq + 1)
    past = tl.load(past_lens + seq)
    begin_row = tl.maximum(begin, end - tl.load(windows + seq))
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < past + end - begin
    if (tile * BLOCK_N < past + end - begin) & (begin_row < end):
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        received = tl.zeros((BLOCK_N,), tl.float32)
        for row in range(begin_row, end):
            position = past + row - begin
            for kv_head in range(KV_HEADS):
                q = _query(qkv, row, kv_head, m, d, HEADS, KV_HEADS, D)
                scores = _scores(
                    q,
                    keys,
                    page_ids + first_page,
                    n,
                    position,
                    kv_head,
                    d,
                    scale,
                    KV_HEADS,
                    D,
                    WINDOW,
                    PRECISION,
                )
                at = row * HEADS + kv_head * GROUP + m
                top = tl.load(tops + at, mask=m < GROUP, other=0.0)
                total = tl.load(totals + at, mask=m < GROUP, other=1.0)
                share = tl.exp2(scores - top[:, None]) / total[:, None]
                received += tl.sum(tl.where((m < GROUP)[:, None], share, 0.0), 0)
        place = out + first_page * PAGE + n
        tl.store(place, tl.load(place, mask=inside, other=0.0) + received, mask=inside)


@triton.jit
def _query(qkv, row, kv_head, m, d, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    offset = (row * (HEADS + 2 * KV_HEADS) + kv_head * GROUP + m)[:, None] * D + d[None, :]
    return tl.load(qkv + offset, mask=(m < GROUP)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _scores(
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
