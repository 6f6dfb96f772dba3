"""Checkpoints -> zoo: read, cut into blocks, store what is new, verify, time, commit the manifest last."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from blockzoo.build import deltas, equivalence, profiles, quantized_models, surrogates
from blockzoo.build.calibration import NUM_TEXTS
from blockzoo.build.draft import Draft, weights
from blockzoo.build.originals import oracle_for
from blockzoo.build.own_text import OwnText
from blockzoo.build.partition import block_tensors, cut, cut_adapters
from blockzoo.build.progress import Progress, no_progress
from blockzoo.build.quantized_models import Weights
from blockzoo.build.report import CompileReport, ModelReport, Status, left_behind
from blockzoo.build.sources import Adapted, Source, nearest, open_sources
from blockzoo.build.taken_apart import Parts, to_give_back
from blockzoo.build.tensorrt_plans import PlanReport, TensorRTOptions, build_plans
from blockzoo.build.trials import MAX_FORWARDS
from blockzoo.build.verify import PROMPTS, RecoveryError, encode_prompts, encode_texts, verify
from blockzoo.engines.base import EngineMaker, Precision
from blockzoo.engines.choose import make_engines
from blockzoo.zoo.blocks import Dtype
from blockzoo.zoo.errors import StoreError, ZooError
from blockzoo.zoo.fingerprint import files_id
from blockzoo.zoo.manifest import Manifest, ModelRecord, SourceRecord
from blockzoo.zoo.summary import (
    delta_text,
    equivalence_text,
    model_bytes,
    quantization_texts,
    sharing_bytes,
    surrogate_text,
)
from blockzoo.zoo.writer import ZooWriter

Sharing = Literal["exact", "adapter", "equivalent", "delta"]
"""What counts as shareable: equal blocks; also blocks that are another one with a LoRA merged in; besides,
blocks that can take each other's place with little effect, or blocks near another one, as differences."""


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
    """equivalent, delta, weights: file with text to compare on; None takes built-in prompts (equivalent), or
    text that the model writes."""
    weights: Weights | None = None
    """Store the blocks of all models given in 8 or 4 bits; None keeps them as they are."""
    max_kl: float | None = None
    """weights, delta: bound on the divergence from the weights as they were given, in nats; None: by what is
    asked for."""
    calibration_texts: int = NUM_TEXTS
    """weights: texts that a model writes for its rounding to look at; 0 rounds to nearest."""
    surrogate: str | None = None
    """Look for what guesses what a model says next: of `SURROGATES`, or a model; None: leave that alone."""
    verify: bool = True
    """Whether to check every new chain against the numpy oracle."""
    judge_kv: bool = False
    """verify: whether to measure what KV in 8 bits loses too, which takes the oracle once more."""
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
        return _Compilation(Draft(path, manifest, None), options, progress).run(models, remove)
    with ZooWriter(path) as writer:
        return _Compilation(Draft(path, writer.manifest, writer), options, progress).run(models, remove)


class _Compilation:
    """One compilation, in the order of `run`."""

    def __init__(self, draft: Draft, options: CompileOptions, progress: Progress) -> None:
        self.draft, self.options, self.progress = draft, options, progress
        self.manifest, self.writer, self.old, self.zoo = draft.manifest, draft.writer, draft.old, draft.zoo
        self.reports: dict[str, ModelReport] = {}
        self.plans: PlanReport | None = None
        self.makers: dict[Precision | None, EngineMaker] = {}
        self.given: dict[str, ModelRecord] = {}  # as they were cut, by name
        self.adapter_bytes: dict[str, int] = {}  # of new ones

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
        self.note_left_behind()
        if self.writer is not None and self.options.verify:
            for source in sources:
                self.verify(source)
        if self.options.share in ("equivalent", "delta"):
            take = self.substitute if self.options.share == "equivalent" else self.take_differences
            later = {source.name for source in sources}
            for source in sources:  # a model takes blocks of those that were there before it
                later.discard(source.name)
                take(source, texts[source.name], later)
        if self.options.weights is not None:
            for source in sources:
                self.quantize(source, texts[source.name], self.options.weights)
        if self.writer is not None and self.options.surrogate is not None:
            for source in sources:
                if source.name != self.options.surrogate:
                    self.find_surrogate(source, texts[source.name], self.options.surrogate)
        self.draft.prune()
        if self.writer is not None and self.options.profile:
            served_by = make_engines(zoo=self.zoo, num_threads=self.options.threads)
            profiles.measure(self.zoo, served_by, self.progress)
        if self.options.tensorrt is not None:
            self.plans = build_plans(self.zoo, self.writer, self.options.tensorrt, self.progress)
        freed = self.writer.commit(self.manifest) if self.writer is not None else 0
        return self.report(list(models), tuple(remove), freed)

    def add(self, source: Source, whole: Collection[int] = (), notes: tuple[str, ...] = ()) -> None:
        """Cut one model into blocks, store those that are new, and enter it into the manifest.

        `whole`: positions of blocks that are not taken apart, as the model loses too much by it.
        """
        apart = self.options.share != "exact" and not source.pairs
        chain: list[str] = []
        parts = Parts()
        new_bytes = reused = 0
        where = str(source.path or source.name)
        steps = 2 * source.config.num_layers + 2
        for block in cut(source.config, source.read, self.options.dtype, where):
            self.progress(f"reading {source.name}", len(chain), steps)
            base = None
            if block.id not in self.manifest.blocks and apart and len(chain) not in whole:
                base = parts.take_apart(self.draft, block, len(chain))
            if base is None:
                known = block.id in self.manifest.blocks
                new_bytes += 0 if known else block.num_bytes
                dtype, position = self.options.dtype, len(chain)
                self.draft.store(
                    block, partial(block_tensors, source.config, source.read, dtype, where, position)
                )
            reused += base is not None or known
            chain.append(base or block.id)
        for position, adapter in cut_adapters(source.config, source.pairs):
            parts.adapters[position] = adapter.id
            parts.new[adapter.id] = adapter
        self.progress(f"reading {source.name}", steps, steps)
        self.adapter_bytes[source.name] = 0
        for adapter_id, adapter in parts.new.items():
            if adapter_id not in self.manifest.adapters:
                self.adapter_bytes[source.name] += adapter.num_bytes
            self.draft.store_adapter(adapter)
        new_bytes += self.adapter_bytes[source.name]
        record = ModelRecord(
            config=source.config,
            chain=tuple(chain),
            tokenizer=files_id(source.tokenizer.files),
            source=self.source_record(source),
            verification=None,
            adapters=parts.adapters,
            recovery=parts.recovery(self.manifest, whole),
            eos_token_ids=None if source.end_ids == source.config.eos_token_ids else source.end_ids,
            generation_defaults=dict(source.generation_defaults) or None,
        )
        if self.writer is not None:
            self.writer.add_tokenizer(source.tokenizer.files)
        self.given[source.name] = record
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

    def source_record(self, source: Source) -> SourceRecord:
        base = source.origin.base.name if isinstance(source.origin, Adapted) else None
        folder = source.path.resolve().name if source.path is not None else source.name
        given: Literal["hf", "gguf", "peft"] = "hf" if base is None else "peft"
        if base is None and source.path is not None and source.path.is_file():
            given = "gguf"
        return SourceRecord(given, folder, source.dtype, self.options.dtype, base)

    def status(self, name: str, record: ModelRecord) -> Status:
        old = self.manifest.models.get(name)
        if old is None:
            return "added"
        same = self.content(old) == self.content(record) or self.substituted_before(old, record)
        if same and self.quantized_before(name, old):
            return "unchanged"
        if not self.options.replace:
            raise ZooError(
                f"model {name} is in the zoo with other content: give --replace, or another name as NAME=PATH"
            )
        return "replaced"

    def verify(self, source: Source, again: bool = False) -> None:
        """Check a model unless it, or a model with the same chain, has been checked.

        One that was taken apart and loses too much gets its worst blocks back; all, where that is not enough.
        """
        record = self.manifest.models[source.name]
        if record.verification is not None:
            return
        checked = self.draft.verified_twin(self.given[source.name])
        if checked is None:
            blocks = [self.zoo.read_block(block_id) for block_id in self.given[source.name].chain]
            adapters = {i: self.zoo.read_adapter(key) for i, key in record.adapters.items()}
            recovered = record.recovery is not None
            try:
                checked = verify(
                    source,
                    blocks,
                    adapters,
                    self.maker,
                    self.options.dtype,
                    self.progress,
                    recovered,
                    self.packed_kv() if self.options.judge_kv else None,
                )
            except RecoveryError as error:
                self.give_back(source, record, error, again)
                self.verify(source, True)
                return
        self.manifest.models[source.name] = replace(record, verification=checked)
        self.reports[source.name] = replace(self.reports[source.name], verification=checked)

    def give_back(self, source: Source, record: ModelRecord, error: RecoveryError, all_of_them: bool) -> None:
        """Enter a model anew that loses too much taken apart, with blocks of its own."""
        assert record.recovery is not None
        own = record.recovery.own_blocks
        whole = set(own)
        if not all_of_them:
            asked = source, record, self.zoo, self.maker("f32"), self.options.dtype
            whole = to_give_back(*asked, error.sequences, error.yardstick, self.progress)
            whole = whole or set(own)  # judged otherwise here than there: should not be
        old = self.old.manifest.models.get(source.name)
        self.manifest.models.pop(source.name)
        if old is not None:
            self.manifest.models[source.name] = old
        said = "its own blocks" if len(whole) == len(own) else f"{len(whole)} of {len(own)} blocks of its own"
        self.add(source, whole | {*record.recovery.given_back}, (f"stored with {said}: {error}",))

    def substituted_before(self, old: ModelRecord, record: ModelRecord) -> bool:
        """Whether the old record is the new one, with others' blocks in it as they are asked for now."""
        options, wanted, probe = self.options, None, None
        if options.share == "equivalent" and old.equivalence is not None:
            wanted, probe = old.equivalence.threshold == options.threshold, old.equivalence.probe
        elif options.share == "delta" and old.delta is not None:
            wanted, probe = old.delta.max_kl == options.max_kl, old.delta.probe
        same = wanted and probe == self.probe_name
        return bool(same) and self.content(old.with_own_blocks()) == self.content(record)

    def content(self, record: ModelRecord) -> object:
        defaults, given = record.generation_defaults, self.draft.unquantized(record)
        return record.config, record.tokenizer, record.end_ids, defaults, weights(given)

    def quantized_before(self, name: str, old: ModelRecord) -> bool:
        """Whether a model of the zoo is quantized as is asked for now."""
        found, options = old.quantization, self.options
        asked = options.weights if name not in self.given or self.can_be_quantized(name) else None
        if found is None or asked is None:
            return found is None and asked is None
        return (found.weights, found.probe, found.max_kl) == (asked, self.probe_name, self.max_kl(asked))

    def can_be_quantized(self, name: str) -> bool:
        """Whether the blocks of a model are there as they were given."""
        chain = self.given[name].chain
        return not any(self.manifest.blocks[key].dtype in ("i8", "i4") for key in chain)

    def max_kl(self, asked: Weights) -> float:
        return quantized_models.MAX_KL[asked] if self.options.max_kl is None else self.options.max_kl

    def quantize(self, source: Source, encoded: list[list[int]], asked: Weights) -> None:
        """Put quantized blocks in the place of a model's own."""
        name = source.name
        record, report = self.manifest.models[name], self.reports[name]
        if not self.can_be_quantized(name):
            self.note(
                name, f"its base is quantized in the zoo: --weights {asked} leaves its blocks as they are"
            )
            return
        done = record.quantization
        kept = done is not None and (done.figures or not self.options.verify)
        if report.status == "unchanged" and kept and all(map(self.draft.is_whole, record.chain)):
            self.note_all(name, quantization_texts(self.manifest, record))
            return
        before = set(self.manifest.blocks)
        given = replace(record, chain=tuple(self.chain_to_quantize(name)))
        changed = self.quantized_twin(given) or quantized_models.quantize(
            source,
            self.draft,
            given,
            quantized_models.Asked(
                weights=asked,
                max_kl=self.max_kl(asked),
                probe_name=self.probe_name,
                probe=encoded,
                judge=self.options.verify,
                threads=self.options.threads,
                num_texts=self.options.calibration_texts,
            ),
            self.options.dtype,
            self.maker,
            self.progress,
        )
        self.manifest.models[name] = changed
        new = set(changed.chain) - before
        self.reports[name] = replace(
            report,
            num_reused=sum(key not in new for key in changed.chain),
            model_bytes=model_bytes(self.manifest, changed),
            new_bytes=sum(self.manifest.blocks[key].num_bytes for key in new) + self.adapter_bytes[name],
        )
        self.note_all(name, quantization_texts(self.manifest, changed))
        if self.options.dry_run and asked == "auto":
            self.note(name, "auto chooses bits as it compiles: counted with 8")

    def quantized_twin(self, given: ModelRecord) -> ModelRecord | None:
        """A model quantized as another one of equal weights was, None where there is none."""
        for name, other in self.manifest.models.items():
            found = other.quantization
            if found is None or not self.quantized_before(name, other) or other.replaced_blocks:
                continue
            judged = bool(found.figures) or not self.options.verify
            same = judged and weights(self.draft.given(other)) == weights(given)
            if same and all(map(self.draft.is_whole, other.chain)):
                return replace(given, chain=other.chain, quantization=found)
        return None

    def chain_to_quantize(self, name: str) -> list[str]:
        """The chain as given, with blocks of other models where they stand for its own."""
        record, given = self.manifest.models[name], self.given[name]
        own = record.replaced_blocks
        return [record.chain[at] if at in own else key for at, key in enumerate(given.chain)]

    @property
    def probe_name(self) -> str:
        return Path(self.options.probe).name if self.options.probe is not None else "built-in"

    def probe(self, source: Source) -> list[list[int]]:
        """The text on which models are compared, as token ids; none unless they are."""
        given, share = self.options.probe, self.options.share
        judges = share == "delta" or self.options.weights is not None or self.options.surrogate is not None
        if share != "equivalent" and (given is None or not judges):
            return []
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
        if self.writer is None or record.replaced_blocks or report.status == "unchanged":
            return
        if self.manifest.models.keys() <= {source.name, *besides}:  # the first of all
            return
        search = equivalence.substitute(
            source.name,
            self.zoo,
            encoded,
            self.maker("f32"),
            oracle_for(source, True, self.options.dtype),
            self.options.threshold,
            self.probe_name,
            self.progress,
            besides,
        )
        if search.cut_short:
            self.note(
                source.name,
                f"the search for equivalent blocks ended at its bound of {MAX_FORWARDS} forwards of the "
                f"model: {search.num_trials} sets of {search.num_candidates} candidates were tried",
            )
        changed = search.record
        if changed.equivalence is None:
            self.note(source.name, f"no block is equivalent to another model's at {self.options.threshold:g}")
            return
        self.manifest.models[source.name] = changed
        own = changed.equivalence.own_blocks.values()
        freed = sum(self.manifest.blocks[block_id].num_bytes for block_id in own)
        self.reports[source.name] = replace(report, new_bytes=report.new_bytes - freed)
        self.note(source.name, equivalence_text(changed))

    def take_differences(self, source: Source, encoded: list[list[int]], besides: Collection[str]) -> None:
        """Let other models' blocks and differences to them take the place of a model's own."""
        name = source.name
        record, report = self.manifest.models[name], self.reports[name]
        if record.replaced_blocks or report.status == "unchanged":
            return
        others = self.manifest.models.keys() - {name, *besides}
        if not others:  # the first of all
            return
        if self.writer is None:
            self.note(name, "differences to other models' blocks are not looked for in a dry run")
            return
        found = deltas.take_differences(
            name,
            self.zoo,
            OwnText(source, record, self.zoo, 0, self.probe_name, encoded, self.maker, self.progress),
            oracle_for(source, True, self.options.dtype),
            self.maker("f32"),
            self.options.max_kl,
            self.probe_name,
            self.progress,
            besides,
        )
        if not found.num_candidates:
            self.note(
                name, "no block that it alone uses is near to another model's: no differences are taken"
            )
            return
        if found.record.delta is None:
            self.note(
                name,
                f"{found.num_candidates} blocks are near to others, but no differences of low rank to them "
                f"keep the model near enough to itself ({found.num_trials} trials)",
            )
            return
        new = {each.id: each for each in found.adapters if each.id not in self.manifest.adapters}
        for adapter in new.values():
            self.draft.store_adapter(adapter)
        self.manifest.models[name] = found.record
        added = sum(adapter.num_bytes for adapter in new.values())
        self.adapter_bytes[name] += added
        freed = set(found.record.delta.own_blocks.values())
        self.reports[name] = replace(
            report,
            num_reused=report.num_reused + len(found.record.delta.own_blocks),
            model_bytes=model_bytes(self.manifest, found.record),
            new_bytes=report.new_bytes + added - sum(self.manifest.blocks[key].num_bytes for key in freed),
        )
        self.note(name, delta_text(found.record))

    def find_surrogate(self, source: Source, encoded: list[list[int]], kind: str) -> None:
        """Give a model the surrogate that pays most, or none."""
        name, before = source.name, set(self.manifest.blocks)
        record = self.manifest.models[name]
        asked = surrogates.Asked(
            kind, self.probe_name, encoded, self.options.calibration_texts, self.options.dtype
        )
        chosen = surrogates.known_surrogate(self.draft, record, asked)
        if chosen is None:
            given = replace(record, chain=self.given[name].chain) if self.can_be_quantized(name) else None
            found = surrogates.find_surrogate(
                source, self.draft, record, given, asked, self.maker, self.progress
            )
            if found is None:
                self.note(
                    name, f"no surrogate to try with --surrogate {kind}: its base is quantized in the zoo"
                )
            elif found.speedup < surrogates.LEAST_SPEEDUP:
                self.note(
                    name, f"no surrogate pays; the best would be a {self.surrogate_said(record, found)}"
                )
            else:
                chosen = found.record(kind, self.probe_name)
        changed = replace(record, surrogate=chosen)
        self.manifest.models[name] = changed
        if chosen is not None:
            more = sum(self.manifest.blocks[key].num_bytes for key in {*chosen.blocks.values()} - before)
            report = self.reports[name]
            self.reports[name] = replace(report, new_bytes=report.new_bytes + more)
            self.note(name, surrogate_text(self.manifest, changed))

    def surrogate_said(self, record: ModelRecord, found: surrogates.Found) -> str:
        """What one that is not kept would have given."""
        kind = self.options.surrogate or "auto"
        return surrogate_text(self.manifest, replace(record, surrogate=found.record(kind, self.probe_name)))

    def note_left_behind(self) -> None:
        """Say of each model that was replaced which adapters go on with the old one."""
        for name in [name for name, report in self.reports.items() if report.status == "replaced"]:
            stay = left_behind(self.manifest, name, self.reports)
            if stay:
                self.note(name, f"adapters that stay on the old {name} (compile them too): {', '.join(stay)}")

    def note_all(self, name: str, lines: Sequence[str]) -> None:
        for said in lines:
            self.note(name, said)

    def note(self, name: str, said: str) -> None:
        self.reports[name] = replace(self.reports[name], notes=(*self.reports[name].notes, said))

    def maker(self, precision: Precision | None) -> EngineMaker:
        if precision not in self.makers:
            from blockzoo.engines.openvino import OpenVINOEngines

            self.makers[precision] = OpenVINOEngines(precision, self.options.threads)
        return self.makers[precision]

    def packed_kv(self) -> EngineMaker:
        from blockzoo.engines.openvino import OpenVINOEngines

        return OpenVINOEngines("f32", self.options.threads, kv_precision="u8")

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
