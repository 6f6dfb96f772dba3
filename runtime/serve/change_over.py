"""One loaded zoo takes the place of another between two steps, under the requests that run.

Executors are changed, and with them the numbers of chains; sequences keep their pages. Where chains share
other layers than before, the prefix tree is cut anew (`KVCache.reshape`). All that takes long is done before:
engines are compiled and have run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from blockzoo.engines.base import pages_for
from blockzoo.runtime.exec.adapters import Pairs
from blockzoo.runtime.exec.topology import ChainPlan, Family, Topology
from blockzoo.runtime.kv.prefix_cache import path_lengths
from blockzoo.runtime.kv.sequence import Segment
from blockzoo.runtime.serve.loaded import LoadedZoo
from blockzoo.runtime.serve.making import Making, check_sound, fitted, most_layers, page_bytes
from blockzoo.runtime.serve.request_builder import Request
from blockzoo.runtime.serve.scheduler import Scheduler


class StillUsedError(Exception):
    """A chain that is not in the new zoo is used by a request."""


class NoRoomError(Exception):
    """Running requests hold the memory that pools of new families need."""

    def __init__(self, families: Collection[Family]) -> None:
        super().__init__("running requests hold the memory of the KV pool that it needs")
        self.families = families


def change_over(
    old: LoadedZoo, new: LoadedZoo, make: Making, requests: Collection[Request], scheduler: Scheduler
) -> LoadedZoo:
    """Put `new` in the place of `old`; what is loaded then: `new`, its models fitted to the pools.

    Args:
        make: of both.
        requests: all that are queued or run.

    Raises:
        StillUsedError, NoRoomError: as they say; nothing has changed.
        UnsoundError: the logits of new chains are not finite; nothing has changed.
    """
    if any(request.model.chain.key not in new.chain_index for request in requests):
        raise StillUsedError
    _take_over_adapters(old, new, requests)
    coming = [index for key, index in new.chain_index.items() if key not in old.chain_index]
    check_sound(new.topology, new.executors, coming)
    if old.caches.keys() != new.caches.keys():
        _share_out_pages(old, new, make, requests)
    if new.workers is not old.workers:
        _forget_all(old, requests, scheduler)
    _begin_anew(new, requests, scheduler)
    for family in old.caches.keys() & new.caches.keys():
        _reshape(family, old.topology, new, requests, scheduler)
    for request in requests:
        bring_up_to_date(request, new)
    chains = new.topology.chains
    new.adapters.keep({key for chain in chains for _, key in chain.adapters})
    new.boundaries.keep({segment.boundary for chain in chains for segment in chain.segments})
    pages = {family: cache.pool.num_pages for family, cache in new.caches.items()}
    return replace(new, models=fitted(new.models, new.manifest, make.config, pages))


def bring_up_to_date(request: Request, zoo: LoadedZoo) -> None:
    """Let a request know its chain as the zoo has it now; its segments are changed, if it holds no page.

    Raises StillUsedError where the zoo does not have it.
    """
    index = zoo.chain_index.get(request.model.chain.key)
    if index is None:
        raise StillUsedError
    chain, seq = zoo.topology.chains[index], request.seq
    surrogate = request.model.surrogate
    if surrogate is not None:
        place = zoo.chain_index.get(surrogate.key)
        surrogate = None if place is None else replace(surrogate, chain_index=place)
    request.model = replace(request.model, chain=chain, chain_index=index, surrogate=surrogate)
    seq.chain_index, seq.cache = index, zoo.caches[chain.family]
    if seq.segments != chain.segments:
        seq.take_segments(chain.segments, [[] for _ in chain.segments])


def _forget_all(old: LoadedZoo, requests: Collection[Request], scheduler: Scheduler) -> None:
    """Other workers have other pages: what runs begins anew, from its tokens."""
    for request in requests:
        scheduler.put_back(request.seq)
    for cache in old.caches.values():
        cache.forget_all()


def _begin_anew(new: LoadedZoo, requests: Collection[Request], scheduler: Scheduler) -> None:
    """Chains that go through other copies of spans than before have K and V elsewhere (`with_copies`): what
    runs of them begins anew, from its tokens."""
    keys = {chain.key: chain.layer_keys for chain in new.topology.chains}
    for request in requests:
        if request.model.chain.layer_keys != keys[request.model.chain.key]:
            scheduler.put_back(request.seq)
            bring_up_to_date(request, new)


def _take_over_adapters(old: LoadedZoo, new: LoadedZoo, requests: Collection[Request]) -> None:
    held: dict[str, Pairs] = {}
    running = {request.model.chain_index for request in requests}
    before, after = old.local_executors, new.local_executors
    for family in before.keys() & after.keys():
        held |= after[family].take_over(before[family], running)
    new.adapters.hold(held)


def _reshape(
    family: Family, old: Topology, new: LoadedZoo, requests: Collection[Request], scheduler: Scheduler
) -> None:
    """Cut the prefix tree of a family anew. A sequence in the middle of what cannot be cut begins anew, with
    all that is cached of it; none does that has given a token since it began."""
    before = [chain for chain in old.chains if chain.family == family]
    after = [chain for chain in new.topology.chains if chain.family == family]
    segments = {chain.key: chain.segments for chain in after}
    chains = {chain.segments: segments[chain.key] for chain in before if chain.key in segments}
    sequences = [
        request.seq
        for request in requests
        if request.model.chain.family == family and request.seq.segments in chains
    ]
    parts = parts_of(before, after)
    for seq in sequences:
        now = chains[seq.segments]
        if now != seq.segments and path_lengths(seq, now, parts) is None:
            scheduler.put_back(seq)
    new.caches[family].reshape(parts, chains, sequences)


def parts_of(
    before: Sequence[ChainPlan], after: Sequence[ChainPlan]
) -> dict[Segment, list[tuple[Segment, slice]]]:
    """By segment, those of before that it consists of, for `KVCache.reshape`."""
    home = {
        chain.layer_keys[layer]: (segment, layer - segment.first_layer)
        for chain in before
        for segment in chain.segments
        for layer in range(segment.first_layer, segment.end_layer)
    }
    parts: dict[Segment, list[tuple[Segment, slice]]] = {}
    for chain in after:
        for segment in chain.segments:
            found = [home.get(key) for key in chain.layer_keys[segment.first_layer : segment.end_layer]]
            pieces = parts[segment] = []
            for place in found:
                if place is None:
                    pieces.clear()
                    break
                source, layer = place
                if pieces and pieces[-1][0] == source:
                    pieces[-1] = source, slice(pieces[-1][1].start, layer + 1)
                else:
                    pieces.append((source, slice(layer, layer + 1)))
    return parts


def _share_out_pages(old: LoadedZoo, new: LoadedZoo, make: Making, requests: Collection[Request]) -> None:
    """Give families that came their part of the pages of the others, as far as those can do without.

    Raises:
        NoRoomError: that is too little; nothing has changed.
    """
    wanted = make.pages(new.topology)
    sizes = {family: page_bytes(family, make.maker) for family in wanted}
    staying = [family for family in wanted if family in old.caches]
    before = {family: old.caches[family].pool.num_pages for family in staying}
    gone = {
        family: old.caches[family].resize(max(wanted[family], _most_needed(old, family, requests)))
        for family in staying
        if wanted[family] < before[family]
    }
    left = make.kv_bytes - sum(old.caches[family].pool.num_pages * sizes[family] for family in staying)
    short = []
    for family in wanted.keys() - old.caches.keys():
        count = min(wanted[family], left // sizes[family])
        if count < most_layers(new.topology, family):
            short.append(family)
            continue
        new.caches[family].pool.resize(count)
        left -= count * sizes[family]
    if short:
        for family in staying:
            old.caches[family].resize(before[family])
        raise NoRoomError(short)
    for family in staying:
        pool = old.caches[family].pool
        more = min(wanted[family], pool.capacity) - pool.num_pages
        if more > 0:
            more = min(more, left // sizes[family])
            pool.resize(pool.num_pages + more)
            left -= more * sizes[family]
    for family, executor in new.local_executors.items():
        if family in gone:
            executor.discard(gone[family])


def _most_needed(zoo: LoadedZoo, family: Family, requests: Collection[Request]) -> int:
    """Pages without which some request could not come to its end, or a document not stay published."""
    needed = [
        pages_for(request.seq.prompt_len + request.max_tokens) * request.seq.num_layers
        for request in requests
        if request.model.chain.family == family
    ]
    return max(needed, default=1) + zoo.caches[family].published.num_pages
