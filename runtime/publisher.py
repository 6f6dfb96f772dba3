"""Publishes documents: their KV is computed once, in isolation, and then serves every scope.

    text -> tokens, filled up to whole pages -> KV, from disk or computed -> pages of the tree that stay

What a prompt begins with is taken exactly; where a document stands elsewhere in a prompt its KV may be taken
approximately (`reuse`), by requests that ask for it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blockzoo.runtime.config import EngineConfig
from blockzoo.runtime.errors import (
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
)
from blockzoo.runtime.executor import Executor
from blockzoo.runtime.kv_store import KVPart, KVStore
from blockzoo.runtime.loading import LoadedModel, LoadedZoo
from blockzoo.runtime.pool import PAGE_TOKENS, pages_for
from blockzoo.runtime.prefix_tree import KVCache
from blockzoo.runtime.prompt import document_tokens
from blockzoo.runtime.published import Publication, PublishStats
from blockzoo.runtime.scheduler import Scheduled
from blockzoo.runtime.sequence import Segment
from blockzoo.runtime.sequence import Sequence as TokenSequence
from blockzoo.runtime.topology import ChainPlan, Topology
from blockzoo.zoo.tensors import Dtype

_FILL = 0  # the token behind a document, up to the end of its last page; no prompt sees it
RunStep = Callable[[Executor, list[Scheduled]], object]
"""Writes the KV of scheduled tokens."""


@dataclass(frozen=True, slots=True)
class PublishedDocument:
    """A document that is published.

    Attributes:
        models: that may use it.
        num_tokens: of the document, with what begins any prompt; in the longest of its tokenizations.
        num_pages: of the pool, that it added to what was published.
        num_loaded: of the models' distinct chains, those whose KV came from disk; the others' was computed.
        seconds: that it took.
    """

    name: str
    models: tuple[str, ...]
    num_tokens: int
    num_pages: int
    num_loaded: int
    seconds: float


class _Task(NamedTuple):
    """A document in one chain: its tokens, of which `lead` begin any prompt."""

    model: LoadedModel
    token_ids: tuple[int, ...]
    lead: int


class Publisher:
    """The published documents of an engine. Called between its steps, from the same thread.

    Args:
        zoo: what is loaded now; its caches and executors stay.
        config: of the engine.
        find_model: a model by its name; raises UnknownModelError.
        run: runs a step.

    Raises:
        InvalidRequestError: kv_cache_dir cannot be used.
    """

    def __init__(
        self,
        zoo: Callable[[], LoadedZoo],
        config: EngineConfig,
        find_model: Callable[[str], LoadedModel],
        run: RunStep,
    ) -> None:
        self._zoo, self._config = zoo, config
        self._find_model, self._run = find_model, run
        self.model: LoadedModel  # of the document that is being published, whatever its name stands for now
        self._published: dict[str, tuple[PublishedDocument, list[tuple[KVCache, Publication]]]] = {}
        self._loaded = self._computed = 0
        self._store: KVStore | None = None
        if config.kv_cache_dir is not None:
            self._store = KVStore(Path(config.kv_cache_dir), config.kv_cache_dir_bytes, zoo().engine_facts)

    @property
    def documents(self) -> tuple[PublishedDocument, ...]:
        """What is published, the oldest first."""
        return tuple(document for document, _ in list(self._published.values()))

    def stats(self) -> PublishStats:
        """A snapshot; from any thread."""
        rejected = 0 if self._store is None else self._store.num_rejected
        return PublishStats(len(self._published), self._loaded, self._computed, rejected)

    def publish(self, name: str, text: str, models: Sequence[str] | None = None) -> PublishedDocument:
        """Publish a document for some models (all): the KV of all its chains, or an error and nothing.

        Raises:
            InvalidRequestError: the name is in use, the text empty, caching off, or there is no room left.
            UnknownModelError, PromptTooLongError.
            OverloadedError: running requests hold the pages that it needs now.
        """
        start = time.monotonic()
        if not self._config.prefix_caching:
            raise InvalidRequestError("documents cannot be published: prefix_caching is off")
        if not name or name in self._published:
            why = "is published already; withdraw it first" if name else "is no name of a document"
            raise InvalidRequestError(f"{name!r} {why}")
        names = tuple(dict.fromkeys(self._zoo().models if models is None else models))
        tasks = self._tasks(name, text, names)
        before, loaded = self._num_pages(), self._loaded
        done: list[tuple[KVCache, Publication]] = []
        try:
            for task in tasks:
                done.append(self._publish_in_chain(name, task))
        except BaseException:
            for cache, publication in done:
                cache.withdraw(publication)
            raise
        document = PublishedDocument(
            name,
            names,
            max(len(task.token_ids) for task in tasks),
            self._num_pages() - before,
            self._loaded - loaded,
            time.monotonic() - start,
        )
        self._published[name] = document, done
        return document

    def withdraw(self, name: str) -> None:
        """End the publication of a document; requests that use it go on. Raises InvalidRequestError."""
        if name not in self._published:
            close = get_close_matches(name, self._published, 1)
            raise InvalidRequestError(
                f"no document {name!r} is published" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        _, publications = self._published.pop(name)
        for cache, publication in publications:
            cache.withdraw(publication)

    def _num_pages(self) -> int:
        return sum(cache.published.num_pages for cache in self._zoo().caches.values())

    def _tasks(self, name: str, text: str, names: Sequence[str]) -> list[_Task]:
        """One per distinct chain and tokenization."""
        tasks: dict[tuple[int, tuple[int, ...]], _Task] = {}
        if not names:
            raise InvalidRequestError(f"document {name!r} is for no model; name some, or none at all for all")
        for model_name in names:
            model = self._find_model(model_name)
            tokens, lead = document_tokens(model.tokenizer, text)
            if pages_for(len(tokens)) * PAGE_TOKENS > model.max_len:
                raise PromptTooLongError(
                    f"document {name!r} has {len(tokens)} tokens; {model_name} takes at most "
                    f"{model.max_len // PAGE_TOKENS * PAGE_TOKENS} of a document: shorten it"
                )
            if tokens and max(tokens) >= model.chain.vocab_size:
                raise InvalidRequestError(
                    f"document {name!r} holds token id {max(tokens)}; those of {model_name} are 0 to "
                    f"{model.chain.vocab_size - 1}: its tokenizer has more tokens than the model"
                )
            tasks.setdefault((model.chain_index, tuple(tokens)), _Task(model, tuple(tokens), lead))
        return list(tasks.values())

    def _publish_in_chain(self, name: str, task: _Task) -> tuple[KVCache, Publication]:
        self.model, chain = task.model, task.model.chain
        zoo = self._zoo()
        cache, executor = zoo.caches[chain.family], zoo.executors[chain.family]
        num_tokens = len(task.token_ids)
        filled = np.full(pages_for(num_tokens) * PAGE_TOKENS, _FILL, np.int32)
        filled[:num_tokens] = task.token_ids
        seq = TokenSequence(
            f"publish {name}", task.model.name, cache, chain.segments, "", filled, 0.0, publishes=True
        )
        self._check_budget(name, cache, cache.pages_to_publish(seq))
        try:
            cache.begin(seq)
            if not cache.reserve(seq, seq.num_tokens):
                raise OverloadedError(
                    f"document {name!r} needs {cache.missing_pages(seq, seq.num_tokens)} pages, and running "
                    "requests hold them: publish it when fewer run, or raise kv_cache_bytes"
                )
            if self._load(seq, executor):
                self._loaded += 1
            else:
                self._compute(seq, executor)
                self._computed += 1
                self._save(seq, executor)
            return cache, cache.publish(seq, num_tokens, task.lead)
        finally:
            cache.release(seq)
            executor.release_memory()

    def _check_budget(self, name: str, cache: KVCache, num_pages: int) -> None:
        limit = int(self._config.published_kv_share * cache.pool.num_pages)
        if cache.published.num_pages + num_pages > limit:
            raise InvalidRequestError(
                f"document {name!r} needs {num_pages} pages; published documents hold "
                f"{cache.published.num_pages} of the {limit} they may (published_kv_share "
                f"{self._config.published_kv_share:g} of {cache.pool.num_pages}): withdraw some, raise "
                "published_kv_share or raise kv_cache_bytes"
            )

    def _compute(self, seq: TokenSequence, executor: Executor) -> None:
        while seq.num_computed < seq.num_tokens:
            end = min(seq.num_tokens, seq.num_computed + self._config.max_num_batched_tokens)
            border = end - end % PAGE_TOKENS
            end = border if border > seq.num_computed else end
            self._run(executor, [Scheduled(seq, end - seq.num_computed)])
            seq.num_computed = end
            seq.cache.commit(seq)

    # ---- on disk

    def _parts(self, seq: TokenSequence, executor: Executor) -> list[tuple[Segment, KVPart]]:
        """What of a document is a file: each segment, so that models share those of their common layers."""
        zoo, chain = self._zoo(), self.model.chain
        dtype: Dtype = "bf16" if zoo.engine_facts["precision"] == "bf16" else "f32"
        shape = executor.contents.page_shape
        parts = []
        for segment in chain.segments:
            first, end = segment.first_layer, segment.end_layer
            blocks_key = kv_identity(zoo.topology, chain, end - 1)
            parts.append((segment, KVPart(blocks_key, first, end, seq.token_ids, shape, dtype)))
        return parts

    def _load(self, seq: TokenSequence, executor: Executor) -> bool:
        """Fill the pages of `seq` that are not in the tree from disk; False, having changed nothing."""
        if self._store is None:
            return False
        found = []
        for (segment, part), path in zip(self._parts(seq, executor), seq.nodes, strict=True):
            if len(path) < seq.num_pages:
                contents = self._store.load(part)
                if contents is None:
                    return False
                found.append((segment, len(path), contents))
        for segment, first, (keys, values) in found:
            pages = seq.page_table[segment.first_layer : segment.end_layer, first : seq.num_pages]
            executor.contents.write(pages, keys[:, first:], values[:, first:])
        seq.num_computed = seq.num_tokens
        seq.cache.commit(seq)
        return True

    def _save(self, seq: TokenSequence, executor: Executor) -> None:
        if self._store is None:
            return
        for segment, part in self._parts(seq, executor):
            pages = seq.page_table[segment.first_layer : segment.end_layer, : seq.num_pages]
            self._store.save(part, *executor.contents.read(pages))


def kv_identity(topology: Topology, chain: ChainPlan, layer: int) -> str:
    """What stands, in any process, for all that computes the K and V of a layer: block and adapter ids."""
    ids = (chain.embed_id, *(i for use in chain.uses for i in topology.spans[use.span].block_ids))
    adapters = dict(chain.adapters)
    # embed, then attn and ffn of each layer: its K and V are made in its attn
    computing = [f"{ids[i]} {adapters.get(i, '')}" for i in range(2 * layer + 2)]
    return hashlib.sha256("\n".join(["K and V of", *computing]).encode()).hexdigest()
