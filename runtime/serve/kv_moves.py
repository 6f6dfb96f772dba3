"""As layers go to other workers: whose K and V goes with them, and whose is computed anew, by estimated cost.

Of a sequence that runs, its pages in these layers take bytes on the wire, and tokens that are not cached then
take their time in all layers. Pages that nobody uses go where that is cheap beside the chance that somebody
asks for them again, the last used first, until moving them holds up steps for too long. Page ids stay.

Only ints here, and the prefix tree's bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(slots=True)
class KVMoves:
    """What becomes of the pages of layers that move.

    Attributes:
        pages, workers: int32 and int8 [n]: pages that go with them, and where to.
        anew: sequences that are computed anew.
        dropped: cached nodes that are forgotten; more of them hold no reference once `anew` have let go.
        seconds: that moving is thought to take.
    """

    pages: np.ndarray
    workers: np.ndarray
    anew: list[TokenSequence]
    dropped: list[Node]
    seconds: float


@dataclass(slots=True)
class _Chosen:
    """What goes along, as it is chosen."""

    nodes: set[Node] = field(default_factory=set)
    pages: list[np.ndarray] = field(default_factory=list)
    workers: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, pages: np.ndarray, moves: LayerMoves, which: np.ndarray) -> None:
        """Pages [n, columns] of the layers `which`."""
        self.pages.append(pages.ravel())
        self.workers.append(np.repeat(moves.workers[which], pages.shape[1]))
        self.seconds += float(moves.page_s[which].sum()) * pages.shape[1]


def choose_moves(
    tree: PrefixTree,
    sequences: Iterable[TokenSequence],
    moves: Mapping[int, LayerMoves],
) -> KVMoves:
    """What becomes of pages.

    Args:
        tree: of the family's cache.
        sequences: that hold pages of it.
        moves: by chain index, of all chains with layers that move.
    """
    chosen, anew = _Chosen(), []
    for seq in sorted(sequences, key=lambda seq: -seq.num_computed):
        own = moves.get(seq.chain_index)
        if own is not None and not _goes_along(seq, own, chosen):
            anew.append(seq)
    by_segment = {segment: own for own in moves.values() for segment in own.segments}
    dropped = _choose_cached(tree, by_segment, chosen)
    none = np.zeros(0, np.int32)
    pages = np.concatenate([none, *chosen.pages])
    workers = np.concatenate([none, *chosen.workers]).astype(np.int8)
    return KVMoves(pages, workers, anew, dropped, chosen.seconds)


def _goes_along(seq: TokenSequence, moves: LayerMoves, chosen: _Chosen) -> bool:
    """Choose the pages of a sequence, unless it is cheaper to compute it anew from what is chosen so far."""
    if seq.copied_from:  # it is about to begin, with a part of a page
        return False
    fresh: list[tuple[Node, np.ndarray]] = []  # with the layers of it that move
    own: list[tuple[np.ndarray, np.ndarray]] = []
    written = pages_for(seq.num_computed)
    seconds, cached = 0.0, seq.num_tree_pages
    for path, segment in zip(seq.nodes, seq.segments, strict=True):
        which = moves.within(segment)
        if not which.size:
            continue
        missing = [node for node in path if node not in chosen.nodes]
        cached = min(cached, next((i for i, n in enumerate(path) if n not in chosen.nodes), cached))
        columns = seq.page_table[moves.layers[which], len(path) : written]
        own.append((columns, which))
        fresh += [(node, which) for node in missing]
        seconds += float(moves.page_s[which].sum()) * (len(missing) + columns.shape[1])
    if seconds > moves.token_s * (seq.num_computed - cached * PAGE_TOKENS):
        return False
    for node, which in fresh:
        _add_node(node, moves, which, chosen)
    for columns, which in own:
        chosen.add(columns, moves, which)
    return True


def _add_node(node: Node, moves: LayerMoves, which: np.ndarray, chosen: _Chosen) -> None:
    chosen.nodes.add(node)
    rows = moves.layers[which] - node.tree.segment.first_layer
    chosen.add(node.pages[rows][:, None], moves, which)


def _choose_cached(tree: PrefixTree, by_segment: Mapping[Segment, LayerMoves], chosen: _Chosen) -> list[Node]:
    """Choose of the nodes that nobody uses; all that are left out, also of those in use."""
    limit = chosen.seconds + MOST_STILL_S
    for node in tree.unreferenced():
        moves = by_segment.get(node.tree.segment)
        if moves is None or node in chosen.nodes:
            continue
        which = moves.within(node.tree.segment)
        seconds = float(moves.page_s[which].sum())
        is_worth_it = seconds <= ASKED_AGAIN * PAGE_TOKENS * moves.token_s
        has_parent = node.parent is None or node.parent in chosen.nodes
        if which.size and is_worth_it and has_parent and chosen.seconds + seconds <= limit:
            _add_node(node, moves, which, chosen)
    return [
        node
        for part in tree.segments
        if part.segment in by_segment and by_segment[part.segment].within(part.segment).size
        for node in part.nodes.values()
        if node not in chosen.nodes
    ]


def forget(cache: KVCache, nodes: Sequence[Node]) -> int:
    """Drop nodes that hold nothing where their layers are now; how many pages that were."""
    return cache.tree.drop([node for node in nodes if node.refs == 0])
