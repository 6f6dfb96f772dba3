"""The manifest of a compilation as it grows, and its blocks: in the zoo, or read anew for a dry run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from blockzoo.build import profiles
from blockzoo.build.partition import CutAdapter, CutBlock
from blockzoo.build.tensorrt_plans import unused_plans
from blockzoo.zoo.blocks import BlockSpec, BlockTensor, StoredDtype
from blockzoo.zoo.errors import StoreError
from blockzoo.zoo.manifest import (
    AdapterRecord,
    BlockRecord,
    Manifest,
    ModelRecord,
    QuantizedRecord,
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
        # new blocks of a dry run, as what reads them: the values of a quantized model may not fit into memory
        self._unstored: dict[str, Callable[[], dict[str, BlockTensor]]] = {}

    def store(
        self,
        block: CutBlock,
        read: Callable[[], dict[str, BlockTensor]],
        quantized: QuantizedRecord | None = None,
    ) -> None:
        """Store a block unless it is there, and enter it into the manifest.

        `read` gives its tensors again, for a dry run; `quantized` says what it was made of.
        """
        if self.writer is not None:
            self.writer.add_block(block.id, block.tensors, {"kind": block.spec.kind})
        elif block.id not in self.old.manifest.blocks:
            self._unstored[block.id] = read
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
            quantized=quantized,
        )

    def expect(
        self,
        spec: BlockSpec,
        dtype: StoredDtype,
        num_bytes: int,
        tied_to: str | None,
        quantized: QuantizedRecord,
    ) -> None:
        """Enter a block that a dry run does not make, under a name that no stored one has."""
        plan = profiles.plan_for(spec, dtype)
        key = profiles.plan_key(plan)
        self.manifest.plans[key] = plan
        self.manifest.blocks[f"{quantized.source}.{quantized.dtype}"] = BlockRecord(
            spec, dtype, num_bytes, tied_to, key, None, None, quantized
        )

    def is_whole(self, block_id: str) -> bool:
        """Whether a block of the manifest can be read (in a dry run: would be)."""
        if self.writer is None:
            return True
        try:
            self.zoo.read_block(block_id)
        except StoreError:
            return False
        return True

    def given(self, record: ModelRecord) -> ModelRecord:
        """A model with its own blocks, as they were before they were quantized or replaced by others."""
        return self.unquantized(record.with_own_blocks())

    def unquantized(self, record: ModelRecord) -> ModelRecord:
        """A model with its blocks as they were before they were quantized."""
        if record.quantization is None:
            return record
        made_of = {key: b.quantized.source for key, b in self.manifest.blocks.items() if b.quantized}
        return replace(record, chain=tuple(made_of.get(key, key) for key in record.chain))

    def store_adapter(self, adapter: CutAdapter) -> None:
        """The same for an adapter."""
        if self.writer is not None:
            self.writer.add_block(adapter.id, adapter.tensors, {"kind": adapter.spec.kind})
        self.manifest.adapters[adapter.id] = AdapterRecord(adapter.spec, adapter.dtype, adapter.num_bytes)

    def tensors_of(self, block_id: str) -> dict[str, BlockTensor]:
        """The tensors of a block of the manifest."""
        if block_id in self._unstored:
            return self._unstored[block_id]()
        return self.zoo.read_block(block_id).tensors

    def verified_twin(self, record: ModelRecord) -> VerificationRecord | None:
        """The verification of a model of the same weights, None where there is none."""
        for name, other in self.manifest.models.items():
            same = weights(self.given(other)) == weights(record) and not other.replaced_blocks
            if same and other.verification is not None:
                return replace(other.verification, same_as=other.verification.same_as or name)
        return None

    def prune(self) -> None:
        """Forget blocks and plans that no model uses any more, and references to models that are gone."""
        for name, model in self.manifest.models.items():
            checked = model.verification
            if checked is not None and checked.same_as is not None:
                twin = self.manifest.models.get(checked.same_as)
                if twin is None or weights(self.given(twin)) != weights(self.given(model)):
                    self.manifest.models[name] = replace(model, verification=replace(checked, same_as=None))
            guesses = self.manifest.models[name].surrogate
            if guesses is not None and guesses.model not in (None, *self.manifest.models):
                self.manifest.models[name] = replace(self.manifest.models[name], surrogate=None)
        used = {block_id for model in self.manifest.models.values() for block_id in model.block_ids}
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
