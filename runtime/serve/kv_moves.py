"""As layers go to other workers: whose K and V goes with them, and whose is computed anew, by estimated cost.

Of a sequence that runs, its pages in these layers take bytes on the wire, and tokens that are not cached then
take their time in all layers. Pages that nobody uses go where that is cheap beside the chance that somebody
asks for them again, the last used first, until moving them holds up steps for too long. Page ids stay.

Only ints here, and the prefix tree's bookkeeping.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS, pages_for
from blockzoo.runtime.kv.nodes import Node
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.prefix_tree import PrefixTree
from blockzoo.runtime.kv.sequence import Segment, TokenSequence

ASKED_AGAIN = 0.25
"""Share of cached pages that somebody will ask for, taken."""
MOST_STILL_S = 1.0
"""For which steps may stand still for pages that nobody uses now."""


@dataclass(frozen=True, slots=True)
class LayerMoves:
    """Of one chain, the layers that go elsewhere.

    Attributes:
        segments: of the chain.
        layers: int64 [n], ascending.
        workers: int8 [n], where to.
        page_s: seconds that a page of each takes there, float64 [n].
        token_s: seconds that a token takes to be computed anew.
    """

    segments: tuple[Segment, ...]
    layers: np.ndarray
    workers: np.ndarray
    page_s: np.ndarray
    token_s: float

    def within(self, segment: Segment) -> np.ndarray:
        """Indices of those that are layers of a segment."""
        return np.flatnonzero((self.layers >= segment.first_layer) & (self.layers < segment.end_layer))


Pages = tuple[np.ndarray, np.ndarray]
"""Ids, int32 [n], and where each goes, int8 [n]."""


@dataclass(slots=True)
class KVMoves:
    """What becomes of the pages of layers that move.

    Attributes:
        nodes: those of the prefix tree that go along, parents first, and their pages in these layers, which
            are never written again.
        own: such pages of sequences.
        anew: sequences that are computed anew.
        dropped: nodes that do not go along. None of them is in use once `anew` have let go.
    """

    nodes: dict[Node, Pages] = field(default_factory=dict)
    own: list[Pages] = field(default_factory=list)
    anew: list[TokenSequence] = field(default_factory=list)
    dropped: list[Node] = field(default_factory=list)

    def all_pages(self) -> Pages:
        """Those that go along."""
        return joined([*self.nodes.values(), *self.own])

    def unsent(self, sent: Collection[Node]) -> Pages:
        """Those of them that some nodes do not have."""
        return joined([*(pages for node, pages in self.nodes.items() if node not in sent), *self.own])


def joined(parts: Sequence[Pages]) -> Pages:
    """Pages one after the other."""
    ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in parts)])
    return ids, np.concatenate([np.zeros(0, np.int8), *(workers for _, workers in parts)])


def choose_moves(
    tree: PrefixTree,
    sequences: Iterable[TokenSequence],
    moves: Mapping[int, LayerMoves],
    sent: Collection[Node] = (),
    published: Iterable[Node] = (),
) -> KVMoves:
    """What becomes of pages.

    Args:
        tree: of the family's cache.
        sequences: that hold pages of it.
        moves: by chain index, of all chains with layers that move.
        sent: nodes whose pages are there already.
        published: nodes that are, parents first: they go along, whatever that costs.
    """
    found = KVMoves()
    by_segment = {segment: own for own in moves.values() for segment in own.segments}
    for node in published:
        own = by_segment.get(node.tree.segment)
        which = np.zeros(0, np.int64) if own is None else own.within(node.tree.segment)
        if own is not None and which.size:
            found.nodes[node] = _pages_of(node, own, which)
    for seq in sorted(sequences, key=lambda seq: -seq.num_computed):
        moved = moves.get(seq.chain_index)
        if moved is not None and not _goes_along(seq, moved, found, sent):
            found.anew.append(seq)
    _choose_cached(tree, by_segment, found, sent)
    return found


def _goes_along(seq: TokenSequence, moves: LayerMoves, found: KVMoves, sent: Collection[Node]) -> bool:
    """Choose the pages of a sequence, unless it is cheaper to compute it anew from what is chosen so far."""
    if seq.copied_from:  # it is about to begin, with a part of a page, or with what it takes over
        return False
    if seq.approx is not None and seq.num_computed < seq.approx.reused.size:  # what is written has gaps
        return False
    fresh: dict[Node, Pages] = {}
    own: list[Pages] = []
    written = pages_for(seq.num_computed)
    seconds, cached = 0.0, seq.num_tree_pages
    for path, segment in zip(seq.nodes, seq.segments, strict=True):
        which = moves.within(segment)
        if not which.size:
            continue
        missing = [node for node in path if node not in found.nodes]
        cached = min(cached, next((i for i, n in enumerate(path) if n not in found.nodes), cached))
        fresh |= {node: _pages_of(node, moves, which) for node in missing}
        columns = seq.page_table[moves.layers[which], len(path) : written]
        own.append((columns.ravel(), np.repeat(moves.workers[which], columns.shape[1])))
        count = sum(node not in sent for node in missing) + columns.shape[1]
        seconds += float(moves.page_s[which].sum()) * count
    if seconds > moves.token_s * (seq.num_computed - cached * PAGE_TOKENS):
        return False
    found.nodes |= fresh
    found.own += own
    return True


def _pages_of(node: Node, moves: LayerMoves, which: np.ndarray) -> Pages:
    rows = moves.layers[which] - node.tree.segment.first_layer
    return node.pages[rows], moves.workers[which]


def _choose_cached(
    tree: PrefixTree, by_segment: Mapping[Segment, LayerMoves], found: KVMoves, sent: Collection[Node]
) -> None:
    """Choose of the nodes that nobody uses; note all that are left out, also of those in use."""
    left = MOST_STILL_S
    for node in tree.unreferenced():
        moves = by_segment.get(node.tree.segment)
        if moves is None or node in found.nodes:
            continue
        which = moves.within(node.tree.segment)
        seconds = 0.0 if node in sent else float(moves.page_s[which].sum())
        is_worth_it = seconds <= ASKED_AGAIN * PAGE_TOKENS * moves.token_s
        has_parent = node.parent is None or node.parent in found.nodes
        if which.size and is_worth_it and has_parent and seconds <= left:
            found.nodes[node] = _pages_of(node, moves, which)
            left -= seconds
    found.dropped = [
        node
        for part in tree.segments
        if part.segment in by_segment and by_segment[part.segment].within(part.segment).size
        for node in part.nodes.values()
        if node not in found.nodes
    ]


def forget(cache: KVCache, nodes: Sequence[Node]) -> int:
    """Drop nodes that hold nothing where their layers are now; how many pages that were."""
    return cache.tree.drop([node for node in nodes if node.refs == 0])
