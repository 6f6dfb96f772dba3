"""Pages that an operator has published: any scope of their chain may use them, and none is evicted.

They were computed in isolation, so they are exact at the start of any prompt. Only a sequence of the
operator's makes them; what other sequences compute behind them stays in their own scope.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.kv.nodes import Node, SegmentTree
from blockzoo.runtime.kv.page_keys import PUBLIC_ROOT, page_key
from blockzoo.runtime.kv.sequence import Chain, Segment, TokenSequence


@dataclass(slots=True, eq=False)
class Publication:
    """A document in one chain.

    Attributes:
        segments: of the chain; they and the nodes change together, as models come and go.
        token_ids: int32 [n]; what fills its last page behind them is left out.
        lead: of these, the leading ones that any prompt begins with, such as <s>.
        keys: of its pages.
        nodes: its pages in the tree, each before those that are evicted before it.
    """

    segments: Chain
    token_ids: np.ndarray
    lead: int
    keys: tuple[bytes, ...]
    nodes: tuple[Node, ...]


Path = Callable[[Segment, Sequence[bytes]], list[Node]]
"""The nodes of pages in a segment, referenced."""


class PublishStats(NamedTuple):
    """Counts of an engine since its start, and of what is published now."""

    documents: int = 0
    loaded: int = 0  # chains of documents whose KV came from disk
    computed: int = 0  # those whose KV was computed
    rejected_files: int = 0  # on disk, damaged or not what they say


class PublishedPages:
    """What is published in one KV cache."""

    def __init__(self) -> None:
        self.version = 1  # changes with what is published; sequences begin at 0
        self.num_pages = 0
        self.hit_tokens = 0  # that sequences took from it
        self._keys: dict[Chain, Counter[bytes]] = {}  # how many publications hold each page
        self._publications: dict[Publication, None] = {}
        self._pins: Counter[Node] = Counter()

    def pins(self) -> list[Node]:
        """The nodes referenced, as often as they are."""
        return list(self._pins.elements())

    def has(self, segments: Chain, key: bytes) -> bool:
        """Whether the page `key` is published in the chain of `segments`."""
        return key in self._keys.get(segments, ())

    def mark(self, seq: TokenSequence) -> None:
        """Tell a sequence that holds no page how many of its leading ones are published."""
        if seq.publishes or seq.documents_version == self.version:
            return
        seq.documents_version = self.version
        known = self._keys.get(seq.segments)
        keys: list[bytes] = []
        if known:
            key = PUBLIC_ROOT
            for start in range(0, seq.num_tokens - PAGE_TOKENS + 1, PAGE_TOKENS):
                key = page_key(key, seq.token_ids[start : start + PAGE_TOKENS])
                if key not in known:
                    break
                keys.append(key)
        seq.set_public(keys)

    def missing_pages(self, seq: TokenSequence, trees: Sequence[SegmentTree]) -> int:
        """Pages more that would be published with the sequence `seq` of full pages."""
        keys = seq.page_keys(seq.num_tokens // PAGE_TOKENS)
        missing = [tree.num_layers for tree in trees for key in keys if tree.nodes.get(key) not in self._pins]
        return sum(missing)

    def add(self, publication: Publication) -> None:
        """Enter a publication whose nodes have been referenced."""
        self._publications[publication] = None
        self._keys.setdefault(publication.segments, Counter()).update(publication.keys)
        self.num_pages += sum(node.pages.size for node in publication.nodes if node not in self._pins)
        self._pins.update(publication.nodes)
        self.version += 1

    def remove(self, publication: Publication) -> None:
        """Forget a publication whose nodes are about to be dereferenced."""
        del self._publications[publication]
        keys = self._keys[publication.segments]
        keys -= Counter(publication.keys)  # drops those that none holds any more
        if not keys:
            del self._keys[publication.segments]
        self._pins -= Counter(publication.nodes)
        self.num_pages -= sum(node.pages.size for node in publication.nodes if node not in self._pins)
        self.version += 1

    def reshape(self, chains: Mapping[Chain, Chain], path: Path) -> None:
        """Go over to other segments (`KVCache.reshape`)."""
        self._keys = {chains[segments]: keys for segments, keys in self._keys.items()}
        for publication in self._publications:
            segments = chains[publication.segments]
            if segments != publication.segments:
                publication.segments = segments
                publication.nodes = nodes_of([path(s, publication.keys) for s in segments])
        self._pins = Counter(node for publication in self._publications for node in publication.nodes)
        self.version += 1


def nodes_of(paths: Sequence[Sequence[Node]]) -> tuple[Node, ...]:
    """The nodes of paths of equal length, each before those that are evicted before it."""
    return tuple(node for page in zip(*paths, strict=True) for node in page)
