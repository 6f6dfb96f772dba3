"""Publishes documents: their KV is computed once, in isolation, and then serves every scope.

    text -> tokens, filled up to whole pages -> KV, from disk or computed -> pages of the tree that stay

What a prompt begins with is taken exactly; where a document stands elsewhere in a prompt its KV may be taken
approximately (`reuse`), by requests that ask for it.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS, pages_for
from blockzoo.runtime.api.errors import (
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
)
from blockzoo.runtime.exec.interface import KVLostError, StepExecutor
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.kv.published_pages import Publication, PublishStats
from blockzoo.runtime.kv.sequence import TokenSequence
from blockzoo.runtime.serve.config import EngineConfig
from blockzoo.runtime.serve.document_files import DocumentFiles
from blockzoo.runtime.serve.loaded import LoadedModel, LoadedZoo
from blockzoo.runtime.serve.request_builder import find_model
from blockzoo.runtime.serve.scheduler import Scheduled
from blockzoo.runtime.serve.step_runner import StepRunner
from blockzoo.runtime.text.prompt import document_tokens

_FILL = 0  # the token behind a document, up to the end of its last page; no prompt sees it


@dataclass(frozen=True, slots=True)
class PublishedDocument:
    """A document that is published.

    Attributes:
        models: that may use it.
        num_tokens: of the document, with what begins any prompt; in the longest of its tokenizations.
        num_pages: of the pool, that it added to what was published.
        num_loaded: of the models' distinct chains, those whose KV came from disk; the others' was computed.
        seconds: that it took.
        missing: models that it is for and that cannot use it, as they are left out or came later, and why.
    """

    name: str
    models: tuple[str, ...]
    num_tokens: int
    num_pages: int
    num_loaded: int
    seconds: float
    missing: Mapping[str, str] = field(default_factory=dict)


_Key = tuple[str, tuple[int, ...]]
"""What stands for a chain, and the tokens of a document in it."""


class _Task(NamedTuple):
    """A document in one chain: its tokens, of which `lead` begin any prompt."""

    model: LoadedModel
    token_ids: tuple[int, ...]
    lead: int

    @property
    def key(self) -> _Key:
        """What tells publications of one document apart."""
        return self.model.chain.key, self.token_ids


class _InCache(NamedTuple):
    cache: KVCache
    publication: Publication

    def withdraw(self) -> None:
        self.cache.withdraw(self.publication)


@dataclass(slots=True)
class _Entry:
    """A document, whom it is for (None: for all), and where it lies, by `_Task.key`."""

    document: PublishedDocument
    text: str
    wanted: tuple[str, ...] | None
    places: dict[_Key, _InCache]
    models: Mapping[str, LoadedModel]  # those served when it was last brought in line with them


class DocumentPublisher:
    """The published documents of an engine. Called between its steps, from the same thread.

    Args:
        zoo: what is loaded now.
        config: of the engine.
        runner: of steps.
    """

    def __init__(self, zoo: Callable[[], LoadedZoo], config: EngineConfig, runner: StepRunner) -> None:
        self._zoo, self._config, self._runner = zoo, config, runner
        self._published: dict[str, _Entry] = {}
        self._loaded = self._computed = 0
        self._files: DocumentFiles | None = None
        if config.kv_cache_dir is not None:
            self._files = DocumentFiles(Path(config.kv_cache_dir), config.kv_cache_dir_bytes, zoo)

    @property
    def documents(self) -> tuple[PublishedDocument, ...]:
        """What is published, the oldest first."""
        return tuple(entry.document for entry in list(self._published.values()))

    def stats(self) -> PublishStats:
        """A snapshot; from any thread."""
        rejected = 0 if self._files is None else self._files.num_rejected
        return PublishStats(len(self._published), self._loaded, self._computed, rejected)

    def publish(self, name: str, text: str, models: Sequence[str] | None = None) -> PublishedDocument:
        """Publish a document for some models (all): the KV of all its chains, or an error and nothing.

        Models that are added or replaced later get it too, where it is for them (`follow`).

        Raises:
            InvalidRequestError: the name is in use, the text empty, caching off, or there is no room left.
            UnknownModelError, PromptTooLongError.
            OverloadedError: running requests hold the pages that it needs now.
            KVLostError: a worker was lost meanwhile.
        """
        start = time.monotonic()
        if not self._config.prefix_caching:
            raise InvalidRequestError("documents cannot be published: prefix_caching is off")
        if not name or name in self._published:
            why = "is published already; withdraw it first" if name else "is no name of a document"
            raise InvalidRequestError(f"{name!r} {why}")
        zoo = self._zoo()
        served = zoo.models
        wanted = tuple(dict.fromkeys(served if models is None else models))
        missing = {n: f"left out: {zoo.left_out[n]}" for n in wanted if n in zoo.left_out and n not in served}
        if not wanted:
            raise InvalidRequestError(f"document {name!r} is for no model; name some, or none at all for all")
        names = tuple(model for model in wanted if model not in missing)
        tasks = self._tasks(name, text, names)
        before, loaded = self._num_pages(), self._loaded
        places: dict[_Key, _InCache] = {}
        try:
            for key, task in tasks.items():
                places[key] = self._publish_in_chain(name, task)
        except BaseException:
            for place in places.values():
                place.withdraw()
            raise
        document = PublishedDocument(
            name,
            names,
            max((len(task.token_ids) for task in tasks.values()), default=0),
            self._num_pages() - before,
            self._loaded - loaded,
            time.monotonic() - start,
            missing,
        )
        self._published[name] = _Entry(document, text, None if models is None else wanted, places, served)
        return document

    def withdraw(self, name: str) -> None:
        """End the publication of a document; requests that use it go on. Raises InvalidRequestError."""
        if name not in self._published:
            close = get_close_matches(name, self._published, 1)
            raise InvalidRequestError(
                f"no document {name!r} is published" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        for place in self._published.pop(name).places.values():
            place.withdraw()

    # ---- models come and go

    @property
    def is_behind(self) -> bool:
        """Whether some document is published for models that are not those served now."""
        served = self._zoo().models
        return any(entry.models is not served for entry in self._published.values())

    def follow(self) -> None:
        """Bring one document in line with the models served now, where there is one that is not.

        It is published for those that came, and withdrawn where only models used it that have gone.

        Raises KVLostError: a worker was lost meanwhile.
        """
        served = self._zoo().models
        for name, entry in self._published.items():
            if entry.models is not served:
                self._bring_in_line(name, entry, served)
                return

    def forget_all(self) -> None:
        """The KV of all is gone, or about to go: they are computed or loaded anew (`follow`), one after the
        other; until then requests compute what they need of them."""
        for entry in self._published.values():
            for place in entry.places.values():
                place.withdraw()
            entry.places, entry.models = {}, {}

    def _bring_in_line(self, name: str, entry: _Entry, served: Mapping[str, LoadedModel]) -> None:
        missing: dict[str, str] = {}
        places: dict[_Key, _InCache] = {}
        for model in served if entry.wanted is None else entry.wanted:
            if model not in served:
                continue
            try:
                ((key, task),) = self._tasks(name, entry.text, (model,)).items()
                if key not in places:
                    known = key in entry.places
                    places[key] = entry.places.pop(key) if known else self._publish_in_chain(name, task)
            except KVLostError:
                entry.places |= places
                raise
            except Exception as error:  # requests to that model compute it themselves
                if not isinstance(error, RequestError):
                    traceback.print_exc()
                missing[model] = str(error)
        for place in entry.places.values():
            place.withdraw()
        names = entry.wanted or tuple(served)
        entry.document = replace(
            entry.document,
            models=tuple(model for model in names if model in served and model not in missing),
            missing=missing,
        )
        entry.places, entry.models = places, served

    def _num_pages(self) -> int:
        return sum(cache.published.num_pages for cache in self._zoo().caches.values())

    def _tasks(self, name: str, text: str, names: Sequence[str]) -> dict[_Key, _Task]:
        """One per distinct chain and tokenization."""
        tasks: dict[_Key, _Task] = {}
        for model_name in names:
            model = find_model(self._zoo(), model_name)
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
            task = _Task(model, tuple(tokens), lead)
            tasks.setdefault(task.key, task)
        return tasks

    def _publish_in_chain(self, name: str, task: _Task) -> _InCache:
        chain, zoo = task.model.chain, self._zoo()
        cache, executor = zoo.caches[chain.family], zoo.executors[chain.family]
        num_tokens = len(task.token_ids)
        filled = np.full(pages_for(num_tokens) * PAGE_TOKENS, _FILL, np.int32)
        filled[:num_tokens] = task.token_ids
        seq = TokenSequence(
            f"publish {name}",
            task.model.name,
            cache,
            chain.segments,
            "",
            filled,
            0.0,
            publishes=True,
            chain_index=task.model.chain_index,
        )
        self._check_budget(name, cache, cache.pages_to_publish(seq))
        try:
            cache.begin(seq)
            if not cache.reserve(seq, seq.num_tokens):
                raise OverloadedError(
                    f"document {name!r} needs {cache.missing_pages(seq, seq.num_tokens)} pages, and running "
                    "requests hold them: publish it when fewer run, or raise kv_cache_bytes"
                )
            if self._files is not None and self._files.load(seq, executor):
                self._loaded += 1
            else:
                self._compute(seq, executor)
                self._computed += 1
                if self._files is not None:
                    self._files.save(seq, executor)
            return _InCache(cache, cache.publish(seq, num_tokens, task.lead))
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

    def _compute(self, seq: TokenSequence, executor: StepExecutor) -> None:
        while seq.num_computed < seq.num_tokens:
            end = min(seq.num_tokens, seq.num_computed + self._config.max_num_batched_tokens)
            border = end - end % PAGE_TOKENS
            end = border if border > seq.num_computed else end
            done = self._runner.run(executor, [Scheduled(seq, end - seq.num_computed)], _advance)
            for problem in done.failed.values():
                raise RequestError(problem)


def _advance(items: Sequence[Scheduled]) -> None:
    for seq, num_tokens in items:
        seq.num_computed += num_tokens
        seq.cache.commit(seq)
