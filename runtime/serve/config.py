"""Settings of an engine: one frozen object, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal, get_args

from blockzoo.engines.choose import Backend
from blockzoo.engines.kv_pages import KVChoice
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.api.request import KVReuse
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.zoo.available_memory import available_memory

_DEFAULT_KV_BYTES = 2 << 30
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000
"""Of a tenant."""
MOST_WORKERS = 64
MAX_PROMPT_LOGITS = 128
"""Prompt tokens of a step that may have log-probabilities: each takes a row of logits."""

Policy = Literal["hit-first", "fair"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds, shares and order; see `EngineConfig`.

    With `hit-first` a request's wait depends on what others of its tenant cached; with `fair` not.
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024
    policy: Policy = "hit-first"
    ageing_s: float = 2.0  # who has waited longer goes ahead of any cache hit, in order of arrival
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # by tenant; 1 where there is none
    max_step_seconds: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError naming the setting that is out of range."""
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs "
                f"({self.max_num_seqs}): each running sequence needs a token per step; raise it"
            )
        if self.policy not in ("hit-first", "fair"):
            raise ValueError(f"schedule policy is {self.policy!r}, expected 'hit-first' or 'fair'")
        if not self.ageing_s >= 0:
            raise ValueError(f"ageing_s is {self.ageing_s}, expected seconds, at least 0")
        if not isinstance(self.tenant_weights, Mapping):
            raise ValueError(f"tenant_weights is {self.tenant_weights!r}, expected a weight by tenant")
        for name, weight in self.tenant_weights.items():
            is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not is_number or not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
                raise ValueError(
                    f"tenant_weights[{name!r}] is {weight!r}, expected a number from {LEAST_WEIGHT} to "
                    f"{MOST_WEIGHT}"
                )
        if self.max_step_seconds is not None and not self.max_step_seconds > 0:
            raise ValueError(f"max_step_seconds is {self.max_step_seconds}, expected above 0, or None")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine serves a zoo.

    Attributes:
        backend: "openvino" (the CPU), "reference" (torch, on the CPU or a GPU), "tensorrt" (the
            zoo's plans on an NVIDIA GPU); None: openvino.
        device: of the torch backends: "cpu", "cuda" or "cuda:<n>"; None: a GPU where there is one.
        precision: "f32" or "bf16"; None takes bf16 where the CPU computes it in hardware. What a seed
            promises depends on it (`SamplingParams`).
        int8_activations: round activations to 8 bits where they are multiplied with quantized weights (all
            else in f32); needs a CPU with VNNI. None: where most of the zoo's weights are quantized, no
            precision is given and the CPU is faster so.
        kv_precision: "u8" keeps K and V in 8 bits, with a scale and a zero for each token and head: 0.53 of
            bf16's bytes with heads of 128, 0.56 with heads of 64. "auto": where zoo-compile found all models
            of the zoo to lose no more by that than by bf16. "f32" and "f16" go with the precision f32, "bf16"
            with bf16. None: f16 beside int8_activations, else the precision.
        kv_cache_bytes: size of the KV pool, touched only as it fills; None: 2 GiB, or a quarter of the
            memory that is available (to its control group) where that is less. Split between KV geometries
            by what a token takes in all layers of their models.
        adapter_cache_bytes: adapters kept ready for when they are needed again, least recently used dropped
            first; those of running requests come on top.
        enable_lora: let all engines take LoRAs on every projection, so that a LoRA that comes later
            (`LLMEngine.reload`) needs no new engines. False: where the zoo has some.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: new tokens in one step, all sequences together.
        max_waiting: requests that may wait. Beyond it a tenant's are refused as overloaded once its share of
            as many wait: a newcomer's never are because of others' (`tenants.check_queue`).
        tenant_weights: how much more than 1 (or less, 0.001 to 1000) of the engine a tenant gets where
            others want it too: of slots, pages, prefill and the waiting queue. A tenant is a model's name,
            or what `LLMEngine.prepare` is told.
        max_step_seconds: how long a step may take in which a prompt is computed while others decode or other
            tenants have prompts: it then takes fewer tokens, but at least 32. None: no limit.
        max_model_len: prompt and generated tokens of a request; None: what the model and the pool allow.
        max_request_seconds: a request that takes longer ends with an error; None: no limit.
        prefix_caching: keep and reuse the KV of finished prompts.
        boundary_cache_bytes: of hidden states kept where models part, so that a prompt that another model
            has run starts there (needs prefix_caching); 0 keeps none. Touched only as it fills: with
            kv_sharing "model" by published documents alone.
        kv_reuse: what requests get that do not say (`LLMEngine.prepare`). With "off" none may ask for more.
        published_kv_share: of the KV pool, 0 to 1, that published documents may hold: their pages are never
            evicted, so the rest is what requests have.
        kv_cache_dir: folder that keeps the KV of published documents for the next start; None: nowhere. Who
            can write there decides what the models read: guard it like the zoo.
        kv_cache_dir_bytes: of its files; those used longest ago go first.
        approximate: how requests with kv_reuse="approx" reuse KV of equal words behind other ones: those of
            whoever asked before in their scope, who thereby can change answers. None refuses such requests,
            unless kv_reuse is "approx": then the defaults. Fields of `ReuseConfig` in a mapping are taken
            too. Needs prefix_caching.
        calibrated: where `approximate` says nothing of its own, models reuse KV as zoo-calibrate found for
            them; those for which nothing was near enough compute such requests exactly.
        kv_sharing: who may use KV that a request left: with "model" requests to the same model with the same
            scope (which is a claim of the client, unless a gateway sets it); with "scope" also those to other
            models, which saves memory and time where models share layers, and lets their users find out (by
            timing) what others of the scope asked.
        schedule: of a tenant's waiting requests "hit-first" prefers those with cached prefixes; "fair" goes
            by arrival (then nobody can tell from the own waiting time what others have cached).
        speculate: with "auto" tokens are guessed ahead (from the prompt, earlier answers of the scope, the
            form an answer must have) and run with a step where that is hoped to be faster; answers are the
            same. "off" never does.
        num_threads: compute threads; None leaves the backend's choice.
        max_span_layers: cut engines after this many layers; None fuses what no model splits.
        strict: refuse to start where some model of the zoo cannot be served, instead of leaving it out.
        workers: processes over which the blocks are spread, each with num_threads (None: as many as there
            are processors, which they have in turn); None: the blocks are in this process. With workers, the
            backend is openvino; where models come or go, other workers take the place of all.
        move_spans_every_s: how often the rates of models are looked at, and spans moved to other workers
            where that pays; 0: they stay where they are.
        worker_memory_bytes: that the weights in each and the whole KV pool may take; None: what is available.
        worker_cores: of each machine, that its workers have together; None: all.
        ray_address: of a running Ray, on whose machines workers are actors, of num_threads CPUs and
            worker_memory_bytes each; they see this package and the zoo under the same paths. None: workers
            are processes of this machine.
        worker_interface: IPv4 address of this machine, on which the head of workers listens; they listen on
            those of theirs that lead there. None: loopback.
        worker_folder: of this user alone, in which workers wait for another engine of these settings when
            this one ends without closing them (`docs/cluster.md`); None: they end with it.
        worker_delays_ms: for tests and benchmarks: by worker, how far away it is taken to be from the head,
            one way. What goes over its links is held up for so long; None: nothing is.
    """

    backend: Backend | None = None
    device: str | None = None
    precision: Literal["f32", "bf16"] | None = None
    int8_activations: bool | None = None
    kv_precision: KVChoice | None = None
    kv_cache_bytes: int | None = None
    adapter_cache_bytes: int = 256 << 20
    enable_lora: bool = False
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    max_step_seconds: float | None = 0.25
    max_model_len: int | None = None
    max_request_seconds: float | None = None
    prefix_caching: bool = True
    boundary_cache_bytes: int = 256 << 20
    kv_reuse: KVReuse = "exact"
    published_kv_share: float = 0.5
    kv_cache_dir: str | None = None
    kv_cache_dir_bytes: int = 4 << 30
    approximate: ReuseConfig | None = None
    calibrated: bool = True
    kv_sharing: Literal["model", "scope"] = "model"
    schedule: Policy = "hit-first"
    speculate: Literal["auto", "off"] = "off"
    num_threads: int | None = None
    max_span_layers: int | None = None
    strict: bool = False
    workers: int | None = None
    worker_memory_bytes: int | None = None
    worker_cores: int | None = None
    move_spans_every_s: float = 30.0
    ray_address: str | None = None
    worker_interface: str | None = None
    worker_folder: str | None = None
    worker_delays_ms: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.backend is not None and self.backend not in get_args(Backend):
            expected = ", ".join(get_args(Backend))
            raise InvalidRequestError(f"backend is {self.backend!r}; expected {expected} or None")
        if self.precision not in (None, "f32", "bf16"):
            raise InvalidRequestError(f"precision is {self.precision!r}; expected f32, bf16 or None")
        if self.kv_precision not in (None, *get_args(KVChoice)):
            expected = ", ".join(get_args(KVChoice))
            raise InvalidRequestError(f"kv_precision is {self.kv_precision!r}; expected {expected} or None")
        for name in (
            "kv_cache_bytes",
            "max_model_len",
            "num_threads",
            "max_span_layers",
            "workers",
            "worker_memory_bytes",
            "worker_cores",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} is {value}; expected at least 1, or None")
        if self.boundary_cache_bytes < 0:
            raise InvalidRequestError(
                f"boundary_cache_bytes is {self.boundary_cache_bytes}; expected at least 0"
            )
        if not 0 <= self.published_kv_share <= 1:
            raise InvalidRequestError(f"published_kv_share is {self.published_kv_share}; expected 0 to 1")
        if self.kv_cache_dir_bytes < 1:
            raise InvalidRequestError(f"kv_cache_dir_bytes is {self.kv_cache_dir_bytes}; expected at least 1")
        try:
            self.scheduler()
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None
        if self.kv_reuse not in get_args(KVReuse):
            expected = ", ".join(get_args(KVReuse))
            raise InvalidRequestError(f"kv_reuse is {self.kv_reuse!r}; expected {expected}")
        self._resolve_approximate()
        self._check_workers()
        if self.kv_sharing not in ("model", "scope"):
            raise InvalidRequestError(f"kv_sharing is {self.kv_sharing!r}; expected model or scope")
        if self.speculate not in ("auto", "off"):
            raise InvalidRequestError(f"speculate is {self.speculate!r}; expected auto or off")
        if self.max_request_seconds is not None and not self.max_request_seconds > 0:
            raise InvalidRequestError(f"max_request_seconds is {self.max_request_seconds}; expected above 0")
        if not 0 <= self.move_spans_every_s < math.inf:
            raise InvalidRequestError(f"move_spans_every_s is {self.move_spans_every_s}; expected at least 0")

    def _check_workers(self) -> None:
        if self.workers is None:
            others = "memory_bytes", "cores", "interface", "folder", "delays_ms"
            for name in ("ray_address", *(f"worker_{other}" for other in others)):
                if getattr(self, name) is not None:
                    raise InvalidRequestError(f"{name} is set and workers is not: set both, or none")
            return
        if self.workers > MOST_WORKERS:
            raise InvalidRequestError(f"workers is {self.workers}; expected at most {MOST_WORKERS}")
        if self.ray_address is not None and self.num_threads is None:
            raise InvalidRequestError("ray_address needs num_threads: how many of Ray's CPUs a worker takes")
        self._check_interface()
        if self.worker_folder is not None:
            if self.ray_address is not None or self.worker_delays_ms is not None:
                raise InvalidRequestError("worker_folder is for workers of this machine: leave it out")
            if not Path(self.worker_folder).is_dir():
                raise InvalidRequestError(f"worker_folder is {self.worker_folder!r}; expected a folder")
        delays = self.worker_delays_ms
        if delays is not None and (len(delays) != self.workers or not all(0 <= ms < 1e4 for ms in delays)):
            raise InvalidRequestError(
                f"worker_delays_ms is {delays}; expected one for each of {self.workers} workers, 0 to 10000"
            )
        if self.backend not in (None, "openvino"):
            raise InvalidRequestError(f"backend is {self.backend!r}; workers have openvino: leave one out")

    def _check_interface(self) -> None:
        if self.worker_interface is None:
            return
        try:
            usable = not IPv4Address(self.worker_interface).is_unspecified
        except ValueError:
            usable = False
        if not usable:
            raise InvalidRequestError(
                f"worker_interface is {self.worker_interface!r}; expected the IPv4 address of one interface"
            )

    def _resolve_approximate(self) -> None:
        given = self.approximate
        if given is None and self.kv_reuse == "approx":
            given = ReuseConfig()
        if isinstance(given, Mapping):  # as it comes through JSON
            try:
                given = ReuseConfig(**given)
            except (TypeError, ValueError) as error:
                raise InvalidRequestError(f"approximate: {error}") from error
        if given is not None and not self.prefix_caching:
            raise InvalidRequestError(
                "approximate reuse needs prefix_caching: allow it, or use kv_reuse exact"
            )
        object.__setattr__(self, "approximate", given)  # frozen for everybody else

    def scheduler(self) -> SchedulerConfig:
        """The scheduler's part. Raises ValueError naming the setting that is out of range."""
        return SchedulerConfig(
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.max_waiting,
            policy=self.schedule,
            tenant_weights=self.tenant_weights,
            max_step_seconds=self.max_step_seconds,
        )

    def resolved_kv_bytes(self) -> int:
        """The pool's size in bytes."""
        if self.kv_cache_bytes is not None:
            return self.kv_cache_bytes
        return min(_DEFAULT_KV_BYTES, available_memory() // 4)
