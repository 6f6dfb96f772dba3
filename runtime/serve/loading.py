"""From a zoo on disk to engines, pools and tokenizers, before the first request.

What is wrong with one model is no reason not to serve the others: models with damaged files, of spans that do
not compile and with logits that are not finite are left out, by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from blockzoo.engines.base import Engine, EngineMaker
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.exec.adapters import AdapterCache
from blockzoo.runtime.exec.topology import Span
from blockzoo.runtime.kv.boundary import BoundaryCache
from blockzoo.runtime.serve.config import EngineConfig
from blockzoo.runtime.serve.loaded import LoadedModel, LoadedZoo, UnsoundError
from blockzoo.runtime.serve.making import Making, Progress, check_all
from blockzoo.runtime.serve.model_files import ModelFiles, reason
from blockzoo.zoo.store import Zoo

_LOG = logging.getLogger(__name__)


def making(zoo: Zoo, config: EngineConfig, maker: EngineMaker) -> Making:
    """What makes a loaded zoo, and those that follow it as the zoo changes."""
    boundary_bytes = config.boundary_cache_bytes if config.prefix_caching else 0
    return Making(
        zoo.path,
        config,
        maker,
        BoundaryCache(boundary_bytes, maker.arrays.rows_like),
        AdapterCache(zoo.read_adapter, maker.arrays, config.adapter_cache_bytes),
        config.resolved_kv_bytes(),
    )


def load_zoo(zoo: Zoo, make: Making, progress: Progress | None = None) -> LoadedZoo:
    """Compile all spans, allocate the pools and run every engine once; for all models that can be served.

    Those left out are logged as warnings.

    Raises:
        InvalidRequestError: the KV budget holds no page for some family, or the zoo has no models.
        StoreError, TokenizerError, EngineError, InvalidRequestError: no model can be served; or, where
            `config.strict`, some model cannot.
    """
    if not zoo.manifest.models:
        raise InvalidRequestError(f"{zoo.path} holds no models; add one with zoo-compile")
    files = ModelFiles(zoo, surrogates=make.with_surrogates)
    problems: dict[str, Exception] = {
        name: error for name in zoo.manifest.models if (error := files.damage(name)) is not None
    }
    damaged = frozenset(problems)
    engines: dict[Span, Engine] = {}
    while True:
        _check_enough(zoo, problems, make.config.strict)
        try:
            loaded = _load(zoo.without(problems), files, make, engines, progress)
            break
        except UnsoundError as error:  # what models share depends on which there are: planned again
            problems |= error.models
    files.drop_pages()
    left_out = {name: reason(error, zoo.path) for name, error in sorted(problems.items())}
    for name, why in left_out.items():
        _LOG.warning("model %s is left out: %s", name, why)
    return replace(loaded, left_out=left_out, unsound=frozenset(problems) - damaged)


def _check_enough(zoo: Zoo, problems: Mapping[str, Exception], strict: bool) -> None:
    """Raise the first of the problems, which says all, where no model is left, or one must not be missing."""
    if not problems or (len(problems) < len(zoo.manifest.models) and not strict):
        return
    first, *others = problems.values()
    if all(str(other) == str(first) for other in others):
        raise first
    raise type(first)("; ".join(f"model {name}: {error}" for name, error in problems.items())) from first


def _load(
    zoo: Zoo, files: ModelFiles, make: Making, engines: dict[Span, Engine], progress: Progress | None
) -> LoadedZoo:
    """Load a zoo of undamaged models; `engines`: those compiled so far. Raises UnsoundError."""
    topology = make.plan(zoo.manifest)
    make.pages(topology)  # told before anything is compiled
    make.compile(topology, engines, files.blocks.__getitem__, progress)
    tokenizers = {name: files.tokenizer(name) for name in zoo.manifest.models}
    loaded = make.put_together(zoo.manifest, (), topology, engines, files.blocks, tokenizers)
    _warn_of_short_pools(zoo, make.config, loaded.models)
    check_all(loaded)
    return loaded


def _warn_of_short_pools(zoo: Zoo, config: EngineConfig, models: Mapping[str, LoadedModel]) -> None:
    """Say which models the pool and not their own (or the configured) length bounds."""
    short: dict[tuple[int, int], list[str]] = {}  # by tokens that fit, and the model's own
    for name, model in models.items():
        own = zoo.manifest.models[name].config.max_position_embeddings
        if model.max_len < min(own, config.max_model_len or own):
            short.setdefault((model.max_len, own), []).append(name)
    for (fits, own), names in sorted(short.items()):
        _LOG.warning(
            "the KV pool holds %d tokens of one sequence of %s, which could take %d: longer requests are "
            "refused; raise kv_cache_bytes (zoo-serve --kv-cache-gb), or set max_model_len (--max-model-len) "
            "to what you need",
            fits,
            ", ".join(names),
            own,
        )
