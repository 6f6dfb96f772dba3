"""Attention over pages in torch: what the kernels of other backends must compute.

A *row* is a query at any position of a sequence whose page table names the pages of its keys and values,
`[num_pages, kv_heads, 32, head_dim]`, or in 8 bits (`engines.kv_pages`). Rows attend to the positions up to
their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Protocol

import torch
from torch.nn.functional import rms_norm

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.engines.reference.pages import pack_u8, unpack_u8
from blockzoo.zoo.blocks import AttnSpec

Inputs = Mapping[str, torch.Tensor]
"""What is bound to an engine, by the names of `engines.base.Engine`; `positions` (int32 [T]) may name rows
at arbitrary positions, and then `past_lens` is not read."""


Norms = tuple[torch.Tensor, torch.Tensor]
"""Weights of the norms of q's and k's heads, [head_dim] each."""


class Attention(Protocol):
    """Writes K and V into pages and attends over them: torch here, kernels on a GPU."""

    def __call__(
        self, qkv: torch.Tensor, inputs: Inputs, page_ids: torch.Tensor, spec: AttnSpec, norms: Norms | None
    ) -> torch.Tensor:
        """Norm and rotate q and k, write K and V, attend; see `DenseAttention`."""

    def rotated(
        self, qkv: torch.Tensor, inputs: Inputs, page_ids: torch.Tensor, spec: AttnSpec
    ) -> torch.Tensor:
        """The same for q and k that are normed and rotated already."""

    def no_scores(self, inputs: Inputs) -> torch.Tensor:
        """Zeros, to be bound as `scores`: what every layer of a call adds its scores to."""

    def packed_scores(self, inputs: Inputs) -> torch.Tensor:
        """The `scores` of a call in the form of `engines.base.Engine.scores`."""


class DenseAttention:
    """Gathers each sequence's pages into one matrix; waits for the device once per sequence."""

    def __call__(
        self, qkv: torch.Tensor, inputs: Inputs, page_ids: torch.Tensor, spec: AttnSpec, norms: Norms | None
    ) -> torch.Tensor:
        """Norm and rotate q and k, write the rows' K and V, then attend.

        Args:
            qkv: [T, (heads + 2 * kv_heads) * head_dim], side by side; may be overwritten.
            inputs: of the engine.
            page_ids: the layer's `block_indices`.
            spec: the attention operator.
            norms: where it has `qk_norm`.

        Returns:
            [T, heads * head_dim].
        """
        turned = rotate(qkv, inputs["cos"][:, 0], inputs["sin"][:, 0], spec, norms)
        return self.rotated(turned, inputs, page_ids, spec)

    def rotated(
        self, qkv: torch.Tensor, inputs: Inputs, page_ids: torch.Tensor, spec: AttnSpec
    ) -> torch.Tensor:
        """The same for q and k that are normed and rotated already."""
        dim, kv_heads = spec.head_dim, spec.num_kv_heads
        q, k, v = (
            part.unflatten(1, (-1, dim))
            for part in qkv.split([spec.num_heads * dim, kv_heads * dim, kv_heads * dim], 1)
        )
        keys, values = inputs["key_cache"], inputs["value_cache"]
        begins = inputs["subsequence_begins"].tolist()
        tables = inputs["block_indices_begins"].tolist()
        positions = _positions(inputs, begins)
        for i, (begin, end) in enumerate(itertools.pairwise(begins)):
            where = positions[begin:end]
            table = page_ids[tables[i] : tables[i + 1]].long()
            page, slot = table[where // PAGE_TOKENS], where % PAGE_TOKENS
            keys[page, :, slot] = _stored(k[begin:end], keys)
            values[page, :, slot] = _stored(v[begin:end], values)
        out = torch.empty_like(q)
        context = 0  # tokens of the sequences before
        for i, (begin, end) in enumerate(itertools.pairwise(begins)):
            where = positions[begin:end]
            length = int(where.max()) + 1
            pages = page_ids[tables[i] : tables[i] - (-length // PAGE_TOKENS)].long()
            k_all, v_all = (_loaded(cache[pages], q.dtype)[:length] for cache in (keys, values))
            weights = attention_weights(q[begin:end], k_all, where, spec)
            out[begin:end] = attend(weights, v_all)
            if "score_windows" in inputs and (window := min(int(inputs["score_windows"][i]), end - begin)):
                inputs["scores"][context : context + length] += weights[:, :, -window:].sum((0, 1, 2))
            context += length
        return out.flatten(1)

    def no_scores(self, inputs: Inputs) -> torch.Tensor:
        """float32 [sum of past + new]."""
        context = int(inputs["past_lens"].sum()) + int(inputs["subsequence_begins"][-1])
        return torch.zeros(context, device=inputs["past_lens"].device)

    def packed_scores(self, inputs: Inputs) -> torch.Tensor:
        """As they are."""
        return inputs["scores"]


def _stored(rows: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Rows [T, kv_heads, head_dim] as pages hold them."""
    return pack_u8(rows) if pages.dtype == torch.uint8 else rows.to(pages.dtype)


def _loaded(pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows [32 * n, kv_heads, head_dim] of n pages."""
    rows = unpack_u8(pages) if pages.dtype == torch.uint8 else pages
    return rows.to(dtype).transpose(1, 2).flatten(0, 1)


def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spec: AttnSpec, norms: Norms | None
) -> torch.Tensor:
    """q, k, v side by side -> the same with q and k normed, where there are norms, and rotated.

    cos, sin: float32 [T, 1, head_dim], their halves equal.
    """
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    q, k, v = qkv.unflatten(1, (-1, spec.head_dim)).split([heads, kv_heads, kv_heads], 1)
    if norms is not None:
        eps, shape = spec.rms_norm_eps, (spec.head_dim,)
        q, k = (rms_norm(x, shape, weight, eps) for x, weight in zip((q, k), norms, strict=True))
    return torch.cat([_rotated(q, cos, sin), _rotated(k, cos, sin), v], 1).flatten(1)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.float().chunk(2, -1)
    return (torch.cat([low, high], -1) * cos + torch.cat([-high, low], -1) * sin).to(x.dtype)


def attention_weights(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, spec: AttnSpec
) -> torch.Tensor:
    """Rows q [T, heads, head_dim] at `positions` over k [L, kv_heads, head_dim] of positions 0 to L - 1.

    Returns:
        float32 [kv_heads, heads of each, T, L].
    """
    mask = torch.arange(len(k), device=k.device) <= positions[:, None]
    if spec.sliding_window:
        mask &= torch.arange(len(k), device=k.device) > positions[:, None] - spec.sliding_window
    group = spec.num_heads // spec.num_kv_heads
    grouped = q.unflatten(1, (spec.num_kv_heads, group))  # [T, kv_heads, group, D]
    scores = torch.einsum("tkgd,lkd->kgtl", grouped, k).float() * spec.head_dim**-0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1)


def attend(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Weights as above over v [L, kv_heads, head_dim] -> [T, heads, head_dim] of v's type."""
    return torch.einsum("kgtl,lkd->tkgd", weights.to(v.dtype), v).flatten(1, 2)


def _positions(inputs: Inputs, begins: list[int]) -> torch.Tensor:
    """int64 [T]."""
    if "positions" in inputs:
        return inputs["positions"].long()
    counts = inputs["subsequence_begins"].diff().long()
    starts = inputs["past_lens"].long() - inputs["subsequence_begins"][:-1]
    rows = torch.arange(begins[-1], device=starts.device)
    return rows + starts.repeat_interleave(counts, output_size=begins[-1])
