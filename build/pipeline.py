"""Checkpoints -> zoo: read, cut into blocks, store what is new, verify, time, commit the manifest last."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blockzoo.build import profiles
from blockzoo.build.partition import CutBlock, cut
from blockzoo.build.report import CompileReport, ModelReport, Status, chain_bytes, sharing_bytes
from blockzoo.build.sources import Merged, Source, nearest, open_sources
from blockzoo.build.tensorrt_plans import PlanReport, TensorRTOptions, build_plans, unused_plans
from blockzoo.build.verify import encode_prompts, verify
from blockzoo.engines.base import EngineMaker, Precision
from blockzoo.zoo.blocks import Dtype
from blockzoo.zoo.errors import StoreError, ZooError
from blockzoo.zoo.fingerprint import files_id
from blockzoo.zoo.manifest import BlockRecord, Manifest, ModelRecord, SourceRecord, VerificationRecord
from blockzoo.zoo.store import Zoo, ZooWriter

Progress = Callable[[str, int, int], None]
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
    progress: Progress = lambda what, done, total: None,
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
        )
        self.old = Zoo(path, old)
        self.zoo = Zoo(path, self.manifest)  # reads blocks as soon as they are stored
        self.reports: dict[str, ModelReport] = {}
        self.plans: PlanReport | None = None
        self.makers: dict[Precision | None, EngineMaker] = {}

    def run(self, models: Mapping[str, str | Path], remove: Sequence[str]) -> CompileReport:
        for name in remove:
            if self.manifest.models.pop(name, None) is None:
                hint = nearest(name, self.old.manifest.models)
                raise StoreError(f"{self.old.path}: there is no model {name!r} to remove{hint}")
        sources = open_sources(models, self.old)
        for source in sources:
            encode_prompts(source)  # a tokenizer that does not fit is told before anything is written
        for source in sources:
            self.add(source)
        if self.writer is not None and self.options.verify:
            for source in sources:
                self.verify(source)
        self.prune()
        if self.writer is not None and self.options.profile:
            profiles.measure(self.zoo, self.maker(None), self.progress)
        if self.options.tensorrt is not None:
            self.plans = build_plans(self.zoo, self.writer, self.options.tensorrt, self.progress)
        freed = self.writer.commit(self.manifest) if self.writer is not None else 0
        return self.report(list(models), tuple(remove), freed)

    def add(self, source: Source) -> None:
        """Cut one model into blocks, store those that are new, and enter it into the manifest."""
        chain: list[str] = []
        new_bytes = reused = 0
        where = str(source.path or source.name)
        steps = 2 * source.config.num_layers + 2
        for block in cut(source.config, source.read, self.options.dtype, where):
            self.progress(f"reading {source.name}", len(chain), steps)
            known = block.id in self.manifest.blocks
            reused += known
            new_bytes += 0 if known else block.num_bytes
            chain.append(block.id)
            self.store(block)
        self.progress(f"reading {source.name}", steps, steps)
        record = ModelRecord(
            config=source.config,
            chain=tuple(chain),
            tokenizer=files_id(source.tokenizer_files),
            source=self.source_record(source),
            verification=None,
        )
        if self.writer is not None:
            self.writer.add_tokenizer(source.tokenizer_files)
        status = self.status(source.name, record)
        if status != "unchanged":
            self.manifest.models[source.name] = record
        self.reports[source.name] = ModelReport(
            name=source.name,
            status=status,
            base=record.source.base,
            num_blocks=len(chain),
            num_reused=reused,
            model_bytes=chain_bytes(self.manifest, record.chain),
            new_bytes=new_bytes,
            verification=self.manifest.models[source.name].verification,
        )

    def source_record(self, source: Source) -> SourceRecord:
        base = source.origin.base.name if isinstance(source.origin, Merged) else None
        folder = source.path.resolve().name if source.path is not None else source.name
        return SourceRecord("hf" if base is None else "peft", folder, source.dtype, self.options.dtype, base)

    def status(self, name: str, record: ModelRecord) -> Status:
        old = self.manifest.models.get(name)
        if old is None:
            return "added"
        if (old.config, old.chain, old.tokenizer) == (record.config, record.chain, record.tokenizer):
            return "unchanged"
        if not self.options.replace:
            raise ZooError(
                f"model {name} is in the zoo with other content: give --replace, or another name as NAME=PATH"
            )
        return "replaced"

    def store(self, block: CutBlock) -> None:
        if self.writer is not None:
            self.writer.add_block(block.id, block.tensors, {"kind": block.spec.kind})
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

    def verify(self, source: Source) -> None:
        """Check a model unless it, or a model with the same chain, has been checked."""
        record = self.manifest.models[source.name]
        if record.verification is not None:
            return
        checked = self.verified_twin(record)
        if checked is None:
            blocks = [self.zoo.read_block(block_id) for block_id in record.chain]
            checked = verify(source, blocks, self.maker, self.options.dtype, self.progress)
        self.manifest.models[source.name] = replace(record, verification=checked)
        self.reports[source.name] = replace(self.reports[source.name], verification=checked)

    def verified_twin(self, record: ModelRecord) -> VerificationRecord | None:
        for name, other in self.manifest.models.items():
            if other.chain == record.chain and other.verification is not None:
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
                if twin is None or twin.chain != model.chain:
                    self.manifest.models[name] = replace(model, verification=replace(checked, same_as=None))
        used = {block_id for model in self.manifest.models.values() for block_id in model.chain}
        for block_id in self.manifest.blocks.keys() - used:
            del self.manifest.blocks[block_id]
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
