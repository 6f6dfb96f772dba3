"""Models with quantized weights, and whether they are near enough; for "auto" see `common_bits`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import numpy as np

from blockzoo.build import groups
from blockzoo.build.bits import Trial
from blockzoo.build.draft import Draft
from blockzoo.build.likeness import Judged, Reference, Strayed
from blockzoo.build.originals import oracle_for
from blockzoo.build.own_text import MakerOf, OwnText
from blockzoo.build.progress import Progress
from blockzoo.build.quantize import Calibration, Choice, Quantizer, uniform
from blockzoo.build.sources import Source
from blockzoo.build.verify import VerificationError, check_memory
from blockzoo.zoo.blocks import Dtype
from blockzoo.zoo.manifest import ModelRecord, QuantizationFigures, QuantizationRecord
from blockzoo.zoo.packing import GROUP, QuantizedDtype

Weights = Literal["int8", "int4", "auto"]

MAX_KL: Mapping[Weights, float] = {"int8": 0.02, "int4": 0.5, "auto": 0.02}
"""Bounds on the divergence from the weights as they were given, in nats, where none is asked for."""

MIN_TOP1 = 0.95
"""Bound on the share of positions with the same likeliest token, of "auto" where no bound is asked for."""

_MARGIN = 0.98  # of the bound: the chain is judged once more as a whole, which rounds otherwise
_WEIGHED_BY = 256  # tokens of the probe text, each block alone
_ROUNDED = "int8 activations"


@dataclass(frozen=True, slots=True)
class Asked:
    """How a model is to be quantized.

    Attributes:
        weights, max_kl: what for, and how far from what was given at most.
        probe_name, probe: text to judge by, as token ids; none: the model's own.
        judge: whether it is judged at all; "auto" is in any case.
        threads: of engines.
        num_texts: of its own that rounding looks at; 0: rounds to nearest.
        group: columns that share a scale, or `WHOLE_ROW`; None: as many as the model bears, of "int4" 32.
        min_top1: "auto": share of positions with the same likeliest token at least.
    """

    weights: Weights
    max_kl: float
    probe_name: str
    probe: Sequence[Sequence[int]]
    judge: bool
    threads: int | None
    num_texts: int
    group: int | None = None
    min_top1: float = 0.0


def in_four_bits(
    source: Source,
    draft: Draft,
    record: ModelRecord,
    num_texts: int,
    dtype: Dtype | None,
    maker: MakerOf,
    progress: Progress,
) -> tuple[str, ...]:
    """The chain of a model, with its blocks as they were given, in 4 bits; not judged. In the draft then.

    In groups as large as its matrices allow, for speed, unless there are others in the zoo.

    `num_texts`: of its own that rounding looks at.
    """
    asked = Asked("int4", MAX_KL["int4"], "", (), False, None, num_texts)
    model = GivenModel(source, draft, record, asked, dtype, maker, progress)
    stored = model.stored_group()
    largest, *_ = groups.larger(draft.manifest.blocks[key].spec for key in record.chain) or [GROUP]
    model.quantizer.group = largest if stored is None else stored
    return model.made(model.uniform())


class GivenModel:
    """A model that is being quantized.

    Args:
        source: what it was given as.
        draft: where its blocks are, and where the quantized ones go.
        record: the model with its blocks as they were given.
        asked: for.
        dtype: that these were converted to.
        maker: gives engines of a precision; None: the one used for serving.
        progress: told of.
    """

    def __init__(
        self,
        source: Source,
        draft: Draft,
        record: ModelRecord,
        asked: Asked,
        dtype: Dtype | None,
        maker: MakerOf,
        progress: Progress,
    ) -> None:
        self.name, self.record, self.bound = source.name, record, _MARGIN * asked.max_kl
        self._source, self._draft, self._asked = source, draft, asked
        self._maker, self._progress = maker, progress
        self._text = OwnText(
            source, record, draft.zoo, asked.num_texts, asked.probe_name, asked.probe, maker, progress
        )
        calibration = Calibration(lambda: oracle_for(source, True, dtype), self._text.calibration)
        self.quantizer = Quantizer(draft, source.name, record, calibration, progress)

    @property
    def _dtype(self) -> QuantizedDtype:
        """What blocks are put in before any choice."""
        return "i4" if self._asked.weights == "int4" else "i8"

    def uniform(self) -> Choice:
        """As much as is asked for, of every block."""
        return uniform(self._draft, self.record.chain, self._dtype)

    def bears(self, strayed: Strayed) -> bool:
        """Whether it may be so far from what was given."""
        return strayed.kl <= self.bound and strayed.top1 >= self._asked.min_top1

    def trial(self) -> Trial:
        """Along the text by which the model is judged. Raises VerificationError for too little memory."""
        record, zoo = self.record, self._draft.zoo
        adapters = {i: zoo.read_adapter(key) for i, key in record.adapters.items()}
        check_memory(self.name, [zoo.read_block(key) for key in record.chain] * 2)
        return Trial(zoo.read_block, record, adapters, self._maker("f32"), self._text.judged())

    def num_weighed(self) -> int:
        """How many of these texts each block is tried over alone."""
        lengths = accumulate(len(text.tokens) for text in self._text.judged())
        return 1 + sum(total < _WEIGHED_BY for total in lengths)

    def stored_group(self) -> int | None:
        """How many columns share a scale in a block of another model that it may share; None: it has none."""
        return groups.in_use(self._draft.manifest, self.record.chain, [self._dtype])

    def group(self) -> int:
        """How many columns share a scale: as in a block of another model, so that it is shared, or as many as
        the model bears. Raises VerificationError for too little memory."""
        record, draft = self.record, self._draft
        stored = self.stored_group()
        if stored is not None:
            return stored
        if self._dtype == "i4" or draft.writer is None:  # 4 bits lose enough; nothing to try
            return GROUP
        blocks = [draft.zoo.read_block(key) for key in record.chain]
        keeps_some = (self.quantizer.keeps_some(at, "i8") for at in range(len(blocks)))
        larger = groups.larger(block.spec for block in blocks)
        if not larger or any(keeps_some):  # what is kept has these groups in any case
            return GROUP
        from blockzoo.engines.openvino.engine import RoundedActivations  # heavy

        return groups.largest_borne(
            self._compared(),
            blocks,
            larger,
            self._maker("f32"),
            lambda group: RoundedActivations(self._asked.threads, group),
            groups.SHARE * self._asked.max_kl,
        )

    def quantized(self, choice: Choice) -> ModelRecord:
        """Its record with the blocks of a choice, which are in the draft then; in a dry run, as if.

        Raises VerificationError: it is further from what was given than it may be.
        """
        asked = self._asked
        if asked.weights != "auto":  # which has chosen before
            self.quantizer.group = self.group() if asked.group is None else asked.group
        chain, group = self.made(choice), self.quantizer.group
        found = QuantizationRecord(
            asked.weights, asked.max_kl, 0.0, {}, 0, asked.probe_name, group, min_top1=asked.min_top1
        )
        if self._draft.writer is not None:
            zoo = self._draft.zoo
            in_matrices = groups.in_matrices([zoo.read_block(key) for key in chain])
            found = replace(found, group_made=in_matrices)
            found = self._judged(chain, found) if asked.judge else found
        return replace(self.record, chain=chain, quantization=found)

    def made(self, choice: Choice) -> tuple[str, ...]:
        """The chain of a choice."""
        self.quantizer.make([choice])
        return self.quantizer.chain(choice)

    def _compared(self) -> Judged:
        adapters = {i: self._draft.zoo.read_adapter(key) for i, key in self.record.adapters.items()}
        text = self._text
        return Judged(self.name, self.record.config, adapters, text.prompts(), text.judged())

    def _judged(self, chain: Sequence[str], record: QuantizationRecord) -> QuantizationRecord:
        """With the figures of a chain. Raises VerificationError beyond the bound."""
        from blockzoo.engines.openvino.engine import rounding_engines  # heavy

        name, judged = self.name, self._compared()
        given, blocks = (
            [self._draft.zoo.read_block(key) for key in keys] for keys in (self.record.chain, chain)
        )
        what, steps = f"judging {name}", len(judged.prompts) + 4
        reference = Reference(
            judged, self._maker("f32"), given, lambda done: self._progress(what, done, steps)
        )
        figures: dict[str, QuantizationFigures] = {}
        figures["f32"] = reference.figures(self._maker("f32"), blocks)
        self._progress(what, steps - 3, steps)
        serving = self._maker(None)
        if serving.precision != "f32":
            figures[serving.precision] = reference.figures(serving, blocks)
            self._progress(what, steps - 2, steps)
            figures[f"given {serving.precision}"] = reference.figures(serving, given)
        self._progress(what, steps - 1, steps)
        figures[_ROUNDED] = reference.figures(rounding_engines(self._asked.threads), blocks)
        self._progress(what, steps, steps)
        for how in ("f32", _ROUNDED, serving.precision):
            if how in figures and not np.isfinite(figures[how].kl):
                raise VerificationError(f"{name}: with quantized weights it gives NaN or infinity in {how}")
        if figures["f32"].kl > record.max_kl:
            raise VerificationError(
                f"{name}: with weights in {record.weights} it strays from itself by {figures['f32'].kl:.3g} "
                f"nats (same top token {figures['f32'].top1:.1%}); at most {record.max_kl:g} are allowed: "
                "ask for more bits, or raise --max-kl"
            )
        count = sum(len(text.tokens) - text.start for text in judged.texts)
        return replace(record, perplexity=reference.perplexity, figures=figures, num_tokens=count)
