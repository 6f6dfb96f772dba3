"""The pages that are kept under keys: nodes by segment, who uses them, which go first.

A node stands for 32 tokens (and, through its key, all tokens before them) in one segment of layers, and holds
one page id per layer of that segment. Chains that agree below a boundary name the same segments there, so
their sequences meet in the same nodes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from blockzoo.runtime.kv.integrity import check_lru, check_partition, check_references
from blockzoo.runtime.kv.nodes import Node, SegmentTree
from blockzoo.runtime.kv.pool import PagePool
from blockzoo.runtime.kv.sequence import Segment, TokenSequence


class PrefixTree:
    """Nodes over one pool.

    `_lru` holds the unreferenced ones, oldest use first, and each child before its parent. So its front is
    always a leaf: eviction needs no search and never cuts a path.

    Attributes:
        version: changes whenever nodes came or went.
        num_pages: held by nodes.
        num_evictable_pages: of these, by unreferenced ones.
        evictions: nodes evicted.
    """

    def __init__(self, pool: PagePool) -> None:
        self.version = 0
        self.num_pages = self.num_evictable_pages = self.evictions = 0
        self._pool = pool
        # By the whole segment, not its key alone: a node's pages must fit the layers that ask for it.
        self._segments: dict[Segment, SegmentTree] = {}
        self._lru: OrderedDict[Node, None] = OrderedDict()

    def find(self, segment: Segment) -> SegmentTree | None:
        """The nodes of a segment, where it has had any."""
        return self._segments.get(segment)

    def of(self, seq: TokenSequence) -> list[SegmentTree]:
        """The nodes of each segment of a sequence."""
        segments = self._segments
        return [segments.get(s) or segments.setdefault(s, SegmentTree(s)) for s in seq.segments]

    def add(self, node: Node) -> None:
        """Enter a node that one sequence uses."""
        node.tree.add(node)
        self.num_pages += node.pages.size

    def reference(self, node: Node) -> None:
        """One more uses a node."""
        if node.refs == 0:
            del self._lru[node]
            self.num_evictable_pages -= node.pages.size
        node.refs += 1

    def dereference(self, node: Node) -> None:
        """One fewer uses it. Children first: that is the order in which they are evicted."""
        node.refs -= 1
        if node.refs == 0:
            self._lru[node] = None
            self.num_evictable_pages += node.pages.size

    def evict_until_free(self, count: int) -> bool:
        """Free pages until the pool has `count`; False, having changed nothing, where too few can go."""
        short = count - self._pool.num_free
        if short <= 0:
            return True
        if short > self.num_evictable_pages:
            return False
        evicted: list[np.ndarray] = []
        while short > 0:
            node, _ = self._lru.popitem(last=False)
            node.tree.remove(node)
            evicted.append(node.pages)
            short -= node.pages.size
        pages = np.concatenate(evicted)
        self._pool.free(pages)
        self.num_pages -= pages.size
        self.num_evictable_pages -= pages.size
        self.evictions += len(evicted)
        self.version += 1
        return True

    def gains(self) -> tuple[dict[str, int], dict[str, int]]:
        """By segment key: tokens whose KV was found; tokens computed twice, whose second KV was dropped."""
        hits: dict[str, int] = {}
        deduped: dict[str, int] = {}
        for tree in list(self._segments.values()):  # a copy: others may ask while the engine runs
            key = tree.segment.key
            hits[key] = hits.get(key, 0) + tree.hit_tokens
            deduped[key] = deduped.get(key, 0) + tree.deduped_tokens
        return hits, deduped

    def check_integrity(self, sequences: Iterable[TokenSequence], pins: Sequence[Node]) -> None:
        """Check all that must hold, given every sequence that may hold pages, and the nodes pinned besides.

        Raises:
            IntegrityError: on the first that does not.
        """
        sequences = list(sequences)
        nodes = [node for tree in self._segments.values() for node in tree.nodes.values()]
        check_partition(self._pool, sequences, nodes, self.num_pages)
        check_references(sequences, nodes, pins)
        check_lru(nodes, list(self._lru), self.num_evictable_pages)
