"""Checks that the bookkeeping of pages does not contradict itself; each raises IntegrityError."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.kv.nodes import Node
from blockzoo.runtime.kv.pool import IntegrityError, PagePool
from blockzoo.runtime.kv.sequence import TokenSequence


def check_partition(
    pool: PagePool, sequences: Sequence[TokenSequence], nodes: Sequence[Node], num_cached: int
) -> None:
    """Check that free + cached + owned pages are each page of the pool once, and so many as it has."""
    owned = [seq.own_pages() for seq in sequences]
    cached = [node.pages for node in nodes]
    everyone = np.concatenate([pool.free_ids(), pool.unused_ids(), *cached, *owned])
    counts = np.bincount(everyone, minlength=pool.capacity) if everyone.min() >= 0 else None
    if counts is None or counts.size != pool.capacity or (counts != 1).any():
        wrong = everyone.tolist() if counts is None else np.flatnonzero(counts != 1).tolist()
        raise IntegrityError(f"free + cached + owned is not each page once; wrong pages: {wrong[:20]}")
    if pool.unused_ids().size != pool.capacity - pool.num_pages:
        raise IntegrityError(f"{pool.unused_ids().size} pages are out of use of {pool.capacity}")
    if sum(pages.size for pages in cached) != num_cached:
        raise IntegrityError(f"{num_cached} cached pages counted, not what the nodes hold")


def check_references(sequences: Sequence[TokenSequence], nodes: Sequence[Node], pins: Sequence[Node]) -> None:
    """Check that sequences are on paths of the tree, write nowhere else, and are counted, as are `pins`."""
    refs = dict.fromkeys(nodes, 0)
    for node in pins:
        if node not in refs:
            raise IntegrityError("a published page has left the tree")
        refs[node] += 1
    for seq in sequences:
        _check_levels(seq)
        for path, segment in zip(seq.nodes, seq.segments, strict=True):
            for page, node in enumerate(path):
                rows = slice(segment.first_layer, segment.end_layer)
                if node not in refs or node.parent is not (path[page - 1] if page else None):
                    raise IntegrityError(f"page {page} of {seq}, {segment} is not on a path of the tree")
                if not np.array_equal(seq.page_table[rows, page], node.pages):
                    raise IntegrityError(f"page {page} of {seq}, {segment} is not that of its node")
                refs[node] += 1
        for node in seq.copied_from:
            refs[node] += 1
    if any(node.refs != count for node, count in refs.items()):
        raise IntegrityError("the nodes' reference counts are not those of sequences and publications")


def _check_levels(seq: TokenSequence) -> None:
    lengths = [len(path) for path in seq.nodes]
    if lengths != sorted(lengths, reverse=True):
        raise IntegrityError(f"{seq} has a longer path in an upper segment than in a lower one: {lengths}")
    pages_computed = seq.num_computed / PAGE_TOKENS
    if not seq.num_tree_pages <= pages_computed <= seq.num_pages + bool(seq.copied_from):
        raise IntegrityError(
            f"{seq} has {seq.num_tree_pages} pages in the tree and {seq.num_pages} in all: it would "
            "write into the tree or beside its pages"
        )
    late = set(range(int(pages_computed), lengths[0]))
    if not late <= set(seq.entering):
        raise IntegrityError(f"{seq} lacks the hidden states of pages {sorted(late - set(seq.entering))}")


def check_lru(nodes: Sequence[Node], evictable: Sequence[Node], num_evictable_pages: int) -> None:
    """Check that `evictable`, the next to go first, are the unreferenced nodes, children before parents."""
    present = set(nodes)
    if any(node.parent is not None and node.parent not in present for node in nodes):
        raise IntegrityError("a node has outlived its parent")
    order = {node: place for place, node in enumerate(evictable)}
    if set(order) != {node for node in nodes if node.refs == 0}:
        raise IntegrityError("the evictable nodes are not the unreferenced ones")
    if sum(node.pages.size for node in order) != num_evictable_pages:
        raise IntegrityError(f"{num_evictable_pages} evictable pages counted, not what the nodes hold")
    for node, place in order.items():
        if node.parent is not None and order.get(node.parent, len(order)) <= place:
            raise IntegrityError("a node would be evicted before its child")
