"""What a KV cache counts, and its pages now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Any


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
    copied_pages: int  # copied in part, as they begin alike
    approximate_tokens: int  # whose KV was taken from equal words behind other ones
    approximate_pages: int  # the same, of each request in whole pages: what others may know
    approximate_guarded: int  # sequences that a guard looked at
    approximate_guard_fallbacks: int  # those of them that were computed in full
    published_pages: int  # those of the tree that are published, so never evicted
    published_hit_tokens: int  # whose KV was found among them
    evictions: int  # nodes evicted
    hit_tokens: dict[str, int]  # per key of a segment that there is: tokens whose KV was found, not computed
    deduped_tokens: dict[str, int]  # the same: tokens computed twice, whose second KV was dropped
    layer_hit_tokens: dict[str, int]  # as hit_tokens, by layers ("0-9": 0 to 9), of all that ever were

    def without_pages(self) -> CacheStats:
        """The counters alone, of a cache that is no more."""
        return replace(
            self,
            hit_tokens={},
            deduped_tokens={},
            pages_total=0,
            pages_free=0,
            pages_cached=0,
            pages_evictable=0,
            pages_owned=0,
            published_pages=0,
        )

    def plus(self, other: CacheStats) -> CacheStats:
        """Those of two caches together."""
        both: dict[str, Any] = {}
        for name in (field.name for field in fields(self)):
            one, more = getattr(self, name), getattr(other, name)
            both[name] = dict(Counter(one) + Counter(more)) if isinstance(one, dict) else one + more
        return CacheStats(**both)
