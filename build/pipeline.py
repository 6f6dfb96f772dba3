"""Checkpoints -> zoo: read, cut into blocks, store what is new, commit the manifest last."""

import re
from collections.abc import Mapping
from dataclasses import replace as with_changes
from pathlib import Path

from blockzoo.build.partition import CutBlock, checkpoint_reader, cut
from blockzoo.build.profiles import plan_for, plan_key
from blockzoo.build.report import CompileReport, ModelReport, Status, chain_bytes, sharing_bytes
from blockzoo.zoo.blocks import Dtype
from blockzoo.zoo.checkpoint import Checkpoint, open_checkpoint
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.manifest import BlockRecord, Manifest, ModelRecord, SourceRecord
from blockzoo.zoo.store import ZooWriter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def compile_models(
    models: Mapping[str, str | Path],
    zoo: str | Path,
    *,
    dtype: Dtype | None = None,
    replace: bool = False,
) -> CompileReport:
    """Compile HF folders (by model name) into the zoo directory `zoo`, which is made or extended.

    Raises ZooError; the zoo is then what it was before.
    """
    for name in models:
        check_name(name)
    checkpoints = {name: open_checkpoint(Path(path)) for name, path in models.items()}
    with ZooWriter(zoo) as writer:
        run = _Run(writer, dtype, replace)
        for name, checkpoint in checkpoints.items():
            run.add(name, checkpoint)
        return run.finish()


def check_name(name: str) -> None:
    """Refuse model names that could not be file names and URL parts. Raises ZooError."""
    if not _NAME.fullmatch(name):
        raise ZooError(f"model name {name!r}: expected letters, digits, '.', '_' or '-' (give NAME=PATH)")


class _Run:
    """One compilation: the manifest as it grows."""

    def __init__(self, writer: ZooWriter, dtype: Dtype | None, replace: bool) -> None:
        self.writer, self.dtype, self.replace = writer, dtype, replace
        old = writer.manifest
        self.old_models = set(old.models)
        self.manifest = Manifest(models=dict(old.models), blocks=dict(old.blocks), plans=dict(old.plans))
        self.reports: list[ModelReport] = []

    def add(self, name: str, checkpoint: Checkpoint) -> None:
        read = checkpoint_reader(checkpoint)
        chain, new_bytes, reused = [], 0, 0
        for block in cut(checkpoint.config, read, self.dtype, str(checkpoint.path)):
            chain.append(block.id)
            if block.id in self.manifest.blocks:
                reused += 1
            else:
                new_bytes += block.num_bytes
            self._store(block)
        tokenizer = self.writer.add_tokenizer(checkpoint.tokenizer_files)
        source = SourceRecord("hf", checkpoint.path.resolve().name, checkpoint.dtype, self.dtype, None)
        record = ModelRecord(checkpoint.config, tuple(chain), tokenizer, source, None)
        status = self._status(name, record)
        if status != "unchanged":
            self.manifest.models[name] = record
        model_bytes = chain_bytes(self.manifest, record.chain)
        self.reports.append(ModelReport(name, status, len(chain), reused, model_bytes, new_bytes, None))

    def _status(self, name: str, record: ModelRecord) -> Status:
        old = self.manifest.models.get(name)
        if old is None:
            return "added"
        if (old.config, old.chain, old.tokenizer) == (record.config, record.chain, record.tokenizer):
            return "unchanged"
        if not self.replace:
            raise ZooError(f"model {name} is in the zoo with other content: give another NAME=, or --replace")
        return "replaced"

    def _store(self, block: CutBlock) -> None:
        metadata = {"kind": block.spec.kind}
        self.writer.add_block(block.id, block.tensors, metadata)
        if block.id in self.manifest.blocks:
            return
        plan = plan_for(block.spec, block.dtype)
        key = plan_key(plan)
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

    def finish(self) -> CompileReport:
        manifest = pruned(self.manifest)
        freed = self.writer.commit(manifest)
        unshared, stored = sharing_bytes(manifest)
        return CompileReport(
            models=tuple(self.reports),
            removed=(),
            zoo_models=len(manifest.models),
            zoo_blocks=len(manifest.blocks),
            unshared_bytes=unshared,
            stored_bytes=stored,
            freed_bytes=freed,
            dry_run=False,
        )


def pruned(manifest: Manifest) -> Manifest:
    """The manifest without blocks and plans that no model uses."""
    used = {block_id for model in manifest.models.values() for block_id in model.chain}
    blocks = {block_id: block for block_id, block in manifest.blocks.items() if block_id in used}
    plans = {block.plan: manifest.plans[block.plan] for block in blocks.values()}
    return with_changes(manifest, blocks=blocks, plans=plans)
