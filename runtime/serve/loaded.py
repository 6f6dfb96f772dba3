"""A zoo that is loaded: what serves its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from blockzoo.engines.base import Embedding, Engine
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.exec.adapters import AdapterCache
from blockzoo.runtime.exec.executor import Executor
from blockzoo.runtime.exec.interface import StepExecutor
from blockzoo.runtime.exec.topology import ChainPlan, Family, Span, Topology
from blockzoo.runtime.kv.boundary import BoundaryCache
from blockzoo.runtime.kv.prefix_cache import KVCache
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.rope import RopeConfig

if TYPE_CHECKING:
    from blockzoo.runtime.serve.over_workers import Workers

RopeTables = Mapping[tuple[RopeConfig, int], tuple[np.ndarray, np.ndarray]]
"""By settings and head_dim, (cos, sin) float32 [positions, head_dim]."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What zoo-calibrate found of approximate reuse; None: nothing that is near enough is fast enough."""

    reuse: ReuseConfig | None


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A chain that guesses for a model, and what zoo-compile found of it.

    Attributes:
        chain_index, key: of its chain in the topology.
        is_model: whether it is another model's, with K and V of its own, and not over the model's.
        acceptance: how often its first guess, and those behind it, come true where those before do.
        cost: of a step of one row, relative to one of the model.
    """

    chain_index: int
    key: str
    is_model: bool
    acceptance: tuple[float, ...]
    cost: float


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a request needs to know of its model."""

    name: str
    chain_index: int
    chain: ChainPlan
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    max_len: int  # tokens of prompt and answer together
    plain_rope: bool  # rotating a key by a difference of positions moves it there
    generation_defaults: Mapping[str, float | int]  # of its maker, as fields of SamplingParams
    calibrated: Calibrated | None = None  # None: nobody asked
    surrogate: Surrogate | None = None


@dataclass(frozen=True, slots=True)
class LoadedZoo:
    """A zoo ready to run: one executor and one KV cache per family, one entry per model.

    Attributes:
        models: those served.
        manifest: of these, and of models that are no more, whose requests are still under way.
        gone: names of the latter in the manifest.
        engines, blocks, embeddings, ropes: what it is made of.
        chain_index: of each chain, by what stands for it (`ChainPlan.key`).
        left_out: models of the zoo that are not served, and why.
        unsound: those of them whose files are whole: what they compute is not.
        workers: that have the engines; None: they are here.
    """

    models: Mapping[str, LoadedModel]
    manifest: Manifest
    topology: Topology
    executors: Mapping[Family, StepExecutor]
    caches: Mapping[Family, KVCache]
    boundaries: BoundaryCache
    adapters: AdapterCache
    engines: Mapping[Span, Engine]
    blocks: Mapping[str, Block]
    embeddings: Mapping[str, Embedding]
    ropes: RopeTables
    chain_index: Mapping[str, int]
    engine_facts: Mapping[str, object]
    gone: frozenset[str] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)
    unsound: frozenset[str] = frozenset()
    workers: Workers | None = None

    def close_workers(self) -> None:
        """End the workers, where there are some."""
        if self.workers is not None:
            self.workers.group.close()

    @property
    def local_executors(self) -> Mapping[Family, Executor]:
        """The executors of a zoo whose engines are here."""
        return {family: each for family, each in self.executors.items() if isinstance(each, Executor)}


class UnsoundError(Exception):
    """Some chains cannot be run; why, by the model."""

    def __init__(self, models: Mapping[str, Exception]) -> None:
        super().__init__(", ".join(models))
        self.models = models
