"""The KV of published documents on disk, between starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

from blockzoo.engines.kv_pages import KVPrecision
from blockzoo.runtime.exec.interface import StepExecutor
from blockzoo.runtime.exec.topology import ChainPlan, Topology
from blockzoo.runtime.kv.sequence import Segment, TokenSequence
from blockzoo.runtime.serve.kv_store import KVPart, KVStore
from blockzoo.runtime.serve.loaded import LoadedZoo


class DocumentFiles:
    """One file for each document and run of layers.

    Args:
        folder: of the files.
        max_bytes: of all of them; those used longest ago go first.
        zoo: what is loaded now.
    """

    def __init__(self, folder: Path, max_bytes: int, zoo: Callable[[], LoadedZoo]) -> None:
        self._zoo = zoo
        self._store = KVStore(folder, max_bytes, zoo().engine_facts)

    @property
    def num_rejected(self) -> int:
        """Files that were damaged or not what they said."""
        return self._store.num_rejected

    def _parts(self, seq: TokenSequence, executor: StepExecutor) -> list[tuple[Segment, KVPart]]:
        """What of a document is a file: each segment, so that models share those of their common layers."""
        zoo, chain = self._zoo(), executor.chains[seq.chain_index]
        dtype = cast("KVPrecision", zoo.engine_facts.get("kv", zoo.engine_facts["precision"]))
        shape = executor.kv.page_shape
        parts = []
        for segment in chain.segments:
            first, end = segment.first_layer, segment.end_layer
            blocks_key = kv_identity(zoo.topology, chain, end - 1)
            parts.append((segment, KVPart(blocks_key, first, end, seq.token_ids, shape, dtype)))
        return parts

    def load(self, seq: TokenSequence, executor: StepExecutor) -> bool:
        """Fill the pages of `seq` that are not in the tree from disk; False, having changed nothing."""
        found = []
        for (segment, part), path in zip(self._parts(seq, executor), seq.nodes, strict=True):
            if len(path) < seq.num_pages:
                contents = self._store.load(part)
                if contents is None:
                    return False
                found.append((segment, len(path), contents))
        for segment, first, (keys, values) in found:
            pages = seq.page_table[segment.first_layer : segment.end_layer, first : seq.num_pages]
            contents = keys[:, first:], values[:, first:]
            executor.kv.fill(seq.chain_index, segment.first_layer, pages, *contents)
        seq.num_computed = seq.num_tokens
        seq.cache.commit(seq)
        return True

    def save(self, seq: TokenSequence, executor: StepExecutor) -> None:
        """Keep the KV of a computed document."""
        for segment, part in self._parts(seq, executor):
            pages = seq.page_table[segment.first_layer : segment.end_layer, : seq.num_pages]
            self._store.save(part, *executor.kv.read(pages))


def kv_identity(topology: Topology, chain: ChainPlan, layer: int) -> str:
    """What stands, in any process, for all that computes the K and V of a layer: block and adapter ids."""
    ids = (chain.embed_id, *(i for use in chain.uses for i in topology.spans[use.span].block_ids))
    adapters = dict(chain.adapters)
    # embed, then attn and ffn of each layer: its K and V are made in its attn
    computing = [f"{ids[i]} {adapters.get(i, '')}" for i in range(2 * layer + 2)]
    return hashlib.sha256("\n".join(["K and V of", *computing]).encode()).hexdigest()
