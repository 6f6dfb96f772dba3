"""Full checkpoints taken apart while they are compiled: other models' blocks, and adapters found."""

from blockzoo.build.draft import Draft
from blockzoo.build.partition import CutAdapter, CutBlock
from blockzoo.build.recover import NotLowRankError, nearest_block, recover
from blockzoo.zoo.blocks import PROJECTIONS
from blockzoo.zoo.manifest import Manifest, RecoveryRecord


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
