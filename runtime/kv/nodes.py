"""The nodes of the prefix tree: 32 tokens in one segment of layers, and where their KV lies."""

from __future__ import annotations

import numpy as np

from blockzoo.runtime.kv.sequence import Segment


class Node:
    """32 tokens in one segment: `pages` int32 [layers of the segment]; `refs` sequences use it now."""

    __slots__ = ("key", "pages", "parent", "parent_key", "refs", "token_ids", "tree")

    def __init__(
        self,
        tree: SegmentTree,
        key: bytes,
        parent: Node | None,
        parent_key: bytes,
        pages: np.ndarray,
        token_ids: np.ndarray,
    ) -> None:
        self.tree = tree
        self.key = key
        self.parent = parent  # the 32 tokens before, in the same segment
        self.parent_key = parent_key  # of all tokens before: the parent's key, or the scope's
        self.pages = pages
        self.token_ids = token_ids  # int32 [32]
        self.refs = 1


class SegmentTree:
    """The nodes of one segment by page key, and what it gained."""

    __slots__ = ("children", "deduped_tokens", "hit_tokens", "nodes", "num_layers", "rows", "segment")

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.rows = slice(segment.first_layer, segment.end_layer)  # of a page table
        self.num_layers = segment.end_layer - segment.first_layer
        self.nodes: dict[bytes, Node] = {}
        self.children: dict[bytes, dict[bytes, Node]] = {}  # by the key before them, the newest last
        self.hit_tokens = 0
        self.deduped_tokens = 0

    @property
    def layers(self) -> str:
        """ "0-9": layers 0 to 9."""
        return f"{self.segment.first_layer}-{self.segment.end_layer - 1}"

    def add(self, node: Node) -> None:
        """Enter a node."""
        self.nodes[node.key] = node
        self.children.setdefault(node.parent_key, {})[node.key] = node

    def remove(self, node: Node) -> None:
        """Take a node out."""
        del self.nodes[node.key]
        siblings = self.children[node.parent_key]
        del siblings[node.key]
        if not siblings:
            del self.children[node.parent_key]
