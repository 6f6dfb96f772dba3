"""Bits by block for models that have blocks in common: one choice, which each bears along its own text.

A block in two versions takes more than the finer of them alone, and who bears the coarser one bears the finer
one too. So no block is stored twice for the sake of models that are compiled together, however little one of
them bears. What models that were there before have stored is not changed: what is taken of it costs nothing,
and what is too coarse is stored anew, as little of it as is enough.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from blockzoo.build import groups
from blockzoo.build.bits import Trial, affordable
from blockzoo.build.draft import Draft
from blockzoo.build.progress import Progress
from blockzoo.build.quantize import Choice, uniform
from blockzoo.build.quantized_models import GivenModel
from blockzoo.zoo.packing import QuantizedDtype

_BITS: tuple[QuantizedDtype, QuantizedDtype] = ("i8", "i4")
_LEAST = 1e-9  # nats

_Bits = Mapping[str, QuantizedDtype]  # block as it was given -> what it is stored in; others are left
_Step = tuple[str, ...]  # blocks as they were given that change together


def choose(draft: Draft, models: Sequence[GivenModel], progress: Progress) -> dict[str, Choice]:
    """By name of the model, as few bits of each block as the bounds of all that have it allow.

    The blocks of the choices are in the draft then. Raises VerificationError for too little memory.
    """
    found: dict[str, Choice] = {}
    for family in families(models):
        bits = _Family(draft, family, progress).bits()
        found |= {model.name: _by_position(model, bits) for model in family}
    return found


def families(models: Sequence[GivenModel]) -> list[list[GivenModel]]:
    """Models that have blocks in common, be it by way of others."""
    found: list[list[GivenModel]] = []
    for model in models:
        chain = set(model.record.chain)
        related = [each for each in found if any(not chain.isdisjoint(other.record.chain) for other in each)]
        found = [each for each in found if each not in related]
        found.append([*(other for each in related for other in each), model])
    return found


class _Start(NamedTuple):
    """What a search starts from, and where it goes."""

    before: _Bits
    saved: dict[_Step, int]
    """Bytes by step."""
    after: _Bits
    """What the blocks of steps are stored in when these are taken."""


class _Family:
    """Models that choose together."""

    def __init__(self, draft: Draft, models: Sequence[GivenModel], progress: Progress) -> None:
        self._draft, self._models, self._progress = draft, models, progress
        group = self._group()
        self._stored = set(self._stored_before(group))
        self._made: dict[tuple[str, QuantizedDtype], str] = {}  # (block as given, dtype) -> block
        self._eight: dict[str, QuantizedDtype] = {}
        self._four: dict[str, QuantizedDtype] = {}
        for model in models:
            model.quantizer.group = group
            self._make(model)
        self._open: tuple[str, Trial] | None = None

    def bits(self) -> _Bits:
        """What each block is stored in."""
        for start in self._starts():
            shares: list[Mapping[_Step, float]] = []
            for model in self._models:
                weighed = self._weighed(model, start)
                if weighed is None:
                    break
                shares.append(weighed)
            else:
                bears = [partial(self._bears, model, start) for model in self._models]
                return _with(start, affordable(shares, start.saved, bears))
        raise AssertionError("the last start changes nothing")

    def _group(self) -> int:
        """Columns that share a scale: as in what is stored, or as many as the first model bears."""
        chains = {key for model in self._models for key in model.record.chain}
        stored = groups.in_use(self._draft.manifest, chains, _BITS)
        return self._models[0].group() if stored is None else stored

    def _stored_before(self, group: int) -> Iterator[tuple[str, QuantizedDtype]]:
        """What blocks that other models have are made of, in such groups."""
        blocks, names = self._draft.manifest.blocks, {model.name for model in self._models}
        others = [record.chain for name, record in self._draft.manifest.models.items() if name not in names]
        for made in (blocks[key].quantized for chain in others for key in chain):
            if made is not None and made.group == group:
                yield made.source, made.dtype

    def _make(self, model: GivenModel) -> None:
        """Have what may be chosen in the draft. What loses nothing in 4 bits is not made in 8."""
        chain = model.record.chain
        eight, four = (uniform(self._draft, chain, dtype) for dtype in _BITS)
        for at, key in enumerate(chain):
            if four.get(at) == "i4" and key not in self._four and (key, "i8") not in self._stored:
                eight[at] = "i4" if model.quantizer.keeps(at, "i4") else "i8"
            elif key in self._eight:
                eight[at] = self._eight[key]
        model.quantizer.make([eight, four])
        for bits, choice in ((self._eight, eight), (self._four, four)):
            made = model.quantizer.chain(choice)
            bits |= {chain[at]: dtype for at, dtype in choice.items()}
            self._made |= {(chain[at], dtype): made[at] for at, dtype in choice.items()}

    def _starts(self) -> Iterator[_Start]:
        """The coarsest first: as stored before, else in 8 bits; all in 8 bits; as given."""
        stored, eight, four = self._stored, self._eight, self._four
        free = [key for key in four if four[key] != eight[key] and (key, "i8") not in stored]
        less = {key: self._bytes(key, "i8") - self._bytes(key, "i4") for key in free}
        saved: dict[_Step, int] = {(key,): less[key] for key in free if less[key] > 0}
        taken = {key: four[key] for key in free if (key, "i4") in stored}
        if taken:
            more = {step: count for step, count in saved.items() if taken.keys().isdisjoint(step)}
            yield _Start({**eight, **taken}, more, four)
        yield _Start(eight, saved, four)
        blocks, together = self._draft.manifest.blocks, dict[str, list[str]]()
        for key in eight:  # a tied head goes with its embedding
            together.setdefault(blocks[key].tied_to or key, []).append(key)
        given = {
            tuple(keys): sum(blocks[key].num_bytes - self._bytes(key, eight[key]) for key in keys)
            for keys in together.values()
        }
        yield _Start({}, given, eight)

    def _bytes(self, key: str, dtype: QuantizedDtype) -> int:
        """That a block takes in the zoo: none where it is there."""
        made = self._draft.manifest.blocks[self._made[key, dtype]]
        return 0 if (key, dtype) in self._stored else made.num_bytes

    def _weighed(self, model: GivenModel, start: _Start) -> dict[_Step, float] | None:
        """What each step with blocks of a model costs it alone, in parts of what it may still lose.

        None where it starts too far away.
        """
        few, own, trial = model.num_weighed(), set(model.record.chain), self._trial(model)
        strayed = trial.strays(self._replaced(model, start.before))
        if not model.bears(strayed):
            return None
        left = model.bound - strayed.kl
        steps = [step for step in start.saved if not own.isdisjoint(step)]
        shares: dict[_Step, float] = {}
        for step in steps:
            self._progress(f"weighing blocks of {model.name}", len(shares), len(steps))
            alone = {key: start.after[key] for key in step}
            shares[step] = trial.strays(self._replaced(model, alone), few).kl / max(left, _LEAST)
        self._progress(f"weighing blocks of {model.name}", len(steps), len(steps))
        return shares

    def _bears(self, model: GivenModel, start: _Start, taken: Sequence[_Step]) -> bool:
        return model.bears(self._trial(model).strays(self._replaced(model, _with(start, taken))))

    def _trial(self, model: GivenModel) -> Trial:
        """One at a time: each holds a chain in f32 and its hidden states."""
        if self._open is None or self._open[0] != model.name:
            self._open = None
            self._open = model.name, model.trial()
        return self._open[1]

    def _replaced(self, model: GivenModel, bits: _Bits) -> dict[int, str]:
        chain = model.record.chain
        return {at: self._made[chain[at], dtype] for at, dtype in _by_position(model, bits).items()}


def _with(start: _Start, taken: Sequence[_Step]) -> _Bits:
    return {**start.before, **{key: start.after[key] for step in taken for key in step}}


def _by_position(model: GivenModel, bits: _Bits) -> Choice:
    return {at: bits[key] for at, key in enumerate(model.record.chain) if key in bits}
