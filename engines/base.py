"""What every engine maker offers, whatever compiles the blocks.

An engine runs a *span*: a run of consecutive blocks of a chain, without the embedding (a table
look-up, see `embedding`). It is bound by tensor name and then run; between steps of equal shape only
the contents of the bound arrays change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from blockzoo.zoo.blocks import AttnSpec, Block, BlockSpec, HeadSpec

if TYPE_CHECKING:
    from blockzoo.engines.arrays import Array, Arrays
    from blockzoo.engines.kv_pages import KVPrecision
    from blockzoo.zoo.store import Zoo

Precision = Literal["f32", "bf16"]

PAGE_TOKENS = 32
"""Tokens in a page, which holds K and V of one layer; fixed by OpenVINO's paged attention on CPUs."""


def pages_for(num_tokens: int) -> int:
    """Pages per layer that `num_tokens` tokens take."""
    return -(-num_tokens // PAGE_TOKENS)


class EngineError(RuntimeError):
    """An engine cannot be made or run here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class SpanSpec:
    """The shape of a span: its operators in order, and where rows may leave it.

    Attributes:
        specs: operator specs of the blocks, in order.
        drops_rows: True when only the rows named by the input `rows` pass the span's last attention
            (or, in a span without attention, its first block): the K and V of the others are written,
            nothing else of them is needed.
        lora: by index of a block in the span, the projections that take adapters.
        scores: whether it tells how much attention each token of the context received.
    """

    specs: tuple[BlockSpec, ...]
    drops_rows: bool
    lora: tuple[tuple[int, tuple[str, ...]], ...] = ()
    scores: bool = False

    @property
    def layers(self) -> tuple[AttnSpec, ...]:
        """The attention operators of the span, in order; each needs one `block_indices.<i>`."""
        return tuple(spec for spec in self.specs if isinstance(spec, AttnSpec))

    @property
    def head(self) -> HeadSpec | None:
        """The head's spec where the span ends in logits."""
        last = self.specs[-1]
        return last if isinstance(last, HeadSpec) else None

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that enter the span."""
        return self.specs[0].hidden_size


class Engine(Protocol):
    """A compiled span.

    Inputs by name (T rows, S sequences, E page-table entries, R kept rows):
        hidden          precision  [T, hidden]
        rows            int32      [R]          only when `spec.drops_rows`
      and when the span holds attention:
        cos, sin        float32    [T, 1, 1, head_dim]
        key_cache, value_cache     `Arrays.pages`, [pages, kv_heads, 32, width], updated in place
        past_lens       int32 [S], subsequence_begins int32 [S + 1], block_indices_begins int32 [S + 1]
        block_indices.<i>          int32 [E]    page ids of the span's i-th layer
        max_context_len int32      scalar, max over sequences of past + new
        score_windows   int32 [S]  only when `spec.scores`: the last so many rows of each sequence give scores
      and when projections take adapters (`spec.lora`), with Q the ranks of all active adapters together:
        lora_mask       precision  [T, Q]       1 where a row uses that part of an adapter, else 0
        lora_a.<i>.<projection>    precision [Q, in]    of block i of the span; rows of zeros where an
        lora_b.<i>.<projection>    precision [Q, out]   adapter leaves the projection alone
        lora_versions   int64 [Q], numpy: a number that changes when what lies at a rank does
        (y = x W^T + ((x A^T) * mask) B; an adapter's scale is folded into B. Engines may hold packed copies,
        and tell by the versions whether they are those of what is bound: the matrices of ranks that no mask
        has may be written to between two runs)
    Outputs:
        hidden_out      precision  [T or R, hidden], or
        logits          float32    [T or R, vocab]   when the span ends in a head
    """

    spec: SpanSpec

    def bind(self, name: str, array: Array) -> None:
        """Bind a C-contiguous array of the maker's `arrays`, kept alive by the engine."""

    def run(self) -> None:
        """Run on what is bound; `Arrays.to_host` and `Arrays.wait` wait for a device to have finished."""

    def scores(self) -> Array:
        """Of the last run of an engine with `spec.scores` and attention: float32 [sum of past + new], the
        sequences one after the other: what each token of the context received of the attention of the rows
        that `score_windows` names, summed over rows, heads and layers."""

    def release_memory(self) -> None:
        """Give back scratch that large steps have taken; the next run takes what it needs again."""


class Embedding(Protocol):
    """An embed block's table."""

    vocab_size: int

    def lookup(self, token_ids: Array, out: Array) -> None:
        """Write the rows of `token_ids`, int32 [n] below vocab_size, to `out`, activations [n, hidden]."""


class EngineMaker(Protocol):
    """Compiles spans for one backend at one precision; `arrays` makes what its engines are bound to.

    From any thread, one at a time, while its engines run.
    """

    name: str
    precision: Precision
    kv_precision: KVPrecision
    arrays: Arrays

    def expect(self, num_spans: int) -> None:
        """Say how many spans will be compiled, before the first: memory that engines keep is shared out."""

    def follow(self, zoo: Zoo) -> None:
        """Take what a zoo keeps for engines beside its blocks from this one, which has changed."""

    def span(
        self,
        blocks: Sequence[Block],
        *,
        drops_rows: bool = False,
        lora: Mapping[int, Sequence[str]] = {},
        scores: bool = False,
        drafts: bool = False,
    ) -> Engine:
        """Compile consecutive blocks into one engine; see `SpanSpec`. `drafts`: it guesses what
        others check, so speed counts for more than the last digits. Raises EngineError."""

    def embedding(self, block: Block) -> Embedding:
        """The look-up of an embed block."""

    def facts(self) -> dict[str, Any]:
        """Backend name, version, precision and target, for manifests and reports."""


def activation_dtype(precision: Precision) -> np.dtype[Any]:
    """The numpy dtype that carries activations: bf16 is held as uint16."""
    return np.dtype(np.uint16 if precision == "bf16" else np.float32)
