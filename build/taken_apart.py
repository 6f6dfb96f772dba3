"""Full checkpoints taken apart while they are compiled: other models' blocks, and adapters found; and single
blocks given back where a model loses too much by it."""

from collections.abc import Callable, Collection, Sequence

from blockzoo.build.draft import Draft
from blockzoo.build.partition import CutAdapter, CutBlock, block_tensors
from blockzoo.build.recover import NotLowRankError, nearest_block, recover
from blockzoo.build.sources import Source
from blockzoo.build.trials import MAX_FORWARDS, Candidate, Probe, compose
from blockzoo.build.yardstick import Yardstick
from blockzoo.engines.base import EngineMaker
from blockzoo.zoo.blocks import PROJECTIONS, Adapter, Block, Dtype, chain_specs
from blockzoo.zoo.manifest import Manifest, ModelRecord, RecoveryRecord
from blockzoo.zoo.store import Zoo

_MARGIN = 0.9  # of what is borne: what is kept is verified once more, along the tokens that it generates then


class Parts:
    """The adapters of a model under way, and what was found of its blocks."""

    def __init__(self) -> None:
        self.adapters: dict[int, str] = {}
        self.new: dict[str, CutAdapter] = {}
        self.own_blocks: dict[int, str] = {}
        self.refused: list[tuple[int, str]] = []
        self._rounding = 0.0

    def take_apart(self, draft: Draft, block: CutBlock, position: int) -> str | None:
        """Find the block's base in the zoo and its adapter on it; the base's id, None where there is none."""
        if block.spec.kind not in PROJECTIONS:
            return None
        for model in draft.manifest.models.values():  # the same block was taken apart before
            recovery = model.recovery
            if recovery is not None and recovery.own_blocks.get(position) == block.id:
                known = draft.given(model).chain[position]
                if known in draft.manifest.blocks:  # of a quantized model it may not be there
                    self._take(position, block.id, model.adapters[position], recovery.rounding)
                    return known
        base = nearest_block(draft.manifest, draft.tensors_of, block.spec, block.tensors, position)
        if base is None:
            return None
        try:
            found = recover(block.spec, block.tensors, draft.tensors_of(base))
        except NotLowRankError as error:
            self.refused.append((position, str(error)))
            return None
        self._take(position, block.id, found.adapter.id, found.rounding)
        self.new[found.adapter.id] = found.adapter
        return base

    def _take(self, position: int, own_block: str, adapter_id: str, rounding: float) -> None:
        """Note a block that was taken apart."""
        self.adapters[position], self.own_blocks[position] = adapter_id, own_block
        self._rounding = max(self._rounding, rounding)

    def recovery(self, manifest: Manifest, given_back: Collection[int]) -> RecoveryRecord | None:
        """The record of what was recovered; the manifest knows the adapters."""
        if not self.own_blocks:
            return None
        rank = max(manifest.adapters[self.adapters[i]].spec.rank for i in self.own_blocks)
        return RecoveryRecord(self.own_blocks, rank, round(self._rounding, 3), tuple(sorted(given_back)))

    def notes(self) -> tuple[str, ...]:
        """Why blocks near to others were not taken apart, for the report."""
        near = [(position, said) for position, said in self.refused if "unrelated" not in said]
        if not near:
            return ()
        position, said = near[0]
        return (f"{len(near)} blocks are near to others, but no merged LoRA (block {position}: {said})",)


def to_give_back(
    source: Source,
    record: ModelRecord,
    zoo: Zoo,
    maker: EngineMaker,
    dtype: Dtype | None,
    sequences: Sequence[Sequence[int]],
    yardstick: Yardstick,
    progress: Callable[[str, int, int], None],
) -> set[int]:
    """Positions of a model's recovered blocks to store whole, so that it loses no more than bf16 does.

    Args:
        record: of the model taken apart.
        maker: of f32 engines.
        dtype: to which the checkpoint is converted.
        sequences: token ids over which the loss is measured.
        yardstick: of the model over them.
    """
    assert record.recovery is not None
    own, specs = record.recovery.own_blocks, chain_specs(record.config)
    chain = [own.get(position, block_id) for position, block_id in enumerate(record.chain)]
    where = str(source.path or source.name)

    def read(position: int, block_id: str) -> tuple[Block, Adapter | None]:
        if own.get(position) != block_id:
            key = record.adapters.get(position)
            return zoo.read_block(block_id), zoo.read_adapter(key) if key is not None else None
        tensors = block_tensors(record.config, source.read, dtype, where, position)
        return Block(block_id, specs[position], tensors), None

    what, trials = f"giving back blocks of {source.name}", 0
    candidates = [Candidate({position: record.chain[position]}) for position in own]
    probe = Probe(chain, record.config, read, maker, sequences, candidates)

    def judge(chosen: Sequence[Candidate]) -> float:
        nonlocal trials
        progress(what, trials, MAX_FORWARDS)
        trials += 1
        found = yardstick.judge(probe.trial(chosen), probe.logits).excess / _MARGIN
        if found <= 1:
            probe.keep()
        return found

    kept = compose(candidates, probe.strays, judge, lambda chosen: trials < MAX_FORWARDS)
    progress(what, MAX_FORWARDS, MAX_FORWARDS)
    return own.keys() - {position for candidate in kept for position in candidate.blocks}
