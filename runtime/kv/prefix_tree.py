"""The pages that are kept under keys: nodes by segment, who uses them, which go first.

A node stands for 32 tokens (and, through its key, all tokens before them) in one segment of layers, and holds
one page id per layer of that segment. Chains that agree below a boundary name the same segments there, so
their sequences meet in the same nodes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from blockzoo.runtime.kv.integrity import check_lru, check_partition, check_references
from blockzoo.runtime.kv.nodes import Node, SegmentTree
from blockzoo.runtime.kv.pool import PagePool
from blockzoo.runtime.kv.sequence import Segment, TokenSequence

Parts = Mapping[Segment, Sequence[tuple[Segment, slice]]]
"""By segment, those that were before it whose layers it has, bottom up, and which of their layers; empty
where some layer is new."""
_MOST_MADE = 20_000  # unreferenced nodes that a change of segments takes over: it holds up a step


class PrefixTree:
    """Nodes over one pool.

    Args:
        pool: whose pages they hold.
        forget: told the keys of pages that no segment has any more.

    `_lru` holds the unreferenced ones, oldest use first, and each child before its parent. So its front is
    always a leaf: eviction needs no search and never cuts a path.

    Attributes:
        version: changes whenever nodes came or went.
        num_pages: held by nodes.
        num_evictable_pages: of these, by unreferenced ones.
        evictions: nodes evicted.
    """

    def __init__(self, pool: PagePool, forget: Callable[[Iterable[bytes]], None]) -> None:
        self.version = 0
        self.num_pages = self.num_evictable_pages = self.evictions = 0
        self._pool, self._forget = pool, forget
        # By the whole segment, not its key alone: a node's pages must fit the layers that ask for it.
        self._segments: dict[Segment, SegmentTree] = {}
        self._lru: OrderedDict[Node, None] = OrderedDict()
        self._gone_hits = Counter[str]()  # of segments that are no more, by their layers

    def find(self, segment: Segment) -> SegmentTree | None:
        """The nodes of a segment, where it has had any."""
        return self._segments.get(segment)

    @property
    def segments(self) -> list[SegmentTree]:
        """The nodes of all segments."""
        return list(self._segments.values())

    def of(self, seq: TokenSequence) -> list[SegmentTree]:
        """The nodes of each segment of a sequence."""
        segments = self._segments
        return [segments.get(s) or segments.setdefault(s, SegmentTree(s)) for s in seq.segments]

    def node(self, segment: Segment, key: bytes) -> Node:
        """A node that is there."""
        return self._segments[segment].nodes[key]

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
        evicted: list[Node] = []
        while short > 0:
            node, _ = self._lru.popitem(last=False)
            evicted.append(node)
            short -= node.pages.size
        self._remove(evicted)
        self.evictions += len(evicted)
        return True

    def drop(self, nodes: Iterable[Node]) -> int:
        """Free unreferenced nodes, with all behind them; how many pages that were."""
        going: dict[Node, None] = {}
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in going:
                going[node] = None
                waiting += node.tree.children.get(node.key, {}).values()
        for node in going:
            del self._lru[node]
        return self._remove(list(going)) if going else 0

    def unreferenced(self) -> list[Node]:
        """The nodes that nobody uses, the last used first, so each behind its parent."""
        return list(reversed(self._lru))

    def _remove(self, nodes: Sequence[Node]) -> int:
        """Free the pages of nodes that are out of the order of eviction already; how many."""
        for node in nodes:
            node.tree.remove(node)
        pages = np.concatenate([node.pages for node in nodes])
        self._pool.free(pages)
        self._forget_gone(nodes)
        self.num_pages -= pages.size
        self.num_evictable_pages -= pages.size
        self.version += 1
        return int(pages.size)

    def _forget_gone(self, nodes: Iterable[Node]) -> None:
        """Tell of the keys of nodes that are not in the tree any more, where no other node has them."""
        trees = list(self._segments.values())
        self._forget({n.key for n in nodes if not any(n.key in tree.nodes for tree in trees)})

    def reshape(self, parts: Parts) -> set[Segment]:
        """Have other segments, with the nodes that can be made of those that there are; the others go.

        Returns the segments whose nodes are new ones, without references: who had referenced what they are
        made of does so with them. In the others all is as it was.
        """
        place = {node: i for i, node in enumerate(self._lru)}
        old, self._segments = self._segments, {}
        made: set[Segment] = set()
        order = []  # (when it goes, the deeper and the upper first), node
        for segment, pieces in parts.items():
            sources = [(old[source], layers) for source, layers in pieces if source in old]
            if not sources or len(sources) < len(pieces):
                continue
            tree, layers = sources[0]
            if len(sources) == 1 and layers == slice(0, tree.num_layers):
                del old[tree.segment]
                tree.segment = segment
                order += [((place[n], 0, 0), n) for n in tree.nodes.values() if n.refs == 0]
            else:
                made.add(segment)
                tree = SegmentTree(segment)
                order += _make_nodes(tree, sources, place)
            self._segments[segment] = tree
        self._lru = OrderedDict((node, None) for _, node in sorted(order, key=lambda item: item[0]))
        self._free_what_is_not_in(made, old)
        return made

    def _free_what_is_not_in(self, made: set[Segment], old: Mapping[Segment, SegmentTree]) -> None:
        """Free the pages of the old segments that no node has taken over; count anew."""
        none = np.zeros(0, np.int32)
        nodes = [node for tree in old.values() for node in tree.nodes.values()]
        before = [node.pages for node in nodes]
        taken = [node.pages for segment in made for node in self._segments[segment].nodes.values()]
        self._pool.free(np.setdiff1d(np.concatenate([none, *before]), np.concatenate([none, *taken])))
        self.num_pages = sum(n.pages.size for tree in self._segments.values() for n in tree.nodes.values())
        self.num_evictable_pages = sum(node.pages.size for node in self._lru)
        self._forget_gone(nodes)
        for tree in old.values():
            self._gone_hits[tree.layers] += tree.hit_tokens
        self.version += 1

    def gains(self) -> tuple[dict[str, int], dict[str, int]]:
        """By the key of each segment that there is: tokens whose KV was found; tokens computed twice, whose
        second KV was dropped."""
        hits: dict[str, int] = {}
        deduped: dict[str, int] = {}
        for tree in list(self._segments.values()):  # a copy: others may ask while the engine runs
            key = tree.segment.key
            hits[key] = hits.get(key, 0) + tree.hit_tokens
            deduped[key] = deduped.get(key, 0) + tree.deduped_tokens
        return hits, deduped

    def hits_by_layers(self) -> dict[str, int]:
        """By the layers of segments: tokens whose KV was found; it only grows, whichever there are."""
        hits = self._gone_hits.copy()
        for tree in list(self._segments.values()):
            hits[tree.layers] += tree.hit_tokens
        return dict(hits)

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


def _make_nodes(
    tree: SegmentTree, sources: Sequence[tuple[SegmentTree, slice]], place: Mapping[Node, int]
) -> list[tuple[tuple[int, int, int], Node]]:
    """Fill a tree with nodes of the given layers of others: those that all of these have.

    Returns them with what tells when they go (`place`: of the unreferenced nodes): with the first of their
    parts, the deeper and the upper first. So each goes before its parent, as its parts did.
    """
    in_use, oldest = len(place), len(place) - _MOST_MADE
    depth: dict[Node, int] = {}
    order = []
    top, _ = sources[-1]
    for key, node in top.nodes.items():  # parents have come before their children
        pieces = [source.nodes.get(key) for source, _ in sources]
        found = [piece for piece in pieces if piece is not None]
        when = min(place.get(piece, in_use) for piece in found)
        if len(found) < len(pieces) or when < oldest:
            continue
        parent = None if node.parent is None else tree.nodes[node.parent.key]
        pages = np.concatenate([n.pages[layers] for n, (_, layers) in zip(found, sources, strict=True)])
        new = Node(tree, key, parent, node.parent_key, pages, node.token_ids)
        new.refs = 0
        tree.add(new)
        depth[new] = 0 if parent is None else depth[parent] + 1
        order.append(((when, -depth[new], -tree.segment.first_layer), new))
    return order
