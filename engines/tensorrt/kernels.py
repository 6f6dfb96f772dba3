"""Triton-language kernels around the paged KV pool: writing K and V to it, and attention over it.

The pool is two tensors [num_pages, kv_heads, 32, head_dim]. A step's rows are those of its sequences one
after the other: `begins` [S + 1] says where each begins, `page_ids` from `table_begins[s]` on are the pages
of sequence s in this layer, and row i of it stands at position `past_lens[s] + i`, or wherever `positions`
[T] says: any rows of a sequence, in any order, attend to every key up to their own position.

                     head 0   head 1 ...   kv head 0 ...            kv head 0 ...
    a row of qkv:   |  q    |   q    | ... |   k    | ...  |   v    | ...

Dots take bf16, fp16 or float32 operands and sum in float32; the interpreter computes bf16 dots wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(32)
POINTERS = ["page_ids", "begins", "past_lens", "positions", "table_begins"]
"""Arguments that are slices of a step's integers: a kernel compiled anew for each alignment that they happen
to have would stop a step for seconds."""


@triton.jit
def sequence_of(begins, index, num_seqs, BLOCK_Q: tl.constexpr):
    """The sequence whose query block `index` is; sequence s has blocks from begins[s] // BLOCK_Q + s on.

    That leaves each sequence room for one partial block, so that the grid needs no exact count. With
    BLOCK_Q 0: the sequence of row `index`.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        first = tl.load(begins + middle)
        if BLOCK_Q > 0:
            first = first // BLOCK_Q + middle
        if first <= index:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=POINTERS)
def rotate_and_write(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    keys,
    values,
    page_ids,
    begins,
    past_lens,
    positions,
    table_begins,
    num_seqs,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # next power of two of D / 2
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """One program per row and head: norm and rotate q in place, k into its page; v into its page.

    Without ROTATE q and k are rotated already: only k and v are written, and the grid begins at head HEADS.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    if not ROTATE:
        head += HEADS
    seq = sequence_of(begins, row, num_seqs, 0)
    if HAS_POSITIONS:
        position = tl.load(positions + row)
    else:
        position = tl.load(past_lens + seq) + row - tl.load(begins + seq)
    d = tl.arange(0, HALF)
    inside = d < D // 2
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * D + d
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + D // 2, mask=inside, other=0.0)
    if ROTATE and head < HEADS + KV_HEADS:
        a = low.to(tl.float32)
        b = high.to(tl.float32)
        if NORM:
            weight = q_norm if head < HEADS else k_norm
            scale = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
            # rounded where a network of separate operators rounds
            a = (a * scale * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)).to(low.dtype)
            b = (b * scale * tl.load(weight + D // 2 + d, mask=inside, other=0.0).to(tl.float32)).to(
                low.dtype
            )
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        c = tl.load(cos + row * D + d, mask=inside, other=0.0)
        s = tl.load(sin + row * D + d, mask=inside, other=0.0)
        low = (a * c - b * s).to(low.dtype)
        high = (b * c + a * s).to(high.dtype)
    if head < HEADS:
        tl.store(source, low, mask=inside)
        tl.store(source + D // 2, high, mask=inside)
    else:
        page = tl.load(page_ids + tl.load(table_begins + seq) + position // PAGE).to(tl.int64)
        kv_head = (head - HEADS) % KV_HEADS
        offset = ((page * KV_HEADS + kv_head) * PAGE + position % PAGE) * D + d
        pool = keys if head < HEADS + KV_HEADS else values
        tl.store(pool + offset, low, mask=inside)
        tl.store(pool + offset + D // 2, high, mask=inside)


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=POINTERS)
def attend(
    qkv,
    keys,
    values,
    page_ids,
    begins,
    past_lens,
    positions,
    table_begins,
    out,  # [T, HEADS * D]; with SPLITS > 1 float32 [T * HEADS, SPLITS, D]
    sums,  # with SPLITS > 1 float32 [T * HEADS, SPLITS, 2]: largest exponent, sum
    num_seqs,
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,  # >= BLOCK_Q * HEADS / KV_HEADS, a power of two
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per query block, kv head and split of the keys: BLOCK_Q rows of one sequence, all the
    heads that share the kv head, in one tile (FlashAttention-2, arXiv 2307.08691, over pages)."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    seq = sequence_of(begins, block, num_seqs, BLOCK_Q)
    begin = tl.load(begins + seq)
    count = tl.load(begins + seq + 1) - begin
    first = (block - begin // BLOCK_Q - seq) * BLOCK_Q
    if first < count:
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        row = first + m // GROUP
        wanted = (m < BLOCK_Q * GROUP) & (row < count)
        head = kv_head * GROUP + m % GROUP
        if HAS_POSITIONS:
            position = tl.load(positions + begin + row, mask=wanted, other=0)
        else:
            position = tl.where(wanted, tl.load(past_lens + seq) + row, 0)
        last = tl.max(position, 0)
        position = tl.where(wanted, position, last)  # rows that are not stored still see some key
        q_offset = ((begin + row) * (HEADS + 2 * KV_HEADS) + head)[:, None] * D + d[None, :]
        q = tl.load(qkv + q_offset, mask=wanted[:, None] & (d < D)[None, :], other=0.0)
        begin_tile = 0
        if WINDOW > 0:
            begin_tile = tl.maximum(tl.min(position, 0) - WINDOW + 1, 0) // BLOCK_N
        end_tile = last // BLOCK_N + 1
        per_split = (end_tile - begin_tile + SPLITS - 1) // SPLITS
        begin_tile += split * per_split
        end_tile = tl.minimum(begin_tile + per_split, end_tile)
        table = page_ids + tl.load(table_begins + seq)
        top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for tile in range(begin_tile, end_tile):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            written = n <= last
            page = tl.load(table + n // PAGE, mask=written, other=0).to(tl.int64)
            offset = ((page * KV_HEADS + kv_head) * PAGE + n % PAGE) * D
            k_mask = (d < D)[:, None] & written[None, :]
            k = tl.load(keys + offset[None, :] + d[:, None], mask=k_mask, other=0.0)
            scores = tl.dot(q, k, input_precision=PRECISION) * scale
            visible = n[None, :] <= position[:, None]
            if WINDOW > 0:
                visible &= n[None, :] > position[:, None] - WINDOW
            scores = tl.where(visible, scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen no key yet
            weights = tl.exp2(scores - shift[:, None])
            fade = tl.exp2(top - shift)
            total = total * fade + tl.sum(weights, 1)
            v_mask = written[:, None] & (d < D)[None, :]
            v = tl.load(values + offset[:, None] + d[None, :], mask=v_mask, other=0.0)
            acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            top = new_top
        result = (begin + row) * HEADS + head
        stored = wanted[:, None] & (d < D)[None, :]
        if SPLITS == 1:
            tl.store(
                out + result[:, None] * D + d[None, :],
                (acc / total[:, None]).to(out.dtype.element_ty),
                mask=stored,
            )
        else:
            part = result * SPLITS + split
            tl.store(out + part[:, None] * D + d[None, :], acc, mask=stored)
            tl.store(sums + part * 2, top, mask=wanted)
            tl.store(sums + part * 2 + 1, total, mask=wanted)


@triton.jit
def join_splits(
    parts, sums, out, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr
):
    """One program per row and head: the splits' results weighed into one."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    there = s < SPLITS
    top = tl.load(sums + (row * SPLITS + s) * 2, mask=there, other=-float("inf"))
    total = tl.load(sums + (row * SPLITS + s) * 2 + 1, mask=there, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    offset = (row * SPLITS + s)[:, None] * D + d[None, :]
    part = tl.load(parts + offset, mask=there[:, None] & (d < D)[None, :], other=0.0)
    mixed = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + row * D + d, mixed.to(out.dtype.element_ty), mask=d < D)
