"""One running or waiting request as the scheduler and the KV cache see it: token ids, pages, counts.

It knows nothing of sampling, text or engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.api.request import KVReuse
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.approx.selection import pieces
from blockzoo.runtime.approx.state import ApproximateKV
from blockzoo.runtime.kv.page_keys import PUBLIC_ROOT, branch_key, page_key, root_key

if TYPE_CHECKING:
    from blockzoo.runtime.kv.nodes import Node
    from blockzoo.runtime.kv.prefix_cache import KVCache

_PAGE_TABLE_CHUNK = 16  # columns; 512 tokens


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers [first_layer, end_layer) of a chain; equal `key`s compute equal KV there from equal tokens.

    Attributes:
        boundary: equal ones have equal hidden states where their chains first differ below this segment,
            from equal tokens. Empty where nothing may enter: the chain's first segment.
    """

    first_layer: int
    end_layer: int
    key: str
    boundary: str = ""


Chain = tuple[Segment, ...]
"""The segments of a chain, bottom up."""


class Part(NamedTuple):
    """Tokens [start, end) of a sequence; the KV of its lower `level` segments is in the tree already.

    With a level above 0 the tokens' hidden states enter the chain at segment number `level`.
    """

    start: int
    end: int
    level: int


class TokenSequence:
    """The state of one request. The KV cache owns the fields about pages; the scheduler reads counts."""

    __slots__ = (
        "_ends_line",
        "_page_keys",
        "_root_key",
        "_tokens",
        "approx",
        "approximate",
        "arrival",
        "cache",
        "chain_index",
        "copied_from",
        "documents",
        "documents_version",
        "drafted",
        "entering",
        "logits_from",
        "model",
        "nodes",
        "num_cached",
        "num_computed",
        "num_layers",
        "num_pages",
        "num_preemptions",
        "num_public_pages",
        "num_tokens",
        "page_table",
        "prompt_len",
        "publishes",
        "request_id",
        "reuse",
        "scope",
        "segments",
        "tenant",
        "unfinished",
        "weight",
    )

    def __init__(
        self,
        request_id: str,
        model: str,
        cache: KVCache,
        segments: Iterable[Segment],
        scope: str,
        prompt_token_ids: Sequence[int] | np.ndarray,
        arrival: float,
        reuse: KVReuse = "exact",
        documents: Iterable[tuple[int, int]] = (),
        publishes: bool = False,
        ends_line: np.ndarray | None = None,
        chain_index: int = -1,
        tenant: str | None = None,
        weight: float | None = None,
        approximate: ReuseConfig | None = None,
    ) -> None:
        """`segments` cover all layers of the chain, bottom up; `arrival` is seconds of time.monotonic().

        Only sequences of one `scope` share KV, but for what an operator's sequence `publishes`: it leaves its
        pages to all scopes. `documents` are the (start, end) of the prompt's marked pieces. `ends_line`, bool
        [vocabulary], tells which tokens end a line of text. `chain_index`, into the topology's chains, is how
        executors know the chain. `tenant` is whose share of the engine it takes; None: the model's. `weight`
        is the tenant's, where it came with the request. `approximate`: how this request reuses KV
        approximately; None: as the cache's planner has it.
        """
        self.request_id = request_id
        self.model = model
        self.tenant = model if tenant is None else tenant
        self.weight = weight
        self.chain_index = chain_index
        self.cache = cache
        self.segments = tuple(segments)
        self.scope = scope
        self.reuse = reuse
        self.approximate = approximate
        self.arrival = arrival
        self.num_layers = _check_segments(self.segments)

        self._tokens = np.array(prompt_token_ids, dtype=np.int32)  # [capacity], first num_tokens valid
        if self._tokens.ndim != 1 or self._tokens.size == 0:
            raise ValueError(f"prompt token ids have shape {self._tokens.shape}, expected [n] with n >= 1")
        self.prompt_len = self.num_tokens = self._tokens.size
        self.num_computed = 0  # leading tokens whose KV is written
        self.num_cached = 0  # of these, tokens taken from the cache since the last admission
        self.num_preemptions = 0
        self.drafted: tuple[int, ...] = ()  # guessed to follow, none of its tokens yet: run by the next step
        self.logits_from = self.prompt_len  # prompt tokens from here on need logits, too

        self.page_table = np.full((self.num_layers, 0), -1, dtype=np.int32)  # [num_layers, capacity]
        self.num_pages = 0  # valid columns of page_table
        # Per segment: the tree nodes of the leading pages. These pages belong to the tree and are read only;
        # the columns behind them are the sequence's own. A lower segment's path may be longer than an upper
        # one's: the tokens between enter the chain at the boundary, with the hidden states in `entering`.
        self.nodes: list[list[Node]] = [[] for _ in self.segments]
        self.entering: dict[int, Any] = {}  # page -> hidden states [32, hidden]
        # boundary -> (next token, hidden states [32, hidden]) of a page that is not complete yet
        self.unfinished: dict[str, tuple[int, Any]] = {}
        self.copied_from: list[Node] = []  # per segment: whose page begins like the first own page, if any
        self.approx: ApproximateKV | None = None  # None: all KV is exact
        self.documents = tuple(documents)
        self.publishes = publishes
        self._ends_line = np.zeros(0, bool) if ends_line is None else ends_line
        self.num_public_pages = 0  # leading pages that are published, under keys of no scope
        self.documents_version = 0  # of the published documents, when these were counted
        self._root_key = PUBLIC_ROOT if publishes else root_key(scope)
        self._page_keys: list[bytes] = []

    @property
    def token_ids(self) -> np.ndarray:
        """Prompt and generated tokens, int32 [num_tokens]; a view."""
        return self._tokens[: self.num_tokens]

    def line_ends(self) -> np.ndarray:
        """bool [num_tokens], which tokens end a line of text."""
        known = self.token_ids < self._ends_line.size
        ends = np.zeros(self.num_tokens, bool)
        ends[known] = self._ends_line[self.token_ids[known]]
        return ends

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is still to be computed."""
        left = self.num_tokens - self.num_computed
        return left if self.approx is None else left - self.approx.num_reused(self.num_computed)

    @property
    def lacks_prompt_logits(self) -> bool:
        """Whether some tokens of the prompt still need the logits before them."""
        return self.logits_from < self.prompt_len - 1

    def num_prompt_logits(self, end: int) -> int:
        """Of how many of the tokens from num_computed to `end`, the last ones, logits are needed for that."""
        return max(0, end - max(self.num_computed, self.logits_from)) if self.lacks_prompt_logits else 0

    def end_after(self, num_rows: int) -> int:
        """What num_computed will be when `num_rows` more tokens have been computed."""
        start = self.num_computed
        return start + num_rows if self.approx is None else self.approx.end_after(start, num_rows)

    @property
    def num_tree_pages(self) -> int:
        """Leading pages that belong to the prefix tree in all layers."""
        return len(self.nodes[-1])

    @property
    def root_key(self) -> bytes:
        """What stands for the scope."""
        return self._root_key

    @property
    def num_cached_told(self) -> int:
        """num_cached in whole pages: all that others may know. Token by token, it would spell out prompts."""
        return self.num_cached - self.num_cached % PAGE_TOKENS

    @property
    def num_spared(self) -> int:
        """Tokens whose work the cache spares; where it spares some layers only, their share of it."""
        late = sum(
            (len(path) - self.num_tree_pages) * (segment.end_layer - segment.first_layer)
            for path, segment in zip(self.nodes, self.segments, strict=True)
        )
        reused = 0 if self.approx is None else self.approx.num_reused(0)
        return self.num_cached + reused + late * PAGE_TOKENS // self.num_layers

    @property
    def num_prompt_pages(self) -> int:
        """Pages that the prompt fills."""
        return self.prompt_len // PAGE_TOKENS

    def take_segments(self, segments: Chain, nodes: list[list[Node]]) -> None:
        """Go over to other segments of the same layers, with the nodes of its leading pages in each."""
        self.segments, self.nodes = segments, nodes
        boundaries = {segment.boundary for segment in segments}
        self.unfinished = {name: page for name, page in self.unfinished.items() if name in boundaries}

    def own_pages(self) -> np.ndarray:
        """The pages that belong to this sequence alone, int32 [n]."""
        owned = [
            self.page_table[segment.first_layer : segment.end_layer, len(path) : self.num_pages].ravel()
            for path, segment in zip(self.nodes, self.segments, strict=True)
        ]
        return np.concatenate(owned)

    def parts(self, end: int) -> list[Part]:
        """The tokens to compute from num_computed to `end`, cut where the level changes.

        All but the last end a page, or are single tokens between others that are reused.
        """
        parts = []
        start = self.num_computed
        for level in range(len(self.nodes) - 1, -1, -1):  # the more is cached, the further in front
            stop = end if level == 0 else min(end, len(self.nodes[level - 1]) * PAGE_TOKENS)
            if level == 0 and self.approx is not None and start < self.approx.reused.size:
                parts += [Part(a, b, 0) for a, b in pieces(self.approx.fresh(start, end), self.num_tokens)]
            elif stop > start:
                parts.append(Part(start, stop, level))
                start = stop
        return parts

    def append_token(self, token_id: int) -> None:
        """Add a generated token."""
        if self.num_tokens == self._tokens.size:
            grown = np.empty(self.num_tokens + max(64, self.num_tokens // 2), dtype=np.int32)
            grown[: self.num_tokens] = self._tokens
            self._tokens = grown
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1

    def set_public(self, keys: list[bytes]) -> None:
        """Say which leading pages are published, by their keys; while the sequence holds no page."""
        if keys or self.num_public_pages:
            self._page_keys = list(keys)
            self.num_public_pages = len(keys)

    def parent_key(self, page: int) -> bytes:
        """The key of all tokens before `page`."""
        if page == 0:
            return PUBLIC_ROOT if self.num_public_pages else self._root_key
        parent = self.page_keys(page)[page - 1]
        return branch_key(self._root_key, parent) if page == self.num_public_pages else parent

    def public_parent_key(self, page: int) -> bytes | None:
        """The same for what is published behind these tokens; None where they are not published."""
        if page > self.num_public_pages:
            return None
        return self.page_keys(page)[page - 1] if page else PUBLIC_ROOT

    def page_keys(self, count: int) -> list[bytes]:
        """Keys of the first `count` pages or more, which must be full of tokens; each is computed once."""
        keys = self._page_keys
        assert count * PAGE_TOKENS <= self.num_tokens, f"page {count - 1} of {self} is not full"
        for page in range(len(keys), count):
            tokens = self._tokens[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
            keys.append(page_key(self.parent_key(page), tokens))
        return keys

    def grow_page_table(self, num_pages: int) -> None:
        """Make room for `num_pages` columns; new entries are -1."""
        layers, capacity = self.page_table.shape
        if num_pages <= capacity:
            return
        capacity = -(-max(num_pages, 2 * capacity) // _PAGE_TABLE_CHUNK) * _PAGE_TABLE_CHUNK
        grown = np.full((layers, capacity), -1, dtype=np.int32)
        grown[:, : self.page_table.shape[1]] = self.page_table
        self.page_table = grown

    def __repr__(self) -> str:
        done = f"{self.num_computed}/{self.num_tokens} tokens"
        return f"TokenSequence({self.request_id!r}, {self.model!r}, {done})"


def _check_segments(segments: tuple[Segment, ...]) -> int:
    end = 0
    for segment in segments:
        if segment.first_layer != end or segment.end_layer <= end:
            raise ValueError(f"segments {segments} do not cover the layers from 0 on without gap or overlap")
        end = segment.end_layer
    if end == 0:
        raise ValueError("a chain needs at least one segment")
    return end
