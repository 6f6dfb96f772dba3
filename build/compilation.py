"""What the stages of a compilation share: options, the manifest as it grows, what is said of each model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blockzoo.build import equivalence, quantized_models
from blockzoo.build.compile_options import CompileOptions
from blockzoo.build.draft import Draft, weights
from blockzoo.build.progress import Progress
from blockzoo.build.quantized_models import Weights
from blockzoo.build.report import CompileReport, ModelReport, Status, left_behind
from blockzoo.build.sources import Source
from blockzoo.build.tensorrt_plans import PlanReport
from blockzoo.build.verify import PROMPTS, encode_texts
from blockzoo.engines.base import EngineMaker, Precision
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import ModelRecord
from blockzoo.zoo.summary import sharing_bytes


class Compilation:
    """One compilation; its stages are in `given_models` and `replacing`."""

    def __init__(self, draft: Draft, options: CompileOptions, progress: Progress) -> None:
        self.draft, self.options, self.progress = draft, options, progress
        self.manifest, self.writer, self.old, self.zoo = draft.manifest, draft.writer, draft.old, draft.zoo
        self.reports: dict[str, ModelReport] = {}
        self.plans: PlanReport | None = None
        self.makers: dict[Precision | None, EngineMaker] = {}
        self.given: dict[str, ModelRecord] = {}  # as they were cut, by name
        self.adapter_bytes: dict[str, int] = {}  # of new ones

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

    @property
    def probe_name(self) -> str:
        """What the probe text is called in the manifest."""
        return Path(self.options.probe).name if self.options.probe is not None else "built-in"

    def status(self, name: str, record: ModelRecord) -> Status:
        """What becomes of a model. Raises ZooError where it would be replaced unasked."""
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
        """What makes a model the one that was given: equal for the same one."""
        defaults, given = record.generation_defaults, self.draft.unquantized(record)
        return record.config, record.tokenizer, record.end_ids, defaults, weights(given)

    def quantized_before(self, name: str, old: ModelRecord) -> bool:
        """Whether a model of the zoo is quantized as is asked for now."""
        found, options = old.quantization, self.options
        asked = options.weights if name not in self.given or self.can_be_quantized(name) else None
        if found is None or asked is None:
            return found is None and asked is None
        same_group = asked == "auto" or options.group_size in (None, found.group)
        bounds = (found.max_kl, found.min_top1) == (self.max_kl(asked), self.min_top1(asked))
        return (found.weights, found.probe) == (asked, self.probe_name) and bounds and same_group

    def can_be_quantized(self, name: str) -> bool:
        """Whether the blocks of a model are there as they were given."""
        chain = self.given[name].chain
        return not any(self.manifest.blocks[key].is_quantized for key in chain)

    def max_kl(self, asked: Weights) -> float:
        """The bound on what quantization may lose, in nats."""
        return quantized_models.MAX_KL[asked] if self.options.max_kl is None else self.options.max_kl

    def min_top1(self, asked: Weights) -> float:
        """The bound on the share of equal likeliest tokens, which "auto" has."""
        options = self.options
        if options.min_top1 is not None:
            return options.min_top1
        return quantized_models.MIN_TOP1 if asked == "auto" and options.max_kl is None else 0.0

    def maker(self, precision: Precision | None) -> EngineMaker:
        """Engines of a precision; None: the one used for serving."""
        if precision not in self.makers:
            from blockzoo.engines.openvino import OpenVINOEngines

            self.makers[precision] = OpenVINOEngines(precision, self.options.threads)
        return self.makers[precision]

    def packed_kv(self, blocks: Sequence[Block]) -> EngineMaker | None:
        """Engines in f32 with K and V in 8 bits, to judge them by; None where blocks cannot have that, or it
        is not asked for."""
        from blockzoo.engines.openvino import OpenVINOEngines
        from blockzoo.engines.openvino.engine import against_u8

        if not self.options.judge_kv or against_u8(block.spec for block in blocks) is not None:
            return None
        return OpenVINOEngines("f32", self.options.threads, kv_precision="u8")

    def note_left_behind(self) -> None:
        """Say of each model that was replaced which adapters go on with the old one."""
        for name in [name for name, report in self.reports.items() if report.status == "replaced"]:
            stay = left_behind(self.manifest, name, self.reports)
            if stay:
                self.note(name, f"adapters that stay on the old {name} (compile them too): {', '.join(stay)}")

    def note_all(self, name: str, lines: Sequence[str]) -> None:
        """Say lines of a model."""
        for said in lines:
            self.note(name, said)

    def note(self, name: str, said: str) -> None:
        """Say a line of a model."""
        self.reports[name] = replace(self.reports[name], notes=(*self.reports[name].notes, said))

    def report(self, order: list[str], removed: tuple[str, ...], freed: int) -> CompileReport:
        """What was done."""
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
