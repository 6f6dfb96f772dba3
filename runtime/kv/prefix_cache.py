"""Paged KV bookkeeping with an exact prefix cache, for one KV geometry.

    page_table of a sequence            columns: pages of 32 tokens
                        0    1    2    3    4
      layers 0..19    [ n    n    n    n  | o ]     n: pages of tree nodes, shared, never written again
      layers 20..23   [ n    n    n  | o    o ]     o: the sequence's own pages, being filled

Here the tokens of page 3 have been computed by another model that shares layers 0..19, and the hidden states
that leave layer 19 are at hand (`BoundaryCache`): only layers 20..23 are computed for them.

It knows page ids, token counts and keys; no tensor, no engine.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS, pages_for
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.approx.state import Borrowed
from blockzoo.runtime.kv.boundary import BoundaryCache
from blockzoo.runtime.kv.cache_stats import CacheStats
from blockzoo.runtime.kv.nodes import Node
from blockzoo.runtime.kv.pool import PagePool
from blockzoo.runtime.kv.prefix_tree import Parts, PrefixTree
from blockzoo.runtime.kv.published_pages import Publication, PublishedPages, nodes_of
from blockzoo.runtime.kv.reuse_plan import ReusePlanner
from blockzoo.runtime.kv.sequence import Chain, Segment, TokenSequence

MIN_COPIED_TOKENS = 4  # fewer are recomputed rather than copied: they ride along in the same batch
_MAX_CANDIDATES = 64  # pages looked at for one that begins alike


def path_lengths(seq: TokenSequence, segments: Chain, parts: Parts) -> list[int] | None:
    """Pages that a sequence will have in the tree in each of other segments (`KVCache.reshape`).

    None where it cannot go over to them with its pages: it is about to copy some, or to enter late, or has
    those of one of the segments partly in the tree.
    """
    held = {segment: len(path) for segment, path in zip(seq.segments, seq.nodes, strict=True)}
    if seq.copied_from or len(seq.nodes[0]) > max(seq.num_tree_pages, seq.num_computed // PAGE_TOKENS):
        return None
    lengths = [{held[source] for source, _ in parts[segment]} for segment in segments]
    return [length.pop() for length in lengths] if all(len(length) == 1 for length in lengths) else None


class KVCache:
    """Pages of one KV geometry: who owns them, which are cached, which may be evicted.

    Invariants (check_integrity):
    - A page is free, in the tree, or owned by one sequence.
    - A sequence that references the node of page i in a segment references those of pages < i there, and
      those of pages <= i in all segments below.

    Args:
        num_pages: of the pool.
        capacity: pages that it may grow to (`resize`); None: num_pages.
        prefix_caching: False keeps nothing of a sequence that has gone.
        boundaries: where hidden states are kept with which prefills of other models start late.
        reuse: how sequences that ask for it reuse KV approximately; None: not at all.
    """

    def __init__(
        self,
        num_pages: int,
        prefix_caching: bool = True,
        boundaries: BoundaryCache | None = None,
        reuse: ReuseConfig | None = None,
        capacity: int | None = None,
    ) -> None:
        self.pool = PagePool(num_pages, capacity)
        self.prefix_caching = prefix_caching
        self.boundaries = BoundaryCache(0) if boundaries is None else boundaries
        self.planner = None if reuse is None else ReusePlanner(reuse)
        self.published = PublishedPages()
        self.tree = PrefixTree(self.pool, self.boundaries.forget)
        self.lookups = 0
        self.resumed_tokens = 0
        self.copied_pages = 0
        self.approximate_tokens = 0
        self.approximate_pages = 0
        self.approximate_guarded = 0
        self.approximate_guard_fallbacks = 0

    @property
    def version(self) -> int:
        """Changes whenever a probe's result may have changed."""
        return self.tree.version

    # ---- lookups

    def probe(self, seq: TokenSequence) -> int:
        """Tokens whose work `seq` would save if it began now; with some layers only, their share of it.

        Changes nothing.
        """
        layers = [s.end_layer - s.first_layer for s in seq.segments]
        saved = sum(pages * n for pages, n in zip(self._match(seq), layers, strict=True))
        return saved * PAGE_TOKENS // seq.num_layers

    def _match(self, seq: TokenSequence) -> list[int]:
        """Per segment, the leading pages that `seq` need not compute there; at least what it holds already.

        What is cached in all segments is skipped (but for one token, whose logits are needed). What is
        cached in the lower ones alone is of use where the hidden states that leave them are at hand.
        """
        ends = [len(path) for path in seq.nodes]
        if not self._reuses(seq):
            return ends
        if seq.num_pages == 0:
            self.published.mark(seq)
        cached = []  # per segment: leading pages in the tree there and in all segments below
        limit = seq.num_tokens // PAGE_TOKENS
        # No node outlives its parent, so presence is monotonic in the page index and bisection is exact.
        for segment in seq.segments:
            tree = self.tree.find(segment)
            if tree is None or limit == 0:
                limit = 0
            else:
                nodes = tree.nodes
                limit = bisect_left(seq.page_keys(limit), True, 0, limit, key=lambda key: key not in nodes)
            cached.append(limit)
        ends[-1] = max(ends[-1], min(cached[-1], (seq.num_tokens - 1) // PAGE_TOKENS))
        for upper in range(len(ends) - 1, 0, -1):
            boundary, page = seq.segments[upper].boundary, max(ends[upper], ends[upper - 1])
            if boundary:
                keys = seq.page_keys(cached[upper - 1])
                while page < cached[upper - 1] and self.boundaries.has(boundary, keys[page]):
                    page += 1
            ends[upper - 1] = page
        return ends

    def can_begin(self, seq: TokenSequence, spare_pages: int = 0) -> bool:
        """Whether pages for all tokens of a new `seq` can be had now, with `spare_pages` left besides."""
        pinned = 0  # evictable now, but not once the sequence uses them
        need = spare_pages + pages_for(seq.num_tokens) * seq.num_layers
        for tree, end in zip(self.tree.of(seq), self._match(seq), strict=True):
            need -= end * tree.num_layers
            for key in seq.page_keys(end)[:end]:
                node = tree.nodes[key]
                pinned += node.pages.size if node.refs == 0 else 0
        return need <= self.pool.num_free + self.tree.num_evictable_pages - pinned

    def can_ever_hold(self, seq: TokenSequence) -> bool:
        """Whether all tokens of `seq` would fit if it had all pages to itself."""
        return pages_for(seq.num_tokens) * seq.num_layers <= self.pool.num_pages

    # ---- a sequence's life: begin, [borrow or copy_partial,] ([extend,] reserve, commit)*, release

    def begin(self, seq: TokenSequence) -> int:
        """Give `seq` the cached pages of its tokens. Returns and sets num_computed = num_cached."""
        assert seq.num_pages == 0, f"{seq} has begun already"
        self.lookups += 1
        seq.num_cached = 0
        seq.grow_page_table(pages_for(seq.num_tokens))
        return self.extend(seq)

    def extend(self, seq: TokenSequence) -> int:
        """Skip pages that others have entered since `seq` began, unless it has own pages, part filled.

        Requests that arrive together with one prompt prefix thus compute it about once. Returns the number
        of tokens skipped in all layers, which are added to num_computed and num_cached.
        """
        first = seq.num_tree_pages
        if seq.num_pages != first:
            return 0
        ends = self._match(seq)
        seq.grow_page_table(ends[0])
        for path, tree, end in zip(seq.nodes, self.tree.of(seq), ends, strict=True):
            held = len(path)
            if end == held:
                continue
            nodes = [tree.nodes[key] for key in seq.page_keys(end)[held:end]]
            for node in nodes:
                self.tree.reference(node)
            path += nodes
            seq.page_table[tree.rows, held:end] = np.stack([node.pages for node in nodes], axis=1)
            if seq.num_preemptions == 0:
                tree.hit_tokens += (end - held) * PAGE_TOKENS
        self._take_hidden(seq, ends)
        skipped = (ends[-1] - first) * PAGE_TOKENS
        if seq.num_preemptions:
            self.resumed_tokens += skipped
        else:
            public = min(ends[-1], seq.num_public_pages) - min(first, seq.num_public_pages)
            self.published.hit_tokens += public * PAGE_TOKENS
        seq.num_pages = ends[-1]
        seq.num_computed += skipped
        seq.num_cached += skipped
        return skipped

    def _take_hidden(self, seq: TokenSequence, ends: list[int]) -> None:
        """Take the hidden states of the pages that enter at a boundary, before they may be evicted."""
        before, seq.entering = seq.entering, {}
        for upper in range(len(ends) - 1, 0, -1):
            boundary = seq.segments[upper].boundary
            for page in range(ends[upper], ends[upper - 1]):
                rows = self.boundaries.get(boundary, seq.page_keys(page + 1)[page])
                # Not there any more: held since an earlier match, and paths only grow, so at this boundary.
                seq.entering[page] = before[page] if rows is None else rows

    def copy_partial(self, seq: TokenSequence, spare_pages: int = 0) -> int:
        """Let `seq`, which has just begun, copy the page whose tokens begin like its next ones.

        Returns the tokens spared, added to num_computed and num_cached; the caller has the pages copied
        (take_copies) before anything else is computed or released. `spare_pages` as in can_begin.
        """
        first = seq.num_tree_pages
        if not self._reuses(seq) or seq.num_pages != first or len(seq.nodes[0]) > first:
            return 0
        start = first * PAGE_TOKENS
        wanted = seq.token_ids[start : min(start + PAGE_TOKENS, seq.num_tokens - 1)]
        if wanted.size < MIN_COPIED_TOKENS:
            return 0
        count, donors = self._begin_alike(seq, first, wanted)
        pinned = sum(node.pages.size for node in donors if node.refs == 0)
        need = spare_pages + (pages_for(seq.num_tokens) - first) * seq.num_layers
        if not donors or need > self.pool.num_free + self.tree.num_evictable_pages - pinned:
            return 0
        for node, segment in zip(donors, seq.segments, strict=True):
            self.tree.reference(node)
            self.boundaries.begin_page(seq, segment.boundary, node.key, start + count)
        seq.copied_from = donors
        seq.num_computed += count
        seq.num_cached += count
        self.copied_pages += 1
        return count

    def _begin_alike(self, seq: TokenSequence, page: int, wanted: np.ndarray) -> tuple[int, list[Node]]:
        """The page in place of `page` whose tokens agree with `wanted` the longest: how many, its nodes."""
        *lower, top = self.tree.of(seq)
        best, donors = MIN_COPIED_TOKENS - 1, []
        public = seq.public_parent_key(page)
        for key, child in chain.from_iterable(
            islice(reversed(top.children.get(parent, {}).items()), _MAX_CANDIDATES)
            for parent in dict.fromkeys((seq.parent_key(page), public))
            if parent is not None
        ):
            if child.parent_key == public and not self.published.has(seq.segments, key):
                continue  # not yet, or no more
            differs = child.token_ids[: wanted.size] != wanted
            count = int(differs.argmax()) if differs.any() else wanted.size
            if count > best and all(key in tree.nodes for tree in lower):
                best, donors = count, [*(tree.nodes[key] for tree in lower), child]
        return best, donors

    def borrow(self, seq: TokenSequence, spare_pages: int = 0) -> int:
        """Let `seq`, which has just begun and asks for approximate reuse, take over KV of equal words.

        All its pages are reserved. Returns the tokens taken over; the caller has their KV copied
        (take_borrowed) before anything else is computed or released. `spare_pages` as in can_begin.
        """
        if self.planner is None or seq.reuse != "approx" or not self._reuses(seq):
            return 0
        plan = self.planner.plan(seq, self.tree.of(seq))
        if plan is None:
            return 0
        pinned = sum(node.pages.size for node in plan.nodes if node.refs == 0)
        need = spare_pages + self.missing_pages(seq, seq.num_tokens)
        if need > self.pool.num_free + self.tree.num_evictable_pages - pinned:
            return 0
        for node in plan.nodes:
            self.tree.reference(node)
        seq.copied_from = list(plan.nodes)
        reserved = self.reserve(seq, seq.num_tokens)
        assert reserved, f"{seq} lacks pages that were counted"
        seq.approx = plan.approx
        seq.num_computed = seq.end_after(0)
        count = plan.num_borrowed
        self.approximate_tokens += count
        self.approximate_pages += count // PAGE_TOKENS
        return count

    def take_borrowed(self, seq: TokenSequence) -> Borrowed | None:
        """The KV to copy before the next tokens of `seq` run."""
        if seq.approx is None or seq.approx.borrowed is None:
            return None
        borrowed, seq.approx.borrowed = seq.approx.borrowed, None
        self._drop_copies(seq)
        return borrowed

    def guard(self, seq: TokenSequence, margin: float) -> bool:
        """Whether `seq` is too unsure of its next token (`ReuseConfig.guard`), so that nothing that was taken
        over counts any more: it goes on as an exact sequence, from the first page that has some of it."""
        assert seq.approx is not None, f"{seq} has taken nothing over"
        stale = np.flatnonzero(seq.approx.reused)
        seq.approx.is_guarded = False
        self.approximate_guarded += 1
        if margin >= seq.approx.config.guard or not stale.size:  # what is no number is unsure
            return False
        self.approximate_guard_fallbacks += 1
        seq.num_computed = int(stale[0]) // PAGE_TOKENS * PAGE_TOKENS
        seq.approx, seq.reuse = None, "exact"
        return True

    def take_copies(self, seq: TokenSequence) -> tuple[np.ndarray, np.ndarray] | None:
        """Pages (from, to), each int32 [num_layers], to copy before the next tokens of `seq` run."""
        if not seq.copied_from or seq.approx is not None:
            return None
        source = np.concatenate([node.pages for node in seq.copied_from])
        self._drop_copies(seq)
        return source, seq.page_table[:, seq.num_tree_pages].copy()

    def _drop_copies(self, seq: TokenSequence) -> None:
        for node in reversed(seq.copied_from):
            self.tree.dereference(node)
        seq.copied_from = []

    def missing_pages(self, seq: TokenSequence, num_tokens: int) -> int:
        """Pages that `seq` lacks for its first `num_tokens` tokens."""
        end, first = pages_for(num_tokens), seq.num_pages
        return sum(
            max(0, end - max(first, len(path))) * (segment.end_layer - segment.first_layer)
            for path, segment in zip(seq.nodes, seq.segments, strict=True)
        )

    def reserve(self, seq: TokenSequence, num_tokens: int) -> bool:
        """Give `seq` own pages for tokens [0, num_tokens) in every layer, evicting as needed.

        Returns False, having changed nothing, when free and evictable pages together do not suffice.
        """
        end = pages_for(num_tokens)
        first = seq.num_pages
        if end <= first:
            return True
        count = self.missing_pages(seq, num_tokens)
        if not self.tree.evict_until_free(count):
            return False
        seq.grow_page_table(end)
        columns = seq.page_table[:, first:end].T
        columns[columns < 0] = self.pool.allocate(count)  # others are the tree's
        seq.num_pages = end
        return True

    def give_back(self, seq: TokenSequence) -> None:
        """Take the pages behind the tokens of `seq`, which were reserved for drafted ones."""
        end = pages_for(seq.num_tokens)
        if end >= seq.num_pages:
            return
        assert len(seq.nodes[0]) <= end, f"{seq} has pages of the tree behind its tokens"
        columns = seq.page_table[:, end : seq.num_pages]
        self.pool.free(columns.ravel())
        columns[...] = -1
        seq.num_pages = end

    def commit(self, seq: TokenSequence) -> None:
        """Enter every page that is now full of computed tokens into the tree.

        Where the node exists already (another sequence, maybe of another model with the same blocks below,
        computed it first), the sequence drops its own pages of that segment and points at the node's.
        """
        full = seq.num_computed // PAGE_TOKENS
        if full <= seq.num_tree_pages or not self._reuses(seq) or seq.approx is not None:
            return  # what is computed from approximate KV is approximate
        first, keys, trees = seq.num_tree_pages, seq.page_keys(full), self.tree.of(seq)
        public = keys[first : min(full, seq.num_public_pages)]
        if any(key not in tree.nodes for tree in trees for key in public):
            return  # withdrawn and evicted meanwhile: only a sequence that publishes makes public pages
        for nodes, tree in zip(seq.nodes, trees, strict=True):
            for page in range(len(nodes), full):
                own = seq.page_table[tree.rows, page]
                node = tree.nodes.get(keys[page])
                if node is None:
                    tokens = seq.token_ids[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS].copy()
                    parent = nodes[page - 1] if page else None
                    node = Node(tree, keys[page], parent, seq.parent_key(page), own.copy(), tokens)
                    self.tree.add(node)
                else:
                    self.tree.reference(node)
                    self.pool.free(own)
                    seq.page_table[tree.rows, page] = node.pages
                    tree.deduped_tokens += PAGE_TOKENS
                nodes.append(node)
        for page in [page for page in seq.entering if page < full]:
            del seq.entering[page]
        if self.planner is not None and first < seq.num_prompt_pages <= full:
            self.planner.remember(seq)
        self.tree.version += 1

    def pages_to_publish(self, seq: TokenSequence) -> int:
        """Pages that publishing `seq`, a sequence of full pages, would add to those published."""
        return self.published.missing_pages(seq, self.tree.of(seq))

    def publish(self, seq: TokenSequence, num_tokens: int, lead: int) -> Publication:
        """Keep the pages of `seq`, which publishes and is computed, for every scope until `withdraw`.

        Of its tokens num_tokens are the document's, and the first `lead` of these begin any prompt.
        """
        assert seq.publishes, f"{seq} belongs to a scope"
        assert all(len(path) == seq.num_pages for path in seq.nodes), f"{seq} is not all in the tree"
        nodes = nodes_of(seq.nodes)
        for node in nodes:
            self.tree.reference(node)
        tokens = seq.token_ids[:num_tokens].copy()
        publication = Publication(seq.segments, tokens, lead, tuple(seq.page_keys(seq.num_pages)), nodes)
        self.published.add(publication)
        if self.planner is not None:
            self.planner.published.add(publication)
        self.tree.version += 1
        return publication

    def withdraw(self, publication: Publication) -> None:
        """Let pages that were published be evicted; no sequence that begins from now on finds them."""
        if self.planner is not None:
            self.planner.published.remove(publication)
        self.published.remove(publication)
        for node in reversed(publication.nodes):
            self.tree.dereference(node)
        self.tree.version += 1

    def reshape(
        self, parts: Parts, chains: Mapping[Chain, Chain], sequences: Iterable[TokenSequence]
    ) -> None:
        """Go over to other segments, with all KV in the tree that they have.

        Args:
            parts: by segment, those of now that it consists of.
            chains: by the segments of a chain of now, its new ones. No sequence and no published document is
                of a chain that is not among them.
            sequences: all that use this cache; each keeps its segments, or can go over to others
                (`path_lengths`).
        """
        lengths = {
            seq: found
            for seq in sequences
            if chains[seq.segments] != seq.segments
            and (found := path_lengths(seq, chains[seq.segments], parts)) is not None
        }
        made = self.tree.reshape(parts)

        def path(segment: Segment, keys: Sequence[bytes]) -> list[Node]:
            nodes = [self.tree.node(segment, key) for key in keys]
            if segment in made:  # others are the nodes that they were, references and all
                for node in nodes:
                    self.tree.reference(node)
            return nodes

        for seq, counts in lengths.items():
            segments, keys = chains[seq.segments], seq.page_keys(max(counts))
            nodes = [path(segment, keys[:n]) for segment, n in zip(segments, counts, strict=True)]
            seq.take_segments(segments, nodes)
        self.published.reshape(chains, path)
        if self.planner is not None:
            self.planner.reshape(chains)

    def resize(self, num_pages: int) -> np.ndarray:
        """Have the pool as near to `num_pages` as what sequences and published documents hold lets it: evicts
        what it must. Returns the ids of the pages that went, int32 [n]."""
        spare = self.pool.num_free + self.tree.num_evictable_pages
        num_pages = max(num_pages, self.pool.num_pages - spare, 1)
        self.tree.evict_until_free(max(0, self.pool.num_pages - num_pages))
        return self.pool.resize(num_pages)

    def forget_all(self) -> None:
        """Cache nothing any more: what pages hold is gone. No sequence has some, and nothing is published."""
        self.tree.evict_until_free(self.pool.num_free + self.tree.num_evictable_pages)

    def release(self, seq: TokenSequence) -> None:
        """Take all pages from `seq`: own ones become free, those of the tree stay there, evictable."""
        self.pool.free(seq.own_pages())
        self._drop_copies(seq)
        self.boundaries.touch(seq)
        # Last page first, top segment first: the order in which they should be evicted.
        for page in range(len(seq.nodes[0]) - 1, -1, -1):
            for nodes in reversed(seq.nodes):
                if page < len(nodes):
                    self.tree.dereference(nodes[page])
        for nodes in seq.nodes:
            nodes.clear()
        seq.entering.clear()
        seq.unfinished.clear()
        seq.approx = None
        seq.drafted = ()
        seq.page_table[...] = -1
        seq.num_pages = seq.num_computed = 0

    def _reuses(self, seq: TokenSequence) -> bool:
        return self.prefix_caching and seq.reuse != "off"

    # ---- looking in from outside

    def stats(self) -> CacheStats:
        """A snapshot of counters and page counts."""
        hits, deduped = self.tree.gains()
        return CacheStats(
            pages_total=self.pool.num_pages,
            pages_free=self.pool.num_free,
            pages_cached=self.tree.num_pages,
            pages_evictable=self.tree.num_evictable_pages,
            pages_owned=self.pool.num_pages - self.pool.num_free - self.tree.num_pages,
            lookups=self.lookups,
            resumed_tokens=self.resumed_tokens,
            copied_pages=self.copied_pages,
            approximate_tokens=self.approximate_tokens,
            approximate_pages=self.approximate_pages,
            approximate_guarded=self.approximate_guarded,
            approximate_guard_fallbacks=self.approximate_guard_fallbacks,
            published_pages=self.published.num_pages,
            published_hit_tokens=self.published.hit_tokens,
            evictions=self.tree.evictions,
            hit_tokens=hits,
            deduped_tokens=deduped,
            layer_hit_tokens=self.tree.hits_by_layers(),
        )

    def check_integrity(self, sequences: Iterable[TokenSequence]) -> None:
        """Check all invariants, given every sequence that may hold pages of this cache.

        Raises IntegrityError on the first that does not hold. Takes milliseconds: for idle times and tests.
        """
        self.tree.check_integrity(sequences, self.published.pins())
