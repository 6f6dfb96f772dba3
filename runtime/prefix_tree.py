"""Paged KV bookkeeping with an exact prefix cache, for one KV geometry.

A node of the tree stands for 32 tokens (and, through its key, all tokens before them) in one segment of
layers, and holds one page id per layer of that segment. Chains that agree below a boundary name the same
segments there, so their sequences meet in the same nodes.

    page_table of a sequence            columns: pages of 32 tokens
                        0    1    2    3    4
      layers 0..19    [ n    n    n  | o    o ]     n: pages of tree nodes, shared, never written again
      layers 20..23   [ n    n    n  | o    o ]     o: the sequence's own pages, being filled

It knows page ids, token counts and keys; no tensor, no engine.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from blockzoo.runtime.pool import PAGE_TOKENS, IntegrityError, PagePool, pages_for
from blockzoo.runtime.sequence import Segment, Sequence


class Node:
    """32 tokens in one segment: `pages` int32 [layers of the segment]; `refs` sequences use it now."""

    __slots__ = ("key", "pages", "parent", "refs", "tree")

    def __init__(self, tree: SegmentTree, key: bytes, parent: Node | None, pages: np.ndarray) -> None:
        self.tree = tree
        self.key = key
        self.parent = parent  # the 32 tokens before, in the same segment
        self.pages = pages
        self.refs = 1


class SegmentTree:
    """The nodes of one segment by page key, and what it gained."""

    __slots__ = ("deduped_tokens", "hit_tokens", "nodes", "segment")

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.nodes: dict[bytes, Node] = {}
        self.hit_tokens = 0
        self.deduped_tokens = 0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a KVCache since its start, and its pages now (free + cached + owned = total)."""

    pages_total: int
    pages_free: int
    pages_cached: int  # in the tree, used by a running sequence or not
    pages_evictable: int  # those of the tree that no running sequence uses
    pages_owned: int  # being filled by running sequences
    lookups: int  # admissions that asked the cache
    resumed_tokens: int  # hits of preempted sequences on their own return: saved, but not by sharing
    evictions: int  # nodes evicted
    hit_tokens: dict[str, int]  # per segment key: tokens whose KV was found, and not computed
    deduped_tokens: dict[str, int]  # per segment key: tokens computed twice, whose second KV was dropped


class KVCache:
    """Pages of one KV geometry: who owns them, which are cached, which may be evicted.

    Invariants (check_integrity):
    - A page is free, in the tree, or owned by one sequence.
    - A sequence that references the node of page i references those of pages < i, in all its segments.
    - `_lru` holds the unreferenced nodes, oldest use first, and each child before its parent. So its front is
      always a leaf: eviction needs no search and never cuts a path.
    """

    def __init__(self, num_pages: int, prefix_caching: bool = True) -> None:
        self.pool = PagePool(num_pages)
        self.prefix_caching = prefix_caching
        self.version = 0  # changes whenever a probe's result may have changed
        self.num_cached_pages = 0
        self.num_evictable_pages = 0
        self.lookups = 0
        self.resumed_tokens = 0
        self.evictions = 0
        # By the whole segment, not its key alone: a node's pages must fit the layers that ask for it.
        self._trees: dict[Segment, SegmentTree] = {}
        self._lru: OrderedDict[Node, None] = OrderedDict()

    # ---- lookups

    def probe(self, seq: Sequence) -> int:
        """Tokens that `seq` would skip if it began now. Changes nothing."""
        return self._match(seq) * PAGE_TOKENS

    def _match(self, seq: Sequence) -> int:
        """Leading pages that are cached in every segment; at least one token is left to compute."""
        if not self.prefix_caching:
            return 0
        trees = [self._trees.get(segment) for segment in seq.segments]
        limit = (seq.num_tokens - 1) // PAGE_TOKENS
        # No node outlives its parent, so presence is monotonic in the page index and bisection is exact.
        for tree in trees:
            if tree is None or limit == 0:
                return 0
            nodes = tree.nodes
            limit = bisect_left(seq.page_keys(limit), True, 0, limit, key=lambda key: key not in nodes)
        return limit

    def can_begin(self, seq: Sequence, spare_pages: int = 0) -> bool:
        """Whether pages for all tokens of a new `seq` can be had now, with `spare_pages` left besides."""
        matched = self._match(seq)
        pinned = 0  # evictable now, but not once the sequence uses them
        for tree in self._trees_of(seq):
            for key in seq.page_keys(matched)[:matched]:
                node = tree.nodes[key]
                pinned += node.pages.size if node.refs == 0 else 0
        need = (pages_for(seq.num_tokens) - matched) * seq.num_layers
        return need + spare_pages <= self.pool.num_free + self.num_evictable_pages - pinned

    def can_ever_hold(self, seq: Sequence) -> bool:
        """Whether all tokens of `seq` would fit if it had all pages to itself."""
        return pages_for(seq.num_tokens) * seq.num_layers <= self.pool.num_pages

    # ---- a sequence's life: begin, ([extend,] reserve, commit)*, release

    def begin(self, seq: Sequence) -> int:
        """Give `seq` the cached pages of its tokens. Returns and sets num_computed = num_cached."""
        assert seq.num_pages == 0, f"{seq} has begun already"
        self.lookups += 1
        seq.num_cached = 0
        seq.grow_page_table(pages_for(seq.num_tokens))
        return self.extend(seq)

    def extend(self, seq: Sequence) -> int:
        """Skip pages that others have entered since `seq` began, unless it has own pages, part filled.

        Requests that arrive together with one prompt prefix thus compute it about once. Returns the number
        of tokens skipped, which are added to num_computed and num_cached.
        """
        first = seq.num_tree_pages
        if seq.num_pages != first:
            return 0
        end = self._match(seq)
        if end <= first:
            return 0
        keys = seq.page_keys(end)[first:end]
        skipped = (end - first) * PAGE_TOKENS
        seq.grow_page_table(end)
        for path, tree in zip(seq.nodes, self._trees_of(seq), strict=True):
            nodes = [tree.nodes[key] for key in keys]
            for node in nodes:
                self._reference(node)
            path += nodes
            rows = slice(tree.segment.first_layer, tree.segment.end_layer)
            seq.page_table[rows, first:end] = np.stack([node.pages for node in nodes], axis=1)
            if seq.num_preemptions == 0:
                tree.hit_tokens += skipped
        if seq.num_preemptions:
            self.resumed_tokens += skipped
        seq.num_pages = end
        seq.num_computed += skipped
        seq.num_cached += skipped
        return skipped

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` own pages for tokens [0, num_tokens) in every layer, evicting as needed.

        Returns False, having changed nothing, when free and evictable pages together do not suffice.
        """
        end = pages_for(num_tokens)
        first = seq.num_pages
        if end <= first:
            return True
        count = (end - first) * seq.num_layers
        if count > self.pool.num_free and not self._evict_until_free(count):
            return False
        seq.grow_page_table(end)
        seq.page_table[:, first:end] = self.pool.allocate(count).reshape(end - first, seq.num_layers).T
        seq.num_pages = end
        return True

    def commit(self, seq: Sequence) -> None:
        """Enter every page that is now full of computed tokens into the tree.

        Where the node exists already (another sequence, maybe of another model with the same blocks below,
        computed it first), the sequence drops its own pages of that segment and points at the node's.
        """
        full = seq.num_computed // PAGE_TOKENS
        first = seq.num_tree_pages
        if full <= first or not self.prefix_caching:
            return
        keys = seq.page_keys(full)
        for nodes, tree in zip(seq.nodes, self._trees_of(seq), strict=True):
            rows = slice(tree.segment.first_layer, tree.segment.end_layer)
            for page in range(first, full):
                own = seq.page_table[rows, page]
                node = tree.nodes.get(keys[page])
                if node is None:
                    node = Node(tree, keys[page], nodes[page - 1] if page else None, own.copy())
                    tree.nodes[keys[page]] = node
                    self.num_cached_pages += node.pages.size
                else:
                    self._reference(node)
                    self.pool.free(own)
                    seq.page_table[rows, page] = node.pages
                    tree.deduped_tokens += PAGE_TOKENS
                nodes.append(node)
        self.version += 1

    def release(self, seq: Sequence) -> None:
        """Take all pages from `seq`: own ones become free, those of the tree stay there, evictable."""
        self.pool.free(seq.page_table[:, seq.num_tree_pages : seq.num_pages].ravel())
        # Last page first, top segment first: the order in which they should be evicted.
        for page in range(seq.num_tree_pages - 1, -1, -1):
            for nodes in reversed(seq.nodes):
                self._dereference(nodes[page])
        for nodes in seq.nodes:
            nodes.clear()
        seq.page_table[:, : seq.num_pages] = -1
        seq.num_pages = seq.num_computed = 0

    # ---- nodes

    def _trees_of(self, seq: Sequence) -> list[SegmentTree]:
        trees = self._trees
        return [trees.get(s) or trees.setdefault(s, SegmentTree(s)) for s in seq.segments]

    def _reference(self, node: Node) -> None:
        if node.refs == 0:
            del self._lru[node]
            self.num_evictable_pages -= node.pages.size
        node.refs += 1

    def _dereference(self, node: Node) -> None:
        node.refs -= 1
        if node.refs == 0:
            self._lru[node] = None
            self.num_evictable_pages += node.pages.size

    def _evict_until_free(self, count: int) -> bool:
        short = count - self.pool.num_free
        if short > self.num_evictable_pages:
            return False
        evicted: list[np.ndarray] = []
        while short > 0:
            node, _ = self._lru.popitem(last=False)
            del node.tree.nodes[node.key]
            evicted.append(node.pages)
            short -= node.pages.size
        pages = np.concatenate(evicted)
        self.pool.free(pages)
        self.num_cached_pages -= pages.size
        self.num_evictable_pages -= pages.size
        self.evictions += len(evicted)
        self.version += 1
        return True

    # ---- looking in from outside

    def stats(self) -> CacheStats:
        """A snapshot of counters and page counts."""
        hits: dict[str, int] = {}
        deduped: dict[str, int] = {}
        for tree in list(self._trees.values()):  # a copy: others may ask while the engine runs
            key = tree.segment.key
            hits[key] = hits.get(key, 0) + tree.hit_tokens
            deduped[key] = deduped.get(key, 0) + tree.deduped_tokens
        return CacheStats(
            pages_total=self.pool.num_pages,
            pages_free=self.pool.num_free,
            pages_cached=self.num_cached_pages,
            pages_evictable=self.num_evictable_pages,
            pages_owned=self.pool.num_pages - self.pool.num_free - self.num_cached_pages,
            lookups=self.lookups,
            resumed_tokens=self.resumed_tokens,
            evictions=self.evictions,
            hit_tokens=hits,
            deduped_tokens=deduped,
        )

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Check all invariants, given every sequence that may hold pages of this cache.

        Raises IntegrityError on the first that does not hold. Takes milliseconds: for idle times and tests.
        """
        sequences = list(sequences)
        nodes = [node for tree in self._trees.values() for node in tree.nodes.values()]
        self._check_partition(sequences, nodes)
        self._check_references(sequences, nodes)
        self._check_lru(nodes)

    def _check_partition(self, sequences: list[Sequence], nodes: list[Node]) -> None:
        owned = [seq.page_table[:, seq.num_tree_pages : seq.num_pages].ravel() for seq in sequences]
        cached = [node.pages for node in nodes]
        everyone = np.concatenate([self.pool.free_ids(), *cached, *owned])
        counts = np.bincount(everyone, minlength=self.pool.num_pages) if everyone.min() >= 0 else None
        if counts is None or counts.size != self.pool.num_pages or (counts != 1).any():
            wrong = everyone.tolist() if counts is None else np.flatnonzero(counts != 1).tolist()
            raise IntegrityError(f"free + cached + owned is not each page once; wrong pages: {wrong[:20]}")
        if sum(pages.size for pages in cached) != self.num_cached_pages:
            raise IntegrityError(f"{self.num_cached_pages} cached pages counted, not what the nodes hold")

    def _check_references(self, sequences: list[Sequence], nodes: list[Node]) -> None:
        refs = dict.fromkeys(nodes, 0)
        for seq in sequences:
            if not all(len(path) == seq.num_tree_pages for path in seq.nodes):
                raise IntegrityError(f"{seq} has paths of unequal length in its segments")
            if not seq.num_tree_pages <= seq.num_computed / PAGE_TOKENS <= seq.num_pages:
                raise IntegrityError(
                    f"{seq} has {seq.num_tree_pages} pages in the tree and {seq.num_pages} in all: it would "
                    "write into the tree or beside its pages"
                )
            for path, segment in zip(seq.nodes, seq.segments, strict=True):
                for page, node in enumerate(path):
                    rows = slice(segment.first_layer, segment.end_layer)
                    if node not in refs or node.parent is not (path[page - 1] if page else None):
                        raise IntegrityError(f"page {page} of {seq}, {segment} is not on a path of the tree")
                    if not np.array_equal(seq.page_table[rows, page], node.pages):
                        raise IntegrityError(f"page {page} of {seq}, {segment} is not that of its node")
                    refs[node] += 1
        if any(node.refs != count for node, count in refs.items()):
            raise IntegrityError("the nodes' reference counts are not those of the running sequences")

    def _check_lru(self, nodes: list[Node]) -> None:
        present = set(nodes)
        if any(node.parent is not None and node.parent not in present for node in nodes):
            raise IntegrityError("a node has outlived its parent")
        order = {node: place for place, node in enumerate(self._lru)}
        if set(order) != {node for node in nodes if node.refs == 0}:
            raise IntegrityError("the evictable nodes are not the unreferenced ones")
        if sum(node.pages.size for node in order) != self.num_evictable_pages:
            raise IntegrityError(
                f"{self.num_evictable_pages} evictable pages counted, not what the nodes hold"
            )
        for node, place in order.items():
            if node.parent is not None and order.get(node.parent, len(order)) <= place:
                raise IntegrityError("a node would be evicted before its child")
