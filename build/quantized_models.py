"""Models with quantized weights: which blocks in how many bits, and whether that is near enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import numpy as np

from blockzoo.build import groups
from blockzoo.build.bits import Trial, affordable
from blockzoo.build.draft import Draft
from blockzoo.build.likeness import Judged, Reference
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

_BITS: tuple[QuantizedDtype, QuantizedDtype] = ("i8", "i4")
_MARGIN = 0.98  # of the bound: the chain is judged once more as a whole, which rounds otherwise
_WEIGHED_BY = 256  # tokens of the probe text, each block alone
_ROUNDED = "int8 activations"

_Step = tuple[int, ...]  # positions in a chain that change together


@dataclass(frozen=True, slots=True)
class Asked:
    """How a model is to be quantized.

    Attributes:
        weights, max_kl: what for, and how far from what was given at most.
        probe_name, probe: text to judge by, as token ids; none: the model's own.
        judge: whether it is judged at all; "auto" is in any case.
        threads: of engines.
        num_texts: of its own that rounding looks at; 0: rounds to nearest.
        group: columns that share a scale in "int8"; None: as many as the model bears.
    """

    weights: Weights
    max_kl: float
    probe_name: str
    probe: Sequence[Sequence[int]]
    judge: bool
    threads: int | None
    num_texts: int
    group: int | None = None


def quantize(
    source: Source,
    draft: Draft,
    record: ModelRecord,
    asked: Asked,
    dtype: Dtype | None,
    maker: MakerOf,
    progress: Progress,
) -> ModelRecord:
    """The record of a model with quantized blocks, which are in the draft then; in a dry run, as if.

    Args:
        source: what the model was given as.
        record: the model with its blocks as they were given.
        dtype: that these were converted to.
        maker: gives engines of a precision; None: the one used for serving.

    Raises:
        VerificationError: it is further from what was given than it may be.
    """
    model = _Model(source, draft, record, asked, dtype, maker, progress)
    group = model.choose_group()
    empty = QuantizationRecord(asked.weights, asked.max_kl, 0.0, {}, 0, asked.probe_name, group)
    if draft.writer is None:
        chain = model.made(model.uniform())
        return replace(record, chain=chain, quantization=empty)
    choice = model.affordable() if asked.weights == "auto" else model.uniform()
    chain = model.made(choice)
    if not asked.judge:
        return replace(record, chain=chain, quantization=empty)
    return replace(record, chain=chain, quantization=model.judged(chain, empty))


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

    `num_texts`: of its own that rounding looks at.
    """
    asked = Asked("int4", MAX_KL["int4"], "", (), False, None, num_texts)
    model = _Model(source, draft, record, asked, dtype, maker, progress)
    return model.made(model.uniform())


class _Model:
    """A model that is being quantized."""

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
        self._source, self._draft, self._record, self._asked = source, draft, record, asked
        self._maker, self._progress = maker, progress
        self._text = OwnText(
            source, record, draft.zoo, asked.num_texts, asked.probe_name, asked.probe, maker, progress
        )
        calibration = Calibration(lambda: oracle_for(source, True, dtype), self._text.calibration)
        self._quantizer = Quantizer(draft, source.name, record, calibration, progress)

    def choose_group(self) -> int:
        """How many columns share a scale in blocks of 8 bits, from now on: a block of another model's tells,
        so that it is shared, else the model itself. Raises VerificationError for too little memory."""
        if self._asked.weights == "int8":
            self._quantizer.group = self._asked.group or self._group()
        return self._quantizer.group

    def _group(self) -> int:
        record, draft = self._record, self._draft
        stored = groups.in_use(draft.manifest.blocks, record.chain)
        if stored is not None:
            return stored
        if draft.writer is None:  # there is nothing to try
            return GROUP
        blocks = [draft.zoo.read_block(key) for key in record.chain]
        keeps_some = (self._quantizer.keeps_some(at, "i8") for at in range(len(blocks)))
        if not groups.fitting(blocks) or any(keeps_some):  # what is kept has these groups in any case
            return GROUP
        from blockzoo.engines.openvino.engine import RoundedActivations  # heavy

        return groups.largest_borne(
            self._judged(),
            blocks,
            self._maker("f32"),
            lambda group: RoundedActivations(self._asked.threads, group),
            groups.SHARE * self._asked.max_kl,
        )

    def _judged(self) -> Judged:
        adapters = {i: self._draft.zoo.read_adapter(key) for i, key in self._record.adapters.items()}
        text, record = self._text, self._record
        return Judged(self._source.name, record.config, adapters, text.prompts(), text.judged())

    def uniform(self) -> Choice:
        """As much as is asked for, of every block."""
        return uniform(self._draft, self._record.chain, "i4" if self._asked.weights == "int4" else "i8")

    def affordable(self) -> Choice:
        """As few bits of each block as the bound allows. Raises VerificationError for too little memory."""
        draft, chain, bound = self._draft, self._record.chain, _MARGIN * self._asked.max_kl
        eight, four = (uniform(draft, chain, dtype) for dtype in _BITS)
        decided = self._decided(four)
        free = [at for at in four if four[at] == "i4" and decided.get(at) != "i8"]
        eight |= {at: "i4" for at in free if self._quantizer.keeps(at, "i4")}  # nothing is lost by it
        self._quantizer.make([eight, four])
        in_eight, in_four = (
            {at: key for at, key in enumerate(self._quantizer.chain(choice)) if at in choice}
            for choice in (eight, four)
        )
        adapters = {i: draft.zoo.read_adapter(key) for i, key in self._record.adapters.items()}
        check_memory(self._source.name, [draft.zoo.read_block(key) for key in chain] * 2)
        texts = self._text.judged()
        trial = Trial(draft.zoo.read_block, self._record, adapters, self._maker("f32"), texts)
        few = 1 + sum(total < _WEIGHED_BY for total in accumulate(len(text.tokens) for text in texts))
        before = {**in_eight, **{at: in_four[at] for at in decided if decided[at] == "i4"}}
        if decided and trial.kl(before) > bound:  # too far for this model: it decides anew
            decided, before = {}, in_eight
        if trial.kl(before) <= bound:
            steps: list[_Step] = [(at,) for at in four if four[at] != eight[at] and at not in decided]
            after = in_four
        else:
            steps = self._steps_to_eight(eight)
            before, after = {}, in_eight
        blocks = draft.manifest.blocks

        def replaced(taken: Sequence[_Step]) -> dict[int, str]:
            return {**before, **{at: after[at] for step in taken for at in step}}

        costs: dict[_Step, float] = {}
        for step in steps:
            self._progress(f"weighing blocks of {self._source.name}", len(costs), len(steps))
            costs[step] = trial.kl({at: after[at] for at in step}, few)
        saved = {
            step: sum(
                blocks[before.get(at, chain[at])].num_bytes - blocks[after[at]].num_bytes for at in step
            )
            for step in steps
        }
        taken = affordable(costs, saved, lambda some: trial.kl(replaced(some)) <= bound)
        self._progress(f"weighing blocks of {self._source.name}", len(steps), len(steps))
        positions = {at for step in taken for at in step}
        if before:
            return {at: "i4" if at in positions else decided.get(at, eight[at]) for at in eight}
        return {at: eight[at] for at in positions}

    def _decided(self, wanted: Choice) -> dict[int, QuantizedDtype]:
        """What blocks are stored in that other models have too: a base and its LoRAs stay together."""
        manifest = self._draft.manifest
        chains = [model.chain for name, model in manifest.models.items() if name != self._source.name]
        made = [manifest.blocks[key].quantized for chain in chains for key in chain]
        stored = {each.source: each.dtype for each in made if each is not None}
        chain = self._record.chain
        return {at: stored[chain[at]] for at in wanted if wanted[at] == "i4" and chain[at] in stored}

    def _steps_to_eight(self, eight: Choice) -> list[_Step]:
        """Positions that go to 8 bits together: a tied head goes with its embedding."""
        last = len(self._record.chain) - 1
        tied = self._draft.manifest.blocks[self._record.chain[last]].tied_to is not None
        ends = {0, last} if tied else set()
        together = [tuple(sorted(ends))] if ends else []
        return together + [(at,) for at in eight if at not in ends]

    def made(self, choice: Choice) -> tuple[str, ...]:
        """The chain of a choice."""
        self._quantizer.make([choice])
        return self._quantizer.chain(choice)

    def judged(self, chain: Sequence[str], record: QuantizationRecord) -> QuantizationRecord:
        """With the figures of a chain. Raises VerificationError beyond the bound."""
        from blockzoo.engines.openvino.engine import OpenVINOEngines, RoundedActivations, multiplies_int8

        name, judged = self._source.name, self._judged()
        given, blocks = (
            [self._draft.zoo.read_block(key) for key in keys] for keys in (self._record.chain, chain)
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
        threads = self._asked.threads
        rounding = (
            OpenVINOEngines(num_threads=threads, int8_activations=True)
            if multiplies_int8()
            else RoundedActivations(threads)
        )
        figures[_ROUNDED] = reference.figures(rounding, blocks)
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
