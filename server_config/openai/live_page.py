"""The page at `/`: one file, and what it asks for about once a second while somebody looks at it.

What it asks for is looked up once a second (figures) or every three (models) at most, however many ask.
Who has a key for some of the models sees these alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blockzoo.server_config.openai.catalog import Catalog, ServedModel
from blockzoo.server_config.openai.http import Exchange
from blockzoo.server_config.openai.keys import Key
from blockzoo.server_config.openai.status import Recent, Status
from blockzoo.zoo.chat_files import templates
from blockzoo.zoo.errors import CheckpointError
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.sharing_page import SCRIPT, STYLES, sharing_data
from blockzoo.zoo.summary import part_of
from blockzoo.zoo.web_page import assemble, part

_LOOK_S = 3.0  # how old the list of models may be
_MAX_DRAWN = 16  # kept
_PACKAGE = "blockzoo.server_config.openai"
_SCRIPTS = ("server.js", "figures.js", "playground.js", "page.js")
_FIGURES = (
    "requests_running",
    "requests_waiting",
    "requests_arrived_total",
    "generated_tokens_total",
    "prompt_tokens_total",
    "cached_tokens_total",
    "pages_total",
    "pages_used",
    "pages_cached",
    "engine_calls_total",
    "mean_batch_per_block",
    "models_left_out",
)
_SAMPLE = re.compile(r'^blockzoo_(\w+)(?:\{model="([^"]*)"\})? (\S+)$', re.MULTILINE)
_BY_MODEL = ("model_requests_running", "model_requests_waiting")


_PRIVATE = {"cache-control": "no-store"}


@dataclass(frozen=True, slots=True)
class _Zoo:
    """What is served, and the manifest that tells about it."""

    models: dict[str, ServedModel]
    manifest: Manifest
    stamp: tuple[int, int] | None

    def seen_by(self, key: Key | None) -> tuple[str, ...]:
        """The models that somebody may see."""
        return tuple(name for name in self.models if key is None or key.models is None or name in key.models)

    def version(self, names: tuple[str, ...]) -> str:
        """Changes with what is to be shown of some models."""
        return hashlib.sha256(repr((self.stamp, names)).encode()).hexdigest()[:16]


class LivePage:
    """The page and its answers. Of one event loop.

    Args:
        title: the zoo's name.
        with_keys: whether requests need a key.
    """

    def __init__(self, title: str, catalog: Catalog, status: Status, with_keys: bool) -> None:
        self._title, self._catalog, self._status = title, catalog, status
        self._zoo: Recent[_Zoo] = Recent(self._look, _LOOK_S)
        self._drawn: OrderedDict[str, bytes] = OrderedDict()  # by version
        self._drawing = asyncio.Lock()
        styles, scripts = [part(_PACKAGE, "page.css")], [part(_PACKAGE, name) for name in _SCRIPTS]
        page, policy = assemble(part(_PACKAGE, "page.html"), [*STYLES, *styles], [SCRIPT, *scripts])
        self._page = page.replace("<!--KEYS-->", "asked" if with_keys else "none").encode()
        self._headers = {
            "content-security-policy": f"{policy}; frame-ancestors 'none'",
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-cache",
        }

    async def show(self, exchange: Exchange) -> None:
        """Answer with the page itself, which holds nothing of the zoo."""
        await exchange.data(self._page, "text/html; charset=utf-8", headers=self._headers)

    async def show_zoo(self, exchange: Exchange) -> None:
        """Answer with the models and what they share. Raises ApiError."""
        zoo = await self._zoo()
        names = zoo.seen_by(exchange.key)
        version = zoo.version(names)
        async with self._drawing:
            if version not in self._drawn:
                self._drawn[version] = await self._catalog.run(partial(self._draw, zoo, names, version))
                if len(self._drawn) > _MAX_DRAWN:
                    self._drawn.popitem(last=False)
            self._drawn.move_to_end(version)
            data = self._drawn[version]
        await exchange.data(data, "application/json", headers=_PRIVATE)

    async def show_figures(self, exchange: Exchange) -> None:
        """Answer with the engine's figures now. Raises ApiError."""
        zoo = await self._zoo()
        names = zoo.seen_by(exchange.key)
        found = read_figures((await self._status.metrics()).decode(), names)
        at = round(self._status.metrics_read, 3)
        await exchange.json({"at": at, "zoo": zoo.version(names), **found}, headers=_PRIVATE)

    async def _look(self) -> _Zoo:
        models = await self._catalog.models()
        return _Zoo(models, self._catalog.manifest, self._catalog.stamp)

    def _draw(self, zoo: _Zoo, names: tuple[str, ...], version: str) -> bytes:
        data = sharing_data(part_of(zoo.manifest, names))
        chats: dict[Path, bool] = {}
        for model in data["models"]:
            folder = zoo.models[model["name"]].folder
            if folder not in chats:
                chats[folder] = _has_template(folder)
            model["chat"] = chats[folder]
        return json.dumps({"zoo": version, "title": self._title, **data}, ensure_ascii=False).encode()


def read_figures(metrics: str, names: Collection[str]) -> dict[str, Any]:
    """Figures out of metrics in Prometheus' form: those of the engine, and [running, waiting] of each of the
    models that has requests."""
    found: dict[str, Any] = dict.fromkeys(_FIGURES, 0)
    models: dict[str, list[float]] = {}
    for sample in _SAMPLE.finditer(metrics):
        name, model, value = sample.groups()
        if model is None and name in found:
            found[name] = float(value)
        elif name in _BY_MODEL and model in names and float(value):
            models.setdefault(model, [0, 0])[_BY_MODEL.index(name)] = float(value)
    return {**found, "models": models}


def _has_template(folder: Path) -> bool:
    try:
        return bool(templates(folder))
    except CheckpointError:  # who asks the model is told
        return False
