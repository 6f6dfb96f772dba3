"""Surrogates: cheaper chains that guess what a model says next, and which of them pays.

Tried are chains that leave blocks out (as SWIFT, Xia et al., 2024, does; here they go in the order in which
the first guess misses them least), the model's blocks in 4 bits, these with blocks left out too, and smaller
models of the zoo with the same tokenizer. What a step costs is taken from times of single blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from blockzoo.build.draft import Draft, weights
from blockzoo.build.draft_trial import Chain, DraftTrial
from blockzoo.build.own_text import MakerOf, starts
from blockzoo.build.progress import Progress
from blockzoo.build.quantized_models import in_four_bits
from blockzoo.build.sources import Source
from blockzoo.build.verify import check_memory
from blockzoo.engines.base import EngineMaker
from blockzoo.engines.probe import time_block
from blockzoo.zoo.blocks import Block, Dtype
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import SURROGATES, BlockRecord, Manifest, ModelRecord, SurrogateRecord, is_drafter
from blockzoo.zoo.summary import model_bytes

LEAST_SPEEDUP = 1.1
"""Hoped for, of a surrogate that is kept: the runtime asks as much before it drafts."""
_LENGTHS = (3, 7, 15)  # that the runtime drafts
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the blocks that may be left out
_SMALLER, _MOST_MODELS = 0.6, 3  # of other models: bytes relative to the own, and how many are tried
_TIMES = 9  # that a block is timed


@dataclass(frozen=True, slots=True)
class Found:
    """The best surrogate of a model.

    Attributes:
        model: another one; None: a chain.
        blocks: of that.
        acceptance: of the first guess and those behind it, where those before came true.
        cost: of a step of one row, relative to the model's.
        speedup: hoped for.
        num_guesses: first ones that were tried.
    """

    model: str | None
    blocks: Chain
    acceptance: tuple[float, ...]
    cost: float
    speedup: float
    num_guesses: int

    def record(self, asked: str, probe: str) -> SurrogateRecord:
        """For the manifest."""
        figures = self.acceptance, self.cost, self.speedup, self.num_guesses
        return SurrogateRecord(asked, self.model, dict(self.blocks), *figures, probe)


class Costs:
    """Seconds of chains of single blocks.

    Args:
        read: id of a block -> the block.
        blocks: of the manifest.
        maker: of engines, as the model is served.
    """

    def __init__(
        self, read: Callable[[str], Block], blocks: Mapping[str, BlockRecord], maker: EngineMaker
    ) -> None:
        self._read, self._blocks, self._maker = read, blocks, maker
        self._times: dict[tuple[str, int, bool], float] = {}  # by plan and rows

    def of(self, chain: Chain, rows: int, drafts: bool = False) -> float:
        """Of a step of a chain; `drafts`: it says what another one checks."""
        return sum(self._block(key, rows, drafts) for position, key in chain.items() if position)

    def _block(self, key: str, rows: int, drafts: bool) -> float:
        known = self._blocks[key].plan, rows, drafts
        if known not in self._times:
            block = self._read(key)
            self._times[known] = time_block(self._maker, block, rows, _TIMES, drafts)
            block.drop_pages()
        return self._times[known]


def speedup(acceptance: Sequence[float], cost: float, rows: Callable[[int], float]) -> float:
    """Hoped for, with the best of the lengths that are drafted.

    Args:
        acceptance: of guesses by place.
        cost: of a step of one row of the surrogate, relative to the model's.
        rows: what a step of so many rows of the model costs, relative to one of one row.
    """
    best = 0.0
    for length in _LENGTHS:
        tokens = chance = 1.0
        for place in range(length):
            chance *= acceptance[min(place, len(acceptance) - 1)]
            tokens += chance
        best = max(best, tokens / (length * cost + rows(1 + length)))
    return best


def search(
    trial: DraftTrial,
    costs: Costs,
    own: Sequence[str],
    others: Sequence[str] | None,
    leaves_out: bool,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Found | None:
    """The chain over the model's own K and V that gives the most; None where there is none to try.

    Args:
        trial: of the model.
        costs: of blocks.
        own: the model's chain.
        others: the same in 4 bits; None: not tried.
        leaves_out: whether chains with blocks left out are tried.
        on_step: told of trials done, and of how many there are at most.
    """
    model = dict(enumerate(own))
    optional = list(range(1, len(own) - 3)) if leaves_out else []  # not the last layer, nor the ends
    chains = [model] if others is None else [model, dict(enumerate(others))]
    total = len(optional) + len(chains) * (1 + len(_SHARES))
    missed: dict[int, float] = {}
    for done, position in enumerate(optional):
        on_step(done, total)
        missed[position] = 1 - trial.acceptance(_without(model, [position]), 1)[0]
    order = sorted(optional, key=lambda position: missed[position])
    counts = sorted({0, *(round(share * len(order)) for share in _SHARES)})
    one = costs.of(model, 1)
    best: Found | None = None
    done = len(optional)
    for chain in chains:
        for count in counts:
            on_step(done, total)
            done += 1
            tried = _without(chain, order[:count])
            if tried == model:
                continue
            cost, rates = costs.of(tried, 1, drafts=True) / one, trial.acceptance(tried)
            gain = speedup(rates, cost, lambda rows: costs.of(model, rows) / one)
            if best is None or gain > best.speedup:
                best = Found(None, tried, rates, cost, gain, trial.num_guesses)
    on_step(total, total)
    return best


def _without(chain: Chain, positions: Sequence[int]) -> dict[int, str]:
    return {at: key for at, key in chain.items() if at not in positions}


@dataclass(frozen=True, slots=True)
class Asked:
    """What surrogate a model is to have.

    Attributes:
        kind: one of `SURROGATES`, or the name of another model.
        probe_name, probe: text to judge by, as token ids; none: the model's own behind built-in prompts.
        num_texts: of the model's own that rounding to 4 bits looks at.
        dtype: that the model's weights were converted to.
    """

    kind: str
    probe_name: str
    probe: Sequence[Sequence[int]]
    num_texts: int
    dtype: Dtype | None


def find_surrogate(
    source: Source,
    draft: Draft,
    record: ModelRecord,
    given: ModelRecord | None,
    asked: Asked,
    maker: MakerOf,
    progress: Progress,
) -> Found | None:
    """The best surrogate of a model, with its blocks in the draft; None where there is none to try.

    Args:
        source: what the model was given as.
        record: of the model.
        given: the same with its blocks as they were given; None: those are gone, so none are put in 4 bits.
        maker: gives engines of a precision; None: the one used for serving.

    Raises:
        VerificationError: there is too little memory.
    """
    others = None
    if asked.kind in ("auto", "int4") and given is not None:
        others = in_four_bits(source, draft, given, asked.num_texts, asked.dtype, maker, progress)
        if others == record.chain:
            others = None
    read, engines, name = draft.zoo.read_block, maker(None), source.name
    models = _drafters(draft.manifest, name, asked.kind)
    theirs = [key for model in models for key in draft.manifest.models[model].chain]
    check_memory(name, [read(key) for key in (*record.chain, *(others or ()), *theirs)])
    trial = DraftTrial(
        read,
        record,
        {position: draft.zoo.read_adapter(key) for position, key in record.adapters.items()},
        engines,
        asked.probe or starts(source, record),
        lambda done, total: progress(f"texts of {name}", done, total),
    )
    costs = Costs(read, draft.manifest.blocks, engines)
    found = [
        search(
            trial,
            costs,
            record.chain,
            others,
            asked.kind in ("auto", "layers"),
            lambda done, total: progress(f"trying surrogates of {name}", done, total),
        )
    ]
    for model in models:
        progress(f"trying {model} for {name}", len(found) - 1, len(models))
        found.append(_other_model(model, draft, trial, costs, record, engines))
    return max((each for each in found if each is not None), key=lambda each: each.speedup, default=None)


def _drafters(manifest: Manifest, name: str, kind: str) -> list[str]:
    """The models that are tried. Raises ZooError where one that is asked for cannot guess."""
    if kind not in SURROGATES:
        if not is_drafter(manifest, kind, name):
            raise ZooError(
                f"--surrogate {kind}: no other model of the zoo that speaks of the same tokens as {name}; "
                f"expected one, or {', '.join(SURROGATES)}"
            )
        return [kind]
    if kind != "auto":
        return []
    most = _SMALLER * model_bytes(manifest, manifest.models[name])
    sizes: dict[tuple[str, ...], tuple[int, str]] = {}  # by chain: of fine-tunes by LoRA, one is enough
    for other, record in manifest.models.items():
        size = model_bytes(manifest, record)
        if size <= most and is_drafter(manifest, other, name):
            sizes[record.chain] = min(sizes.get(record.chain, (size, other)), (size, other))
    return [other for _, other in sorted(sizes.values())[:_MOST_MODELS]]


def _other_model(
    name: str, draft: Draft, trial: DraftTrial, costs: Costs, record: ModelRecord, maker: EngineMaker
) -> Found:
    """What another model gives along the texts of a trial."""
    other = draft.manifest.models[name]
    adapters = {position: draft.zoo.read_adapter(key) for position, key in other.adapters.items()}
    along = DraftTrial(draft.zoo.read_block, other, adapters, maker, [[0]], texts=trial.texts)
    chain, model = dict(enumerate(other.chain)), dict(enumerate(record.chain))
    one = costs.of(model, 1)
    cost, rates = costs.of(chain, 1) / one, along.acceptance(chain)
    gain = speedup(rates, cost, lambda rows: costs.of(model, rows) / one)
    return Found(name, {}, rates, cost, gain, along.num_guesses)


def known_surrogate(draft: Draft, record: ModelRecord, asked: Asked) -> SurrogateRecord | None:
    """What a model of the same weights got that was asked for the same; None where there is none."""
    for other in draft.manifest.models.values():
        found = other.surrogate
        if found is None or (found.asked, found.probe) != (asked.kind, asked.probe_name):
            continue
        if weights(other) == weights(record) and all(map(draft.is_whole, found.blocks.values())):
            return found
    return None
