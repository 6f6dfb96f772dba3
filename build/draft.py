"""The manifest of a compilation as it grows, and its blocks: in the zoo, or in memory for a dry run."""

from dataclasses import replace
from pathlib import Path

from blockzoo.build import profiles
from blockzoo.build.partition import CutAdapter, CutBlock
from blockzoo.build.tensorrt_plans import unused_plans
from blockzoo.zoo.blocks import BlockTensor
from blockzoo.zoo.manifest import (
    AdapterRecord,
    BlockRecord,
    Manifest,
    ModelRecord,
    VerificationRecord,
)
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.writer import ZooWriter


class Draft:
    """A manifest to be committed; it starts as the zoo's. Without a writer nothing is stored (a dry run)."""

    def __init__(self, path: Path, old: Manifest, writer: ZooWriter | None) -> None:
        self.writer = writer
        self.manifest = Manifest(
            models=dict(old.models),
            blocks=dict(old.blocks),
            plans=dict(old.plans),
            tensorrt_plans=dict(old.tensorrt_plans),
            adapters=dict(old.adapters),
        )
        self.old = Zoo(path, old)
        self.zoo = Zoo(path, self.manifest)  # reads blocks as soon as they are stored
        self._unstored: dict[str, CutBlock] = {}  # new blocks of a dry run

    def store(self, block: CutBlock) -> None:
        """Store a block unless it is there, and enter it into the manifest."""
        if self.writer is not None:
            self.writer.add_block(block.id, block.tensors, {"kind": block.spec.kind})
        elif block.id not in self.old.manifest.blocks:
            self._unstored[block.id] = block
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

    def store_adapter(self, adapter: CutAdapter) -> None:
        """The same for an adapter."""
        if self.writer is not None:
            self.writer.add_block(adapter.id, adapter.tensors, {"kind": adapter.spec.kind})
        self.manifest.adapters[adapter.id] = AdapterRecord(adapter.spec, adapter.dtype, adapter.num_bytes)

    def tensors_of(self, block_id: str) -> dict[str, BlockTensor]:
        """The tensors of a block of the manifest."""
        if block_id in self._unstored:
            return self._unstored[block_id].tensors
        return self.zoo.read_block(block_id).tensors

    def verified_twin(self, record: ModelRecord) -> VerificationRecord | None:
        """The verification of a model of the same weights, None where there is none."""
        for name, other in self.manifest.models.items():
            same = weights(other) == weights(record) and other.equivalence is None
            if same and other.verification is not None:
                return replace(other.verification, same_as=other.verification.same_as or name)
        return None

    def prune(self) -> None:
        """Forget blocks and plans that no model uses any more, and references to models that are gone."""
        for name, model in self.manifest.models.items():
            checked = model.verification
            if checked is not None and checked.same_as is not None:
                twin = self.manifest.models.get(checked.same_as)
                own = replace(model, chain=model.own_chain())
                if twin is None or weights(replace(twin, chain=twin.own_chain())) != weights(own):
                    self.manifest.models[name] = replace(model, verification=replace(checked, same_as=None))
        used = {block_id for model in self.manifest.models.values() for block_id in model.chain}
        for block_id in self.manifest.blocks.keys() - used:
            del self.manifest.blocks[block_id]
        adapted = {key for model in self.manifest.models.values() for key in model.adapters.values()}
        for key in self.manifest.adapters.keys() - adapted:
            del self.manifest.adapters[key]
        for key in self.manifest.plans.keys() - {block.plan for block in self.manifest.blocks.values()}:
            del self.manifest.plans[key]
        for key in unused_plans(self.zoo):
            del self.manifest.tensorrt_plans[key]


def weights(record: ModelRecord) -> object:
    """What a model computes with: equal for models of equal weights."""
    return record.chain, record.adapters
