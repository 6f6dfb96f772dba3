"""Full fine-tunes next to their base: near blocks become the other model's and a difference of low rank.

What is stored of a block is an adapter (`build.low_rank`) in 8 bits, served as any other: the base's products
run in the batch of all who share it, and the difference alone is the model's own. All blocks get one rank,
the smallest of a few that keeps the whole model within the bound over a probe text. Where the largest is not
enough, single blocks stay the model's own (`build.trials`). Embedding and head have no adapters: they are the
base's where the largest rank passes with those too, and else the model's own.

What tuning changed shows less in text at hand than where the model was tuned, and so does what a difference
leaves out of it. So where no bound is asked for, it is a share of how far the base's blocks alone are from
the model's own over the same text; and of the likeliest tokens about as many stay as in bf16.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from blockzoo.build.equivalence import candidates_of
from blockzoo.build.low_rank import Factors, cut_down, factors, in_eight_bits, rank_bytes
from blockzoo.build.oracle import Oracle
from blockzoo.build.own_text import OwnText
from blockzoo.build.partition import CutAdapter
from blockzoo.build.progress import Progress
from blockzoo.build.recover import MAX_RANK
from blockzoo.build.trials import Candidate, Probe, compose
from blockzoo.build.yardstick import Yardstick
from blockzoo.engines.base import EngineMaker
from blockzoo.zoo.blocks import PROJECTIONS, Adapter, Block
from blockzoo.zoo.manifest import DeltaRecord, LossRecord, ModelRecord
from blockzoo.zoo.store import Zoo

_SHARE_LEFT = 0.01
"""The bound on the divergence from the model's own blocks where none is asked for, as a share of that of the
other model's blocks without differences."""
_BF16_SHARE = 0.1
"""That bound is at least this share of what bf16 alone makes the model lose: where tuning changed hardly
anything, nobody can tell."""
_LIKELIEST_LOST = 0.01
"""Of the positions, those with another likeliest token, beyond the share that bf16 alone changes, where no
bound is asked for."""
_RANKS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, MAX_RANK)
_LEAST = 16  # ranks: with fewer a model strays where it was tuned, which text of its own shows too little of
_WORTH_IT = 0.3  # a difference of more than this share of its block's bytes is not
_MAX_TRIALS = 12


@dataclass(frozen=True, slots=True)
class Found:
    """A model with differences in the place of its own blocks.

    Attributes:
        record: of it; as it was, where none is near enough.
        adapters: those of `record` that are new.
        num_candidates, num_trials: blocks near other ones, and sets of them that were tried.
    """

    record: ModelRecord
    adapters: tuple[CutAdapter, ...]
    num_candidates: int
    num_trials: int


def take_differences(
    name: str,
    zoo: Zoo,
    text: OwnText,
    oracle: Oracle,
    maker: EngineMaker,
    max_kl: float | None,
    probe_name: str,
    progress: Progress,
    besides: Collection[str] = (),
) -> Found:
    """Look for blocks of other models that those of a model of the zoo are near to, and for the differences.

    Args:
        text: of the model.
        oracle: of the model.
        maker: of f32 engines.
        max_kl: bound on the divergence from the model's own blocks, in nats; None: a share of what tuning
            changed.
        besides: models whose blocks are not taken.
    """
    record = zoo.manifest.models[name]
    near = candidates_of(name, zoo, {name, *besides})
    if not any(zoo.manifest.blocks[key].spec.kind in PROJECTIONS for c in near for key in c.blocks.values()):
        return Found(record, (), 0, 0)
    return _Search(name, zoo, text, oracle, maker, max_kl, near, progress).found(probe_name)


class _Search:
    """Which rank, of which blocks."""

    def __init__(
        self,
        name: str,
        zoo: Zoo,
        text: OwnText,
        oracle: Oracle,
        maker: EngineMaker,
        max_kl: float | None,
        near: Sequence[Candidate],
        progress: Progress,
    ) -> None:
        self._name, self._zoo, self._max_kl, self._progress = name, zoo, max_kl, progress
        self._record = zoo.manifest.models[name]
        self._base = {at: key for candidate in near for at, key in candidate.blocks.items()}
        blocks = zoo.manifest.blocks
        self._inner = [at for at in sorted(self._base) if blocks[self._base[at]].spec.kind in PROJECTIONS]
        self._ends = [c for c in near if not c.blocks.keys() & {*self._inner}]
        self._ranks = self._worth_trying()
        self._factors = self._found_factors()
        self._cut: dict[str, tuple[str, CutAdapter | None]] = {}  # by a name of a trial: base and difference
        tried = [self._candidate(at, self._ranks[-1]) for at in self._inner]
        sequences = text.probe()
        self._probe = Probe(
            self._record.chain, self._record.config, self._read, maker, sequences, [*tried, *self._ends]
        )
        self._yardstick = Yardstick.of(oracle, sequences, self._probe.logits)
        bases = [Candidate({at: self._base[at]}) for at in self._inner]
        self._tuned_kl = self._loss([*bases, *self._ends]).stored.kl
        if max_kl is None:
            max_kl = max(_SHARE_LEFT * self._tuned_kl, _BF16_SHARE * self._yardstick.bf16.kl)
        self._bound = max(max_kl, 1e-12)
        self._losses: dict[frozenset[tuple[int, str]], LossRecord] = {}

    def _worth_trying(self) -> list[int]:
        """Ranks, ascending."""
        blocks = self._zoo.manifest.blocks
        most = min(
            _WORTH_IT * blocks[self._record.chain[at]].num_bytes / rank_bytes(blocks[self._base[at]].spec)
            for at in self._inner
        )
        fit = [rank for rank in _RANKS if rank <= most] or [_RANKS[0]]
        return [rank for rank in fit if rank >= _LEAST] or fit[-1:]

    def _found_factors(self) -> dict[int, Factors]:
        """By position, the differences in the largest rank."""
        found: dict[int, Factors] = {}
        for position in self._inner:
            self._progress(f"taking differences of {self._name}", len(found), len(self._inner))
            own, base = (
                self._zoo.read_block(self._record.chain[position]),
                self._zoo.read_block(self._base[position]),
            )
            found[position] = factors(own.spec, own.tensors, base.tensors, self._ranks[-1])
            own.drop_pages()
            base.drop_pages()
        self._progress(f"taking differences of {self._name}", 1, 1)
        return found

    def _candidate(self, position: int, rank: int) -> Candidate:
        """A block as a difference of a rank."""
        key = f"{self._base[position]}, rank {rank} at {position}"
        if key not in self._cut:
            cut = cut_down(self._factors[position], rank)
            self._cut[key] = self._base[position], None if cut is None else in_eight_bits(cut)
        return Candidate({position: key})

    def _read(self, position: int, key: str) -> tuple[Block, Adapter | None]:
        if key in self._cut:
            base, cut = self._cut[key]
            return self._zoo.read_block(base), None if cut is None else Adapter(cut.id, cut.spec, cut.tensors)
        adapter = self._record.adapters.get(position)
        own = adapter is not None and key == self._record.chain[position]
        return self._zoo.read_block(key), self._zoo.read_adapter(adapter) if adapter and own else None

    def found(self, probe_name: str) -> Found:
        """The best that the bound allows."""
        largest = [self._candidate(at, self._ranks[-1]) for at in self._inner]
        ends: list[Candidate] = []
        for end in self._ends:
            if self._judge([*largest, *ends, end]) <= 1:
                ends.append(end)
        taken = self._smallest_rank(ends)
        if taken is None:
            taken = compose(
                [*largest, *ends],
                self._probe.strays,
                self._judge,
                lambda chosen: len(self._losses) < _MAX_TRIALS,
            )
        self._progress(self._what, 1, 1)
        return self._as_record(taken, probe_name)

    def _smallest_rank(self, ends: Sequence[Candidate]) -> list[Candidate] | None:
        """All blocks in the smallest rank that passes; None where none does."""
        passed, low, high = None, 0, len(self._ranks)
        while low < high:
            middle = (low + high) // 2
            chosen = [*(self._candidate(at, self._ranks[middle]) for at in self._inner), *ends]
            if self._judge(chosen) <= 1:
                passed, high = chosen, middle
            else:
                low = middle + 1
        return passed

    @property
    def _what(self) -> str:
        return f"comparing {self._name}"

    def _judge(self, chosen: Sequence[Candidate]) -> float:
        """What a set loses, relative to what is borne."""
        self._progress(self._what, len(self._losses), _MAX_TRIALS)
        found = self._losses[_changes(chosen)] = self._loss(chosen)
        lost = found.bf16.top1 - found.stored.top1 if self._max_kl is None else 0.0
        return max(found.stored.kl / self._bound, lost / _LIKELIEST_LOST)

    def _loss(self, chosen: Sequence[Candidate]) -> LossRecord:
        """Of the model with a set in it."""
        return self._yardstick.judge(self._probe.trial(chosen), self._probe.logits)

    def _as_record(self, taken: Sequence[Candidate], probe_name: str) -> Found:
        num_trials = len(self._losses)
        made = {at: self._cut[key] for c in taken for at, key in c.blocks.items() if key in self._cut}
        if not made:
            return Found(self._record, (), len(self._inner), num_trials)
        adapters = {at: cut for at, (_, cut) in made.items() if cut is not None}
        replaced = {at: base for at, (base, _) in made.items()}
        replaced |= {at: key for c in taken for at, key in c.blocks.items() if key not in self._cut}
        chain, blocks = self._record.chain, self._zoo.manifest.blocks
        delta = DeltaRecord(
            own_blocks={at: chain[at] for at in sorted(replaced)},
            rank=max((cut.spec.rank for cut in adapters.values()), default=0),
            share=sum(cut.num_bytes for cut in adapters.values())
            / sum(blocks[chain[at]].num_bytes for at in replaced),
            max_kl=self._max_kl,
            loss=self._losses[_changes(taken)],
            probe=probe_name,
            tuned_kl=self._tuned_kl,
        )
        record = replace(
            self._record,
            chain=tuple(replaced.get(at, key) for at, key in enumerate(chain)),
            adapters={**self._record.adapters, **{at: cut.id for at, cut in adapters.items()}},
            delta=delta,
        )
        return Found(record, tuple(adapters.values()), len(self._inner), num_trials)


def _changes(candidates: Sequence[Candidate]) -> frozenset[tuple[int, str]]:
    return frozenset(item for candidate in candidates for item in candidate.blocks.items())
