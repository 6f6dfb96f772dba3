"""The models served: which they are, what they were made from, their tokenizers and chat templates."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from blockzoo.runtime.text.chat import ChatTemplate
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.server_config.openai.engine import Engine
from blockzoo.server_config.openai.errors import ApiError, invalid, unknown_model
from blockzoo.server_config.openai.tools import Format, format_of
from blockzoo.zoo.chat_files import templates
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.generation_defaults import sampling_defaults
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.store import Zoo, manifest_stamp

_FRESH_S = 1.0
_MAX_TOKENIZERS = 32  # kept loaded
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model: its name, that of the model it is an adapter of, and when the zoo got its present form."""

    name: str
    parent: str | None
    created: int
    folder: Path
    """Of its tokenizer files."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """How its answers are chosen where a request does not say, as fields of `SamplingParams`."""


class TokenTexts:
    """Texts and bytes of single tokens, as answers with log-probabilities show them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def is_special(self, token_id: int) -> bool:
        """Whether a token stands for no text."""
        return token_id in self._tokenizer.special_tokens

    def of(self, token_id: int) -> tuple[str, bytes]:
        """The text of a token in the middle of a text (U+FFFD for a part of a character) and its bytes."""
        found = self._known.get(token_id)
        if found is None:
            data = self._tokenizer.bytes_of(token_id)
            if data is None:
                # behind itself, since many tokenizers strip the space that begins a text
                once = self._tokenizer.decode([token_id], skip_special_tokens=False)
                twice = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)
                data = twice[len(once) :].encode()
            found = self._known[token_id] = (data.decode("utf-8", "replace"), data)
        return found


class Catalog:
    """What is served, from the engine's list and the zoo's manifest; files are read in threads.

    Args:
        zoo: path of the zoo.
        pool: of threads that read files and tokenize.
        defaults: whether answers are chosen as generation_config.json says where a request does not.
    """

    def __init__(self, zoo: Path, engine: Engine, pool: ThreadPoolExecutor, defaults: bool = True) -> None:
        self._zoo, self._engine, self._pool, self._defaults = zoo, engine, pool, defaults
        self._models: dict[str, ServedModel] = {}
        self._records: dict[str, ServedModel] = {}
        self.stamp: tuple[int, int] | None = None
        """Of the manifest that was read last."""
        self.manifest = Manifest()
        self._checked = float("-inf")
        self._lock = asyncio.Lock()
        self._loaded: OrderedDict[tuple[str, str], asyncio.Future[Any]] = OrderedDict()

    async def models(self) -> dict[str, ServedModel]:
        """All by name, at most a second old. Raises ApiError where the engine cannot be asked."""
        async with self._lock:
            if time.monotonic() - self._checked > _FRESH_S:
                await self._read_manifest()
                names = await self._engine.ready(sorted(self._records))
                self._models = {name: self._records[name] for name in names}
                self._checked = time.monotonic()
        return self._models

    async def find(self, name: str) -> ServedModel:
        """A model by its name. Raises ApiError."""
        models = await self.models()
        if name not in models:
            raise unknown_model(name)
        return models[name]

    async def tokenizer(self, model: ServedModel) -> Tokenizer:
        """Raises ApiError where its files cannot be read."""
        return await self._load("tokenizer", model, Tokenizer.load)

    async def token_texts(self, model: ServedModel) -> TokenTexts:
        """Raises as `tokenizer`."""
        tokenizer = await self.tokenizer(model)

        def make(folder: Path) -> TokenTexts:
            return TokenTexts(tokenizer)

        return await self._load("texts", model, make)

    async def template(self, model: ServedModel, field: str = "messages") -> ChatTemplate:
        """Raises ApiError where the model has none, which `field` of the body needs."""
        template = await self._load("template", model, ChatTemplate.load)
        if template is None:
            raise invalid(
                field,
                f"The model {model.name!r} has no chat template: use /v1/completions, or compile the model "
                "from a folder with a chat_template.jinja.",
            )
        return template

    async def call_format(self, model: ServedModel) -> Format | None:
        """How the model calls tools; None where it does not, or not in a way that is known."""
        return await self._load("calls", model, lambda folder: format_of(templates(folder).values()))

    async def run(self, work: Callable[[], T]) -> T:
        """Do something in a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _load(self, kind: str, model: ServedModel, load: Callable[[Path], Any]) -> Any:
        """Once for all requests that need it at the same time, and kept."""
        key = (kind, str(model.folder))
        future = self._loaded.get(key)
        if future is None or (future.done() and future.exception() is not None):
            future = asyncio.ensure_future(self.run(lambda: load(model.folder)))
            self._loaded[key] = future
            while len(self._loaded) > 4 * _MAX_TOKENIZERS:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        try:
            return await asyncio.shield(future)  # one that goes away ends it for nobody else
        except ZooError as error:
            raise ApiError(500, f"The files of model {model.name!r} cannot be read: {error}") from None

    async def _read_manifest(self) -> None:
        stamp = manifest_stamp(self._zoo)
        if stamp is None or stamp == self.stamp:
            return
        try:
            zoo = await self.run(lambda: Zoo.open(self._zoo))
        except ZooError as error:
            raise ApiError(500, f"The zoo cannot be read: {error}") from None
        created = stamp[0] // 10**9
        self._records = {
            name: ServedModel(
                name,
                record.source.base,
                created,
                zoo.path / "tokenizers" / record.tokenizer,
                sampling_defaults(record.generation_defaults) if self._defaults else {},
            )
            for name, record in zoo.manifest.models.items()
        }
        self.stamp, self.manifest = stamp, zoo.manifest
