"""`manifest.json`: models -> chains -> blocks -> plans, read strictly."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from blockzoo.zoo.blocks import (
    PROJECTIONS,
    AdapterSpec,
    BlockSpec,
    Dtype,
    HeadSpec,
    StoredDtype,
    chain_specs,
    tensor_shapes,
)
from blockzoo.zoo.errors import CheckpointError, ManifestError
from blockzoo.zoo.generation_defaults import generation_defaults
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.names import is_name
from blockzoo.zoo.packing import GROUP, LIMITS, QuantizedDtype
from blockzoo.zoo.strict_json import decode, encode

SCHEMA_VERSION = 2

TensorRTLibrary = Literal["tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True, slots=True)
class OptimizationProfileRecord:
    """A token count range that an engine is built and tuned for: min <= opt <= max."""

    name: str
    min: int
    opt: int
    max: int


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """What a compiler sees of a block: its shape class and how it is compiled.

    For OpenVINO the plan is this record: engines are compiled from it when they are loaded.
    """

    backend: Literal["openvino"]
    spec: BlockSpec
    dtype: StoredDtype
    profiles: tuple[OptimizationProfileRecord, ...]
    versions: dict[str, str]

    @property
    def kind(self) -> str:
        """The kind of block: embed, attn, ffn or head."""
        return self.spec.kind


@dataclass(frozen=True, slots=True)
class PlanTensorRecord:
    """An input or output of a serialized plan; in the shape, -1 is the number of rows and -2 that of the
    adapters' ranks."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorRTPlanRecord:
    """A serialized TensorRT plan in the zoo: `plans/tensorrt/<key>`, the key naming what it was built from.

    One plan serves all blocks of a shape class, unless their weights are baked in.
    """

    part: Literal["attn_pre", "attn_post", "ffn", "head"]
    """Which part of a block; attention itself runs between the first two."""
    spec: BlockSpec
    """The shape class: the operator without what its network does not depend on."""
    precision: Literal["bf16", "f32"]
    target: str
    """The compute capability it runs on: "sm89"."""
    library: TensorRTLibrary
    library_version: str
    profiles: tuple[OptimizationProfileRecord, ...]
    inputs: tuple[PlanTensorRecord, ...]
    outputs: tuple[PlanTensorRecord, ...]
    scratch_bytes: dict[str, int]
    """Device memory that a run needs for activations, by profile."""
    workspace_bytes: int | None
    """The bound on scratch that it was built under; None: none."""
    baked_block: str | None
    """The block whose weights are constants of the plan; None: weights are inputs."""
    lora: tuple[str, ...]
    """Projections with adapters as inputs."""
    max_lora_ranks: int
    """Ranks of all adapters of a call together that the plan has room for; 0 without `lora`."""
    num_bytes: int
    sha256: str
    """Of the plan's bytes."""
    build_seconds: float


@dataclass(frozen=True, slots=True)
class QuantizedRecord:
    """What a quantized block was made of: models that share the one share the other."""

    source: str
    """Id of the block with its weights as they were given, which need not be stored."""
    dtype: QuantizedDtype
    """What was asked for: a matrix that no group of 4 bits divides has 8."""
    group: int = field(default=GROUP, metadata={"added": True})
    """Columns that share a scale; 0: all of a row, in 8 bits."""


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One stored block."""

    spec: BlockSpec
    dtype: StoredDtype
    """Of its largest tensor."""
    num_bytes: int
    """Of its tensors (a tied head's matrix is counted with the embed block)."""
    tied_to: str | None
    """A tied head's embed block."""
    plan: str
    latency_us: dict[int, float] | None
    """Measured time of the block alone by token count."""
    latency_block: str | None
    """The block of the same plan that was measured."""
    quantized: QuantizedRecord | None = field(default=None, metadata={"added": True})
    """Of a block that was quantized as a whole."""

    @property
    def is_quantized(self) -> bool:
        """Whether its matrices are in 8 or 4 bits."""
        return self.dtype in LIMITS

    def with_latency(self, block: str | None, latency_us: dict[int, float] | None) -> "BlockRecord":
        """The record with measured times, of itself or of another block of its plan."""
        return replace(self, latency_us=latency_us, latency_block=block)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One stored adapter; its tensors lie where those of blocks do."""

    spec: AdapterSpec
    dtype: StoredDtype
    """Of its largest tensor."""
    num_bytes: int


CLEAR_AGREEMENT = 0.99
"""Least share of equal top tokens where those are no ties."""
_LEAST_LOSS = 1e-12  # what rounding in f32 loses at least


@dataclass(frozen=True, slots=True)
class LossFigures:
    """What one computation of a model loses against another, over the positions of a text."""

    kl: float
    """Mean Kullback-Leibler divergence of the vocabulary probabilities, in nats."""
    max_relative_error: float
    """Largest logit difference of any position, over the largest logit magnitude of that position."""
    top1: float
    """Share of positions with the same likeliest token."""


@dataclass(frozen=True, slots=True)
class LossRecord:
    """What a model loses as it is stored, in f32, beside what bf16 alone loses of the checkpoint."""

    stored: LossFigures
    bf16: LossFigures
    """Of the oracle with roundings to bf16, on the same text."""
    clear_top1: float
    """As `top1` of `stored`, without ties: positions at which bf16 moves a logit by as much as lies between
    the checkpoint's two likeliest tokens."""
    ties: float
    """The share of those."""
    num_tokens: int

    @property
    def excess(self) -> float:
        """Of the loss over what is borne: up to 1 passes. It grows about as squared errors do, so that those
        of several blocks add up."""
        found, borne = self.stored, self.bf16
        return max(
            found.kl / max(borne.kl, _LEAST_LOSS),
            (found.max_relative_error / max(borne.max_relative_error, _LEAST_LOSS)) ** 2,
            (1 - self.clear_top1) / (1 - CLEAR_AGREEMENT),
        )


@dataclass(frozen=True, slots=True)
class RecoveryRecord:
    """A full checkpoint that was taken apart: some blocks are blocks of other models plus adapters."""

    own_blocks: dict[int, str]
    """Position in the chain -> id of the checkpoint's own block there, which is not stored."""
    rank: int
    """The largest rank found."""
    rounding: float
    """Largest ratio of what was left out to the rounding noise expected of the weights' dtype (in energy, so
    squared); about 1 when the checkpoint is the base with a LoRA merged into it, and nothing else."""
    given_back: tuple[int, ...] = field(default=(), metadata={"added": True})
    """Positions of blocks that were taken apart too and are stored whole, as the model lost too much."""


@dataclass(frozen=True, slots=True)
class EquivalenceRecord:
    """A model in which other models' blocks stand for some of its own, on its user's wish.

    Scores: of the model as served against the model with its own blocks, in f32, over a probe text.
    """

    own_blocks: dict[int, str]
    """Position in the chain -> id of the model's own block there, which is not stored."""
    threshold: float
    """Asked for: the least `cosine`."""
    cosine: float
    """Mean cosine of the vocabulary probabilities."""
    kl: float
    """Mean Kullback-Leibler divergence, in nats."""
    top1: float
    """Share of positions with the same likeliest token."""
    num_tokens: int
    probe: str
    """Name of the probe file; "built-in" without one."""
    loss: LossRecord | None = field(default=None, metadata={"added": True})
    """The same, beside what bf16 alone loses."""


@dataclass(frozen=True, slots=True)
class DeltaRecord:
    """A full fine-tune of which blocks are stored as what they add to other models' blocks: adapters.

    Embedding and head may be the other model's as they are.
    """

    own_blocks: dict[int, str]
    """Position in the chain -> id of the model's own block there, which is not stored."""
    rank: int
    """The largest."""
    share: float
    """Bytes of the adapters over those of the model's own blocks."""
    max_kl: float | None
    """Asked for: the largest divergence; None: a share of `tuned_kl`."""
    loss: LossRecord
    """Of the model as stored against the model with its own blocks, in f32, over a probe text."""
    probe: str
    """Name of the probe file; "built-in" for text that the model wrote."""
    tuned_kl: float | None = field(default=None, metadata={"added": True})
    """What tuning changed there: the divergence of the other models' blocks without differences, in nats."""


@dataclass(frozen=True, slots=True)
class QuantizationFigures:
    """How near a model is to itself with its weights as they were given, computed in f32."""

    greedy_agreement: float
    """Share of tokens that it would choose too, along the greedy answers of the other to built-in prompts."""
    kl: float
    """Mean Kullback-Leibler divergence over the probe text, in nats."""
    top1: float
    """Share of positions of the probe text with the same likeliest token."""
    perplexity: float
    """Of the probe text."""


@dataclass(frozen=True, slots=True)
class QuantizationRecord:
    """A model whose blocks were quantized."""

    weights: Literal["int8", "int4", "auto"]
    """As asked for."""
    max_kl: float
    """The bound on `kl`, of the quantized weights computed in f32."""
    perplexity: float
    """Of the probe text with the weights as they were given, in f32."""
    figures: dict[str, QuantizationFigures]
    """"f32": the quantized weights, computed in f32; "bf16", "int8 activations": as they are served; "given
    bf16": what bf16 alone loses. Empty: not verified."""
    num_tokens: int
    """Of the probe text."""
    probe: str
    """Name of the probe file; "built-in" without one."""
    group: int = field(default=GROUP, metadata={"added": True})
    """Columns that share a scale, where that can be; 0: all of a row, in 8 bits."""
    group_made: int | None = field(default=None, metadata={"added": True})
    """The most that do in matrices of several groups a row; 0: there are none. None: not noted."""
    min_top1: float = field(default=0.0, metadata={"added": True})
    """"auto": the bound on `top1`, of the quantized weights computed in f32."""


@dataclass(frozen=True, slots=True)
class ReuseSettings:
    """How KV is reused approximately: fields of the runtime's `ReuseConfig`."""

    selector: Literal["query", "head-of-run"]
    unit: Literal["line", "page", "token"]
    recompute: float
    edit_recompute: float
    pointed: float
    head: int
    edit: int
    refresh: int
    guard: float = field(default=0.0, metadata={"added": True})


@dataclass(frozen=True, slots=True)
class ReusePoint:
    """What one way to reuse KV approximately gives and costs, against full prefills in f32."""

    settings: ReuseSettings
    computed: float
    """Share of the prompts' tokens that was computed."""
    speedup: float
    """How many times faster the first token came: the median of the prompts of which KV was reused."""
    agreement: float
    """Share of equal likeliest tokens along the full prefill's answers."""
    kl: float
    """Mean Kullback-Leibler divergence there, in nats."""


@dataclass(frozen=True, slots=True)
class ReuseRecord:
    """How a model reuses KV approximately, as zoo-calibrate chose it."""

    settings: ReuseSettings | None
    """None: not at all, as nothing that was near enough was fast enough."""
    asked: float
    """The least agreement, as a share of that of bf16."""
    least_speedup: float
    bf16_agreement: float
    """Of a full prefill rounded to bf16: what is accepted anyway."""
    bf16_kl: float
    curve: tuple[ReusePoint, ...]
    """All that was tried."""
    num_prompts: int
    num_tokens: int
    """Of the answers compared."""
    prompts: str
    """Name of the file of prompts; "built-in" without one."""


SURROGATES = ("auto", "layers", "int4")
"""What may be asked for besides another model's name: blocks of the model's own, some left out; the same in 4
bits; or what of all pays most."""


@dataclass(frozen=True, slots=True)
class SurrogateRecord:
    """What guesses what a model says next: a cheaper chain, or another model.

    A chain runs over the K and V of the model's own layers, each block with those of the layer at its place.
    So what the model has computed need not be computed again, and what the chain writes is written anew when
    the model checks its guesses. Another model has K and V of its own.
    """

    asked: str
    """One of `SURROGATES`, or a model's name."""
    model: str | None
    """The other model; None: a chain."""
    blocks: dict[int, str]
    """Of a chain: position in the model's -> id of the block that runs there; what lacks is left out."""
    acceptance: tuple[float, ...]
    """Of the first guess and of those behind it: how often each comes true where those before it do."""
    cost: float
    """Of a step of one row, relative to one of the model."""
    speedup: float
    """Hoped for of greedy answers to one request at a time, by these figures."""
    num_guesses: int
    """First guesses that these figures are of."""
    probe: str
    """Name of the probe file; "built-in" without one."""


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """Where a model came from."""

    format: Literal["hf", "gguf", "peft"]
    folder: str
    """Name of the folder or file (not its place on the machine)."""
    dtype: Dtype
    """The dtype in which the weights were given (f32 weights may be stored as bf16 without loss)."""
    converted_to: Dtype | None
    """The dtype asked for at compile time."""
    base: str | None
    """peft: name of the model that the adapter belongs to."""


@dataclass(frozen=True, slots=True)
class VerificationFigures:
    """How near a served chain is to the original checkpoint, at one precision."""

    greedy_agreement: float
    """Share of generated tokens that the original checkpoint would choose too."""
    max_relative_error: float
    """Largest logit difference of any position, over the largest logit magnitude of that position."""


@dataclass(frozen=True, slots=True)
class VerificationRecord:
    """The end-to-end check of a model: its chain against an independent forward of the checkpoint.

    Of a model with an EquivalenceRecord or a QuantizationRecord: the check of its own blocks, before others
    took their place.
    """

    oracle: str
    num_prompts: int
    num_tokens: int
    """Positions compared, over all prompts."""
    tolerance: float
    """Bound on the f32 max_relative_error; of a model of which blocks were recovered, that of bf16."""
    figures: dict[str, VerificationFigures]
    """By precision of the chain; f32 decides, others are reported."""
    rounding_error: float | None
    """Where weights were rounded (a dtype asked for, a replaced tensor): max_relative_error of the oracle
    with the rounded weights against the oracle with the exact ones."""
    same_as: str | None
    """The model with the same chain and adapters whose figures these are."""
    loss: LossRecord | None = field(default=None, metadata={"added": True})
    """Of a model of which blocks were recovered: what decided."""
    kv: LossRecord | None = field(default=None, metadata={"added": True})
    """With K and V in 8 bits, all else in f32. None: not measured."""


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One served model: the block ids of its chain (embed, attn, ffn, ..., head) and its tokenizer."""

    config: ModelConfig
    chain: tuple[str, ...]
    tokenizer: str
    source: SourceRecord
    verification: VerificationRecord | None
    adapters: dict[int, str] = field(default_factory=dict)
    """Position in the chain -> id of the adapter on the block there."""
    recovery: RecoveryRecord | None = None
    equivalence: EquivalenceRecord | None = None
    eos_token_ids: tuple[int, ...] | None = field(default=None, metadata={"added": True})
    """The tokens that end an answer, where they are not those of `config`."""
    generation_defaults: dict[str, float] | None = field(default=None, metadata={"added": True})
    """How tokens are chosen where a request does not say: see `zoo.generation_defaults`."""
    quantization: QuantizationRecord | None = field(default=None, metadata={"added": True})
    reuse: ReuseRecord | None = field(default=None, metadata={"added": True})
    delta: DeltaRecord | None = field(default=None, metadata={"added": True})
    surrogate: SurrogateRecord | None = field(default=None, metadata={"added": True})

    @property
    def block_ids(self) -> tuple[str, ...]:
        """All blocks that it needs: of its chain, and of its surrogate."""
        return self.chain + (() if self.surrogate is None else tuple(self.surrogate.blocks.values()))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self.config.eos_token_ids if self.eos_token_ids is None else self.eos_token_ids

    @property
    def replaced_blocks(self) -> dict[int, str]:
        """Position in the chain -> id of the model's own block, where another model's stands for it."""
        found = self.equivalence or self.delta
        return found.own_blocks if found is not None else {}

    def with_own_blocks(self) -> "ModelRecord":
        """The model as it was before blocks of other models took the place of some."""
        own, deltas = self.replaced_blocks, self.delta.own_blocks if self.delta is not None else {}
        return replace(
            self,
            chain=tuple(own.get(i, block_id) for i, block_id in enumerate(self.chain)),
            adapters={i: key for i, key in self.adapters.items() if i not in deltas},
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    models: dict[str, ModelRecord] = field(default_factory=dict)
    blocks: dict[str, BlockRecord] = field(default_factory=dict)
    plans: dict[str, PlanRecord] = field(default_factory=dict)
    tensorrt_plans: dict[str, TensorRTPlanRecord] = field(default_factory=dict)
    adapters: dict[str, AdapterRecord] = field(default_factory=dict)

    def to_text(self) -> str:
        """The text of `manifest.json`; equal manifests give equal text."""
        return json.dumps(encode(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_text(cls, text: str | bytes, where: str = "manifest.json") -> "Manifest":
        """Read and check a manifest. Raises ManifestError with the place and what was expected."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{where}: not JSON ({error}); compile the zoo again") from error
        version = value.get("schema_version") if isinstance(value, Mapping) else None
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{where}: schema_version is {version!r}, this blockzoo reads {SCHEMA_VERSION}; "
                "compile the zoo again, or use the blockzoo that wrote it"
            )
        manifest = decode(cls, value, where)
        manifest.check(where)
        return manifest

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read `path`. Raises ManifestError; a missing file is the caller's to tell."""
        return cls.from_text(path.read_bytes(), str(path))

    def check(self, where: str) -> None:
        """Check names, and that chains, blocks, ties and plans fit together. Raises ManifestError."""
        for part in ("models", "blocks", "adapters", "tensorrt_plans"):  # whose names are parts of paths
            for name in getattr(self, part):
                if not is_name(name):
                    raise ManifestError(f"{where}.{part}: {name!r:.160} is no name of a file")
        for block_id, block in self.blocks.items():
            here = f"{where}.blocks.{block_id}"
            plan = self.plans.get(block.plan)
            if plan is None:
                raise ManifestError(f"{here}.plan: there is no plan {block.plan!r}")
            if plan.spec != block.spec or plan.dtype != block.dtype:
                raise ManifestError(f"{here}.plan: {block.plan} is the plan of another shape class")
            if (block.tied_to is not None) != (isinstance(block.spec, HeadSpec) and block.spec.tied):
                raise ManifestError(f"{here}.tied_to: {block.tied_to!r} contradicts its spec")
            if block.tied_to is not None and block.tied_to not in self.blocks:
                raise ManifestError(f"{here}.tied_to: there is no block {block.tied_to!r}")
        for name, model in self.models.items():
            self._check_model(f"{where}.models.{name}", model)

    def _check_model(self, here: str, model: ModelRecord) -> None:
        if not is_name(model.tokenizer):
            raise ManifestError(f"{here}.tokenizer: {model.tokenizer!r:.160} is no name of a file")
        if len(model.config.layer_windows) != model.config.num_layers:
            raise ManifestError(f"{here}.config.layer_windows: expected {model.config.num_layers} entries")
        try:
            generation_defaults(model.generation_defaults or {}, here)
        except CheckpointError as error:
            raise ManifestError(str(error)) from None
        chosen = None if model.reuse is None else model.reuse.settings
        if chosen is not None and not (
            all(0 <= share <= 1 for share in (chosen.recompute, chosen.edit_recompute, chosen.pointed))
            and min(chosen.head, chosen.edit, chosen.refresh, chosen.guard) >= 0
        ):
            raise ManifestError(f"{here}.reuse.settings: {chosen} are out of range; calibrate it again")
        specs = chain_specs(model.config)
        if len(model.chain) != len(specs):
            raise ManifestError(f"{here}.chain: expected {len(specs)} blocks, seen {len(model.chain)}")
        for i, (block_id, spec) in enumerate(zip(model.chain, specs, strict=True)):
            if block_id not in self.blocks:
                raise ManifestError(f"{here}.chain[{i}]: there is no block {block_id!r}")
            if self.blocks[block_id].spec != spec:
                raise ManifestError(f"{here}.chain[{i}]: block {block_id} does not fit the model's config")
        tied_to = self.blocks[model.chain[-1]].tied_to
        if tied_to is not None and tied_to != model.chain[0]:
            raise ManifestError(f"{here}.chain: the head is tied to {tied_to}, not to the embed block")
        if model.surrogate is not None:
            self._check_surrogate(f"{here}.surrogate", model, model.surrogate)
        for position, adapter_id in model.adapters.items():
            self._check_adapter(f"{here}.adapters.{position}", model, position, adapter_id)
        for part, found in (("equivalence", model.equivalence), ("delta", model.delta)):
            for position in found.own_blocks if found is not None else ():
                if position >= len(model.chain):
                    raise ManifestError(f"{here}.{part}.own_blocks.{position}: beyond the chain")
        for position in model.recovery.own_blocks if model.recovery is not None else ():
            if position not in model.adapters:
                raise ManifestError(f"{here}.recovery.own_blocks.{position}: there is no adapter there")

    def _check_surrogate(self, here: str, model: ModelRecord, found: SurrogateRecord) -> None:
        shares = (*found.acceptance, found.cost, found.speedup)
        if not found.acceptance or min(shares) < 0 or max(found.acceptance) > 1 or not found.cost > 0:
            raise ManifestError(f"{here}: figures {shares} are out of range; compile it again")
        if found.model is not None:
            if found.model not in self.models:
                raise ManifestError(f"{here}.model: there is no model {found.model!r:.160}")
            return
        ends = {0, *range(len(model.chain) - 3, len(model.chain))}  # embed, last layer, head
        if not ends <= found.blocks.keys() <= set(range(len(model.chain))):
            raise ManifestError(f"{here}.blocks: the embedding, the last layer or the head lacks")
        for position, block_id in found.blocks.items():
            record = self.blocks.get(block_id)
            if record is None or record.spec != self.blocks[model.chain[position]].spec:
                raise ManifestError(f"{here}.blocks.{position}: {block_id!r} cannot stand there")
        if self.blocks[found.blocks[len(model.chain) - 1]].tied_to not in (None, found.blocks[0]):
            raise ManifestError(f"{here}.blocks: the head is not tied to the embed block")

    def _check_adapter(self, here: str, model: ModelRecord, position: int, adapter_id: str) -> None:
        if adapter_id not in self.adapters:
            raise ManifestError(f"{here}: there is no adapter {adapter_id!r}")
        if position >= len(model.chain):
            raise ManifestError(f"{here}: the chain has {len(model.chain)} blocks")
        spec = self.blocks[model.chain[position]].spec
        shapes = tensor_shapes(spec)
        loras = self.adapters[adapter_id].spec.loras
        names = [lora.projection for lora in loras]
        if not names or names != [name for name in PROJECTIONS.get(spec.kind, ()) if name in names]:
            raise ManifestError(f"{here}: an adapter of {', '.join(names) or 'nothing'} on {spec.kind}")
        for lora in loras:
            if lora.rank < 1 or shapes[lora.projection] != (lora.out_features, lora.in_features):
                raise ManifestError(f"{here}: the LoRA of {lora.projection} does not fit the block")


def is_drafter(manifest: Manifest, name: str, model: str) -> bool:
    """Whether a model of a zoo may guess for another one: it is there, and speaks of the same tokens."""
    one, other = manifest.models.get(name), manifest.models[model]
    if one is None or name == model:
        return False
    return (one.tokenizer, one.config.vocab_size) == (other.tokenizer, other.config.vocab_size)
