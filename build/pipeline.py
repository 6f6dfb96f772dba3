"""Checkpoints -> zoo: read, cut into blocks, store what is new, verify, time, commit the manifest last."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from blockzoo.build import equivalence, profiles
from blockzoo.build.partition import CutAdapter, CutBlock, cut, cut_adapters
from blockzoo.build.progress import Progress, no_progress
from blockzoo.build.recover import NotLowRankError, nearest_block, recover
from blockzoo.build.report import (
    CompileReport,
    ModelReport,
    Status,
    equivalence_text,
    model_bytes,
    sharing_bytes,
)
from blockzoo.build.sources import Adapted, Source, nearest, open_sources
from blockzoo.build.tensorrt_plans import PlanReport, TensorRTOptions, build_plans, unused_plans
from blockzoo.build.verify import PROMPTS, VerificationError, encode_prompts, encode_texts, verify
from blockzoo.engines.base import EngineMaker, Precision
from blockzoo.zoo.blocks import PROJECTIONS, BlockTensor, Dtype
from blockzoo.zoo.errors import StoreError, ZooError
from blockzoo.zoo.fingerprint import files_id
from blockzoo.zoo.manifest import (
    AdapterRecord,
    BlockRecord,
    Manifest,
    ModelRecord,
    RecoveryRecord,
    SourceRecord,
    VerificationRecord,
)
from blockzoo.zoo.store import Zoo, ZooWriter

Sharing = Literal["exact", "adapter", "equivalent"]
"""What counts as shareable: equal blocks; also blocks that are another one with a LoRA merged in; also blocks
that can take each other's place with little effect."""

"""(what is being done, steps done, steps in all)."""


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """How to compile."""

    dtype: Dtype | None = None
    """Convert all weights; None keeps them exactly."""
    replace: bool = False
    """Whether a model of the same name and other content is replaced."""
    profile: bool = True
    """Whether to time blocks."""
    share: Sharing = "adapter"
    """How far full checkpoints share; PEFT folders always share their base."""
    threshold: float = 0.98
    """equivalent: least mean cosine of the vocabulary probabilities against the model's own."""
    probe: str | None = None
    """equivalent: file with text to compare on; None takes the built-in prompts."""
    verify: bool = True
    """Whether to check every new chain against the numpy oracle."""
    threads: int | None = None
    """Engine threads; None leaves it to the engine."""
    tensorrt: TensorRTOptions | None = None
    """What to build TensorRT plans for; None: no plans are built."""
    dry_run: bool = False
    """Only say what would be done."""


def compile_models(
    models: Mapping[str, str | Path],
    zoo: str | Path,
    options: CompileOptions | None = None,
    *,
    remove: Sequence[str] = (),
    progress: Progress = no_progress,
) -> CompileReport:
    """Compile models into the zoo directory `zoo`, which is made or extended; drop those in `remove`.

    `models`: name -> HF folder or PEFT folder (`PATH` or `PATH@BASE`). Raises ZooError; the zoo is then what
    it was before.
    """
    options = options or CompileOptions()
    path = Path(zoo)
    if options.dry_run:
        manifest = Manifest.load(path / "manifest.json") if (path / "manifest.json").exists() else Manifest()
        return _Compilation(path, manifest, None, options, progress).run(models, remove)
    with ZooWriter(path) as writer:
        return _Compilation(path, writer.manifest, writer, options, progress).run(models, remove)


class _Compilation:
    """One compilation: the manifest as it grows. Without a writer nothing is stored (a dry run)."""

    def __init__(
        self, path: Path, old: Manifest, writer: ZooWriter | None, options: CompileOptions, progress: Progress
    ) -> None:
        self.writer, self.options, self.progress = writer, options, progress
        self.manifest = Manifest(
            models=dict(old.models),
            blocks=dict(old.blocks),
            plans=dict(old.plans),
            tensorrt_plans=dict(old.tensorrt_plans),
            adapters=dict(old.adapters),
        )
        self.old = Zoo(path, old)
        self.zoo = Zoo(path, self.manifest)  # reads blocks as soon as they are stored
        self.reports: dict[str, ModelReport] = {}
        self.plans: PlanReport | None = None
        self.makers: dict[Precision | None, EngineMaker] = {}
        self.unstored: dict[str, CutBlock] = {}  # new blocks of a dry run

    def run(self, models: Mapping[str, str | Path], remove: Sequence[str]) -> CompileReport:
        for name in remove:
            if self.manifest.models.pop(name, None) is None:
                hint = nearest(name, self.old.manifest.models)
                raise StoreError(f"{self.old.path}: there is no model {name!r} to remove{hint}")
        sources = open_sources(models, self.old)
        for source in sources:
            encode_prompts(source)  # a tokenizer that does not fit is told before anything is written
        texts = {source.name: self.probe(source) for source in sources}
        for source in sources:
            self.add(source)
        if self.writer is not None and self.options.verify:
            for source in sources:
                self.verify(source)
        if self.writer is not None and self.options.share == "equivalent":
            later = {source.name for source in sources}
            for source in sources:  # a model takes blocks of those that were there before it
                later.discard(source.name)
                self.substitute(source, texts[source.name], later)
        self.prune()
        if self.writer is not None and self.options.profile:
            profiles.measure(self.zoo, self.maker(None), self.progress)
        if self.options.tensorrt is not None:
            self.plans = build_plans(self.zoo, self.writer, self.options.tensorrt, self.progress)
        freed = self.writer.commit(self.manifest) if self.writer is not None else 0
        return self.report(list(models), tuple(remove), freed)

    def add(self, source: Source, share: Sharing | None = None, notes: tuple[str, ...] = ()) -> None:
        """Cut one model into blocks, store those that are new, and enter it into the manifest."""
        share = share or self.options.share
        chain: list[str] = []
        parts = _Parts()
        new_bytes = reused = 0
        where = str(source.path or source.name)
        steps = 2 * source.config.num_layers + 2
        for block in cut(source.config, source.read, self.options.dtype, where):
            self.progress(f"reading {source.name}", len(chain), steps)
            base = None
            if block.id not in self.manifest.blocks and share != "exact" and not source.pairs:
                base = self.taken_apart(block, len(chain), parts)
            if base is None:
                known = block.id in self.manifest.blocks
                new_bytes += 0 if known else block.num_bytes
                self.store(block)
            reused += base is not None or known
            chain.append(base or block.id)
        for position, adapter in cut_adapters(source.config, source.pairs):
            parts.adapters[position] = adapter.id
            parts.new[adapter.id] = adapter
        self.progress(f"reading {source.name}", steps, steps)
        for adapter_id, adapter in parts.new.items():
            new_bytes += 0 if adapter_id in self.manifest.adapters else adapter.num_bytes
            self.store_adapter(adapter)
        record = ModelRecord(
            config=source.config,
            chain=tuple(chain),
            tokenizer=files_id(source.tokenizer.files),
            source=self.source_record(source),
            verification=None,
            adapters=parts.adapters,
            recovery=parts.recovery(self.manifest),
            eos_token_ids=None if source.end_ids == source.config.eos_token_ids else source.end_ids,
            generation_defaults=dict(source.generation_defaults) or None,
        )
        if self.writer is not None:
            self.writer.add_tokenizer(source.tokenizer.files)
        status = self.status(source.name, record)
        if status != "unchanged":
            self.manifest.models[source.name] = record
        self.reports[source.name] = ModelReport(
            name=source.name,
            status=status,
            base=record.source.base,
            num_blocks=len(chain),
            num_reused=reused,
            num_recovered=len(parts.own_blocks),
            rank=max((self.manifest.adapters[i].spec.rank for i in parts.adapters.values()), default=0),
            notes=(*notes, *parts.notes(), *source.notes()),
            model_bytes=model_bytes(self.manifest, record),
            new_bytes=new_bytes,
            verification=self.manifest.models[source.name].verification,
        )

    def taken_apart(self, block: CutBlock, position: int, parts: "_Parts") -> str | None:
        """Find the block's base in the zoo and its adapter on it; the base's id, None where there is none."""
        if block.spec.kind not in PROJECTIONS:
            return None
        for model in self.manifest.models.values():  # the same block was taken apart before
            recovery = model.recovery
            if recovery is not None and recovery.own_blocks.get(position) == block.id:
                parts.take(position, block.id, model.adapters[position], recovery.rounding)
                return model.chain[position]
        base = nearest_block(self.manifest, self.tensors_of, block.spec, block.tensors, position)
        if base is None:
            return None
        try:
            found = recover(block.spec, block.tensors, self.tensors_of(base))
        except NotLowRankError as error:
            parts.refused.append((position, str(error)))
            return None
        parts.take(position, block.id, found.adapter.id, found.rounding)
        parts.new[found.adapter.id] = found.adapter
        return base

    def tensors_of(self, block_id: str) -> dict[str, BlockTensor]:
        if block_id in self.unstored:
            return self.unstored[block_id].tensors
        return self.zoo.read_block(block_id).tensors

    def source_record(self, source: Source) -> SourceRecord:
        base = source.origin.base.name if isinstance(source.origin, Adapted) else None
        folder = source.path.resolve().name if source.path is not None else source.name
        return SourceRecord("hf" if base is None else "peft", folder, source.dtype, self.options.dtype, base)

    def status(self, name: str, record: ModelRecord) -> Status:
        old = self.manifest.models.get(name)
        if old is None:
            return "added"
        if _content(old) == _content(record) or self.substituted_before(old, record):
            return "unchanged"
        if not self.options.replace:
            raise ZooError(
                f"model {name} is in the zoo with other content: give --replace, or another name as NAME=PATH"
            )
        return "replaced"

    def store(self, block: CutBlock) -> None:
        if self.writer is not None:
            self.writer.add_block(block.id, block.tensors, {"kind": block.spec.kind})
        elif block.id not in self.old.manifest.blocks:
            self.unstored[block.id] = block
        if block.id in self.manifest.blocks:
            return
        plan = profiles.plan_for(block.spec, block.dtype)
        key = profiles.plan_key(plan)
        self.manifest.plans[key] = plan
        self.manifest.blocks[block.id] = BlockRecord(
            spec=block.spec,
            dtype=block.dtype,
            num_bytes=block.num_bytes,
            tied_to=block.tied_to,
            plan=key,
            latency_us=None,
            latency_block=None,
        )

    def store_adapter(self, adapter: CutAdapter) -> None:
        if self.writer is not None:
            self.writer.add_block(adapter.id, adapter.tensors, {"kind": adapter.spec.kind})
        self.manifest.adapters[adapter.id] = AdapterRecord(adapter.spec, adapter.dtype, adapter.num_bytes)

    def verify(self, source: Source) -> None:
        """Check a model unless it, or a model with the same chain, has been checked.

        One that was taken apart and misses its tolerance is stored with its own blocks instead.
        """
        record = self.manifest.models[source.name]
        if record.verification is not None:
            return
        checked = self.verified_twin(record)
        if checked is None:
            blocks = [self.zoo.read_block(block_id) for block_id in record.chain]
            adapters = {i: self.zoo.read_adapter(key) for i, key in record.adapters.items()}
            recovered = record.recovery is not None
            try:
                checked = verify(
                    source, blocks, adapters, self.maker, self.options.dtype, self.progress, recovered
                )
            except VerificationError as error:
                if not recovered:
                    raise
                old = self.old.manifest.models.get(source.name)
                self.manifest.models.pop(source.name)
                if old is not None:
                    self.manifest.models[source.name] = old
                self.add(source, "exact", (f"stored with its own blocks: {error}",))
                self.verify(source)
                return
        self.manifest.models[source.name] = replace(record, verification=checked)
        self.reports[source.name] = replace(self.reports[source.name], verification=checked)

    def substituted_before(self, old: ModelRecord, record: ModelRecord) -> bool:
        """Whether the old record is the new one, with equivalents in it as they are asked for now."""
        found, options = old.equivalence, self.options
        if found is None or options.share != "equivalent" or found.threshold != options.threshold:
            return False
        own = replace(old, chain=old.own_chain())
        return found.probe == self.probe_name and _content(own) == _content(record)

    @property
    def probe_name(self) -> str:
        return Path(self.options.probe).name if self.options.probe is not None else "built-in"

    def probe(self, source: Source) -> list[list[int]]:
        """The text on which models are compared, as token ids; none unless they are."""
        if self.options.share != "equivalent":
            return []
        given = self.options.probe
        encoded = encode_texts(source, equivalence.probe_text(given, PROMPTS))
        count = sum(map(len, encoded))
        if given is not None and count < equivalence.MIN_TOKENS:
            raise ZooError(
                f"--probe {given}: {count} tokens of {source.name}; expected at least "
                f"{equivalence.MIN_TOKENS}, and up to {equivalence.MAX_TOKENS} are used: give more text"
            )
        return encoded

    def substitute(self, source: Source, encoded: list[list[int]], besides: Collection[str]) -> None:
        """Let other models' blocks take the place of those that only this model has, where that is alike."""
        record, report = self.manifest.models[source.name], self.reports[source.name]
        if record.equivalence is not None or report.status == "unchanged":
            return
        if self.manifest.models.keys() <= {source.name, *besides}:  # the first of all
            return
        changed = equivalence.substitute(
            source.name,
            self.zoo,
            encoded,
            self.maker("f32"),
            self.options.threshold,
            self.probe_name,
            self.progress,
            besides,
        )
        if changed.equivalence is None:
            self.note(source.name, f"no block is equivalent to another model's at {self.options.threshold:g}")
            return
        self.manifest.models[source.name] = changed
        own = changed.equivalence.own_blocks.values()
        freed = sum(self.manifest.blocks[block_id].num_bytes for block_id in own)
        self.reports[source.name] = replace(report, new_bytes=report.new_bytes - freed)
        self.note(source.name, equivalence_text(changed))

    def note(self, name: str, said: str) -> None:
        self.reports[name] = replace(self.reports[name], notes=(*self.reports[name].notes, said))

    def verified_twin(self, record: ModelRecord) -> VerificationRecord | None:
        for name, other in self.manifest.models.items():
            same = _weights(other) == _weights(record) and other.equivalence is None
            if same and other.verification is not None:
                return replace(other.verification, same_as=other.verification.same_as or name)
        return None

    def maker(self, precision: Precision | None) -> EngineMaker:
        if precision not in self.makers:
            from blockzoo.engines.openvino import OpenVINOEngines

            self.makers[precision] = OpenVINOEngines(precision, self.options.threads)
        return self.makers[precision]

    def prune(self) -> None:
        """Forget blocks and plans that no model uses any more, and references to models that are gone."""
        for name, model in self.manifest.models.items():
            checked = model.verification
            if checked is not None and checked.same_as is not None:
                twin = self.manifest.models.get(checked.same_as)
                own = replace(model, chain=model.own_chain())
                if twin is None or _weights(replace(twin, chain=twin.own_chain())) != _weights(own):
                    self.manifest.models[name] = replace(model, verification=replace(checked, same_as=None))
        used = {block_id for model in self.manifest.models.values() for block_id in model.chain}
        for block_id in self.manifest.blocks.keys() - used:
            del self.manifest.blocks[block_id]
        adapted = {key for model in self.manifest.models.values() for key in model.adapters.values()}
        for key in self.manifest.adapters.keys() - adapted:
            del self.manifest.adapters[key]
        for key in self.manifest.plans.keys() - {block.plan for block in self.manifest.blocks.values()}:
            del self.manifest.plans[key]
        for key in unused_plans(self.zoo):
            del self.manifest.tensorrt_plans[key]

    def report(self, order: list[str], removed: tuple[str, ...], freed: int) -> CompileReport:
        unshared, stored = sharing_bytes(self.manifest)
        return CompileReport(
            models=tuple(self.reports[name] for name in order),
            removed=removed,
            zoo_models=len(self.manifest.models),
            zoo_blocks=len(self.manifest.blocks),
            unshared_bytes=unshared,
            stored_bytes=stored,
            freed_bytes=freed,
            plans=self.plans,
            dry_run=self.writer is None,
        )


class _Parts:
    """The adapters of a model under way, and what was found of its blocks."""

    def __init__(self) -> None:
        self.adapters: dict[int, str] = {}
        self.new: dict[str, CutAdapter] = {}
        self.own_blocks: dict[int, str] = {}
        self.refused: list[tuple[int, str]] = []
        self._rounding = 0.0

    def take(self, position: int, own_block: str, adapter_id: str, rounding: float) -> None:
        """Note a block that was taken apart."""
        self.adapters[position], self.own_blocks[position] = adapter_id, own_block
        self._rounding = max(self._rounding, rounding)

    def recovery(self, manifest: Manifest) -> RecoveryRecord | None:
        """The record of what was recovered; the manifest knows the adapters."""
        if not self.own_blocks:
            return None
        rank = max(manifest.adapters[self.adapters[i]].spec.rank for i in self.own_blocks)
        return RecoveryRecord(self.own_blocks, rank, round(self._rounding, 3))

    def notes(self) -> tuple[str, ...]:
        """Why blocks near to others were not taken apart, for the report."""
        near = [(position, said) for position, said in self.refused if "unrelated" not in said]
        if not near:
            return ()
        position, said = near[0]
        return (f"{len(near)} blocks are near to others, but no merged LoRA (block {position}: {said})",)


def _weights(record: ModelRecord) -> object:
    return record.chain, record.adapters


def _content(record: ModelRecord) -> object:
    return record.config, record.tokenizer, record.end_ids, record.generation_defaults, _weights(record)
