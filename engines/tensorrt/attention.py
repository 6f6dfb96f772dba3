"""Paged attention on the GPU: rotate, write K and V, attend; one code path for prefill, decode and any rows.

Launch shapes depend on the shapes of the inputs only, never on their contents: nothing waits for the GPU,
and a launch can be recorded in a CUDA graph and replayed while positions, page tables and lengths change.
"""

from __future__ import annotations

import math

import torch

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.engines.reference.attention import Inputs, Norms
from blockzoo.engines.tensorrt import kernels, score_kernels
from blockzoo.engines.tensorrt.operators import dot_precision, power_of_two
from blockzoo.zoo.blocks import AttnSpec

_MAX_SPLITS = 32
_TILE = 64  # keys in a tile, at most
_TILE_ROW_BYTES = 256  # of larger rows of K half as many, or RTX cards lack shared memory


class PagedAttention:
    """The Triton-language attention; see `engines.reference.attention.DenseAttention` for what it computes.

    Args:
        num_processors: of the GPU: short batches are split over the keys until all have work.
    """

    def __init__(self, num_processors: int) -> None:
        self._num_processors = num_processors

    def __call__(
        self, qkv: torch.Tensor, inputs: Inputs, page_ids: torch.Tensor, spec: AttnSpec, norms: Norms | None
    ) -> torch.Tensor:
        """Norm and rotate q and k (q in place, in `qkv`), write K and V, attend: [T, heads * head_dim]."""
        self._write(qkv, inputs, page_ids, spec, norms, rotate=True)
        return self._attend_and_score(qkv, inputs, page_ids, spec)

    def rotated(
        self, qkv: torch.Tensor, inputs: Inputs, page_ids: torch.Tensor, spec: AttnSpec
    ) -> torch.Tensor:
        """The same for q and k that are rotated already."""
        self._write(qkv, inputs, page_ids, spec, None, rotate=False)
        return self._attend_and_score(qkv, inputs, page_ids, spec)

    def no_scores(self, inputs: Inputs) -> torch.Tensor:
        """float32 [E * 32]: one for each token that the page tables have room for, as in the tables."""
        (name, *_) = (name for name in inputs if name.startswith("block_indices."))
        return torch.zeros(len(inputs[name]) * PAGE_TOKENS, device=inputs[name].device)

    def packed_scores(self, inputs: Inputs) -> torch.Tensor:
        """Without the room behind each sequence; waits for the GPU."""
        begins, past_lens, _, table_begins = _rows(inputs)
        lens, firsts = (past_lens + begins.diff()).tolist(), (table_begins * PAGE_TOKENS).tolist()
        parts = [inputs["scores"][first : first + n] for first, n in zip(firsts, lens, strict=False)]
        return torch.cat(parts)

    def _attend_and_score(
        self, qkv: torch.Tensor, inputs: Inputs, page_ids: torch.Tensor, spec: AttnSpec
    ) -> torch.Tensor:
        if "scores" in inputs:
            _add_scores(qkv, inputs, page_ids, spec)
        return self._attend(qkv, inputs, page_ids, spec)

    def _write(
        self,
        qkv: torch.Tensor,
        inputs: Inputs,
        page_ids: torch.Tensor,
        spec: AttnSpec,
        norms: Norms | None,
        *,
        rotate: bool,
    ) -> None:
        q_norm, k_norm = norms or (qkv, qkv)  # something to point at; not read
        heads = 2 * spec.num_kv_heads + (spec.num_heads if rotate else 0)
        cos, sin = (inputs["cos"], inputs["sin"]) if rotate else (qkv, qkv)
        kernels.rotate_and_write[(len(qkv), heads)](
            qkv,
            cos,
            sin,
            q_norm,
            k_norm,
            inputs["key_cache"],
            inputs["value_cache"],
            page_ids,
            *_rows(inputs),
            len(inputs["past_lens"]),
            spec.rms_norm_eps,
            **_shape(spec),
            HALF=power_of_two(spec.head_dim // 2),
            ROTATE=rotate,
            NORM=norms is not None,
            HAS_POSITIONS="positions" in inputs,
            num_warps=1,
        )

    def _attend(
        self, qkv: torch.Tensor, inputs: Inputs, page_ids: torch.Tensor, spec: AttnSpec
    ) -> torch.Tensor:
        num_rows, num_seqs = len(qkv), len(inputs["past_lens"])
        group = spec.num_heads // spec.num_kv_heads
        block_m = max(16 if num_rows <= 4 * num_seqs else 64, power_of_two(group))
        block_q = block_m // group
        num_blocks = num_rows // block_q + num_seqs
        table_tokens = -(-len(page_ids) // num_seqs) * PAGE_TOKENS
        splits = self._splits(num_blocks * spec.num_kv_heads, table_tokens)
        out = qkv.new_empty(num_rows, spec.num_heads * spec.head_dim)
        parts, sums = out, out
        if splits > 1:
            shape = (num_rows * spec.num_heads, splits)
            parts = qkv.new_empty(*shape, spec.head_dim, dtype=torch.float32)
            sums = qkv.new_empty(*shape, 2, dtype=torch.float32)
        kernels.attend[(num_blocks, spec.num_kv_heads, splits)](
            qkv,
            inputs["key_cache"],
            inputs["value_cache"],
            page_ids,
            *_rows(inputs),
            parts,
            sums,
            num_seqs,
            _scale(spec),
            **_shape(spec),
            BLOCK_D=power_of_two(spec.head_dim),
            BLOCK_Q=block_q,
            BLOCK_M=block_m,
            BLOCK_N=_tile(qkv, spec),
            SPLITS=splits,
            WINDOW=spec.sliding_window,
            HAS_POSITIONS="positions" in inputs,
            PRECISION=dot_precision(qkv),
            num_warps=4,
            num_stages=3 if spec.head_dim <= 128 and qkv.element_size() == 2 else 2,
        )
        if splits > 1:
            kernels.join_splits[(num_rows * spec.num_heads,)](
                parts,
                sums,
                out,
                D=spec.head_dim,
                BLOCK_D=power_of_two(spec.head_dim),
                SPLITS=splits,
                BLOCK_S=power_of_two(splits),
                num_warps=1,
            )
        return out

    def _splits(self, programs: int, table_tokens: int) -> int:
        """Parts of the keys: enough programs for the GPU, none with less than two tiles of a full table."""
        wanted = min(2 * self._num_processors // programs, table_tokens // (2 * _TILE), _MAX_SPLITS)
        return 1 << max(0, wanted.bit_length() - 1) if wanted > 0 else 1


def _add_scores(qkv: torch.Tensor, inputs: Inputs, page_ids: torch.Tensor, spec: AttnSpec) -> None:
    """Add to `scores` (see `PagedAttention.no_scores`) what each token of the context receives.

    Of the attention of the last `score_windows` int32 [S] rows of its sequence, summed over rows and heads;
    qkv is rotated and its K written. Sequences have no `positions` here.
    """
    begins, past_lens, _, table_begins = _rows(inputs)
    tops, totals = (qkv.new_empty(len(qkv) * spec.num_heads, dtype=torch.float32) for _ in range(2))
    rows = (qkv, inputs["key_cache"], page_ids, begins, past_lens, table_begins, inputs["score_windows"])
    shape = _shape(spec) | {
        "BLOCK_D": power_of_two(spec.head_dim),
        "BLOCK_M": max(16, power_of_two(spec.num_heads // spec.num_kv_heads)),
        "BLOCK_N": _tile(qkv, spec),
        "WINDOW": spec.sliding_window,
        "PRECISION": dot_precision(qkv),
    }
    num_seqs, scale = len(past_lens), _scale(spec)
    score_kernels.softmax_sums[(len(qkv), spec.num_kv_heads)](*rows, tops, totals, num_seqs, scale, **shape)
    num_tiles = len(page_ids) * PAGE_TOKENS // _tile(qkv, spec) + num_seqs
    score_kernels.add_scores[(num_tiles,)](*rows, tops, totals, inputs["scores"], num_seqs, scale, **shape)


def _rows(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    past_lens = inputs["past_lens"]
    positions = inputs.get("positions", past_lens)
    return inputs["subsequence_begins"], past_lens, positions, inputs["block_indices_begins"]


def _tile(qkv: torch.Tensor, spec: AttnSpec) -> int:
    return _TILE if spec.head_dim * qkv.element_size() <= _TILE_ROW_BYTES else _TILE // 2


def _shape(spec: AttnSpec) -> dict[str, int]:
    return {"HEADS": spec.num_heads, "KV_HEADS": spec.num_kv_heads, "D": spec.head_dim}


def _scale(spec: AttnSpec) -> float:
    return float(spec.head_dim**-0.5 * math.log2(math.e))
