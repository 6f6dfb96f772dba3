"""Models as they are given: cut into blocks, stored where these are new, verified."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Literal

from blockzoo.build import verify as verification
from blockzoo.build.compilation import Compilation
from blockzoo.build.partition import block_tensors, cut, cut_adapters
from blockzoo.build.report import ModelReport
from blockzoo.build.sources import Adapted, Source
from blockzoo.build.taken_apart import Parts, to_give_back
from blockzoo.build.verify import RecoveryError
from blockzoo.zoo.fingerprint import files_id
from blockzoo.zoo.manifest import ModelRecord, SourceRecord
from blockzoo.zoo.summary import model_bytes


def add(job: Compilation, source: Source, whole: Collection[int] = (), notes: tuple[str, ...] = ()) -> None:
    """Cut one model into blocks, store those that are new, and enter it into the manifest.

    `whole`: positions of blocks that are not taken apart, as the model loses too much by it.
    """
    apart = job.options.share != "exact" and not source.pairs
    chain: list[str] = []
    parts = Parts()
    new_bytes = reused = 0
    where = str(source.path or source.name)
    steps = 2 * source.config.num_layers + 2
    for block in cut(source.config, source.read, job.options.dtype, where):
        job.progress(f"reading {source.name}", len(chain), steps)
        base = None
        if block.id not in job.manifest.blocks and apart and len(chain) not in whole:
            base = parts.take_apart(job.draft, block, len(chain))
        if base is None:
            known = block.id in job.manifest.blocks
            new_bytes += 0 if known else block.num_bytes
            dtype, position = job.options.dtype, len(chain)
            job.draft.store(block, partial(block_tensors, source.config, source.read, dtype, where, position))
        reused += base is not None or known
        chain.append(base or block.id)
    for position, adapter in cut_adapters(source.config, source.pairs):
        parts.adapters[position] = adapter.id
        parts.new[adapter.id] = adapter
    job.progress(f"reading {source.name}", steps, steps)
    job.adapter_bytes[source.name] = 0
    for adapter_id, adapter in parts.new.items():
        if adapter_id not in job.manifest.adapters:
            job.adapter_bytes[source.name] += adapter.num_bytes
        job.draft.store_adapter(adapter)
    new_bytes += job.adapter_bytes[source.name]
    record = ModelRecord(
        config=source.config,
        chain=tuple(chain),
        tokenizer=files_id(source.tokenizer.files),
        source=_source_record(job, source),
        verification=None,
        adapters=parts.adapters,
        recovery=parts.recovery(job.manifest, whole),
        eos_token_ids=None if source.end_ids == source.config.eos_token_ids else source.end_ids,
        generation_defaults=dict(source.generation_defaults) or None,
    )
    if job.writer is not None:
        job.writer.add_tokenizer(source.tokenizer.files)
    job.given[source.name] = record
    status = job.status(source.name, record)
    if status != "unchanged":
        job.manifest.models[source.name] = record
    job.reports[source.name] = ModelReport(
        name=source.name,
        status=status,
        base=record.source.base,
        num_blocks=len(chain),
        num_reused=reused,
        num_recovered=len(parts.own_blocks),
        rank=max((job.manifest.adapters[i].spec.rank for i in parts.adapters.values()), default=0),
        notes=(*notes, *parts.notes(), *source.notes()),
        model_bytes=model_bytes(job.manifest, record),
        new_bytes=new_bytes,
        verification=job.manifest.models[source.name].verification,
    )


def _source_record(job: Compilation, source: Source) -> SourceRecord:
    base = source.origin.base.name if isinstance(source.origin, Adapted) else None
    folder = source.path.resolve().name if source.path is not None else source.name
    given: Literal["hf", "gguf", "peft"] = "hf" if base is None else "peft"
    if base is None and source.path is not None and source.path.is_file():
        given = "gguf"
    return SourceRecord(given, folder, source.dtype, job.options.dtype, base)


def verify(job: Compilation, source: Source, again: bool = False) -> None:
    """Check a model unless it, or a model with the same chain, has been checked.

    One that was taken apart and loses too much gets its worst blocks back; all, where that is not enough.
    """
    record = job.manifest.models[source.name]
    if record.verification is not None:
        return
    checked = job.draft.verified_twin(job.given[source.name])
    if checked is None:
        blocks = [job.zoo.read_block(block_id) for block_id in job.given[source.name].chain]
        adapters = {i: job.zoo.read_adapter(key) for i, key in record.adapters.items()}
        recovered = record.recovery is not None
        try:
            checked = verification.verify(
                source,
                blocks,
                adapters,
                job.maker,
                job.options.dtype,
                job.progress,
                recovered,
                job.packed_kv(blocks),
            )
        except RecoveryError as error:
            _give_back(job, source, record, error, again)
            verify(job, source, True)
            return
    job.manifest.models[source.name] = replace(record, verification=checked)
    job.reports[source.name] = replace(job.reports[source.name], verification=checked)


def _give_back(
    job: Compilation, source: Source, record: ModelRecord, error: RecoveryError, all_of_them: bool
) -> None:
    """Enter a model anew that loses too much taken apart, with blocks of its own."""
    assert record.recovery is not None
    own = record.recovery.own_blocks
    whole = set(own)
    if not all_of_them:
        asked = source, record, job.zoo, job.maker("f32"), job.options.dtype
        whole = to_give_back(*asked, error.sequences, error.yardstick, job.progress)
        whole = whole or set(own)  # judged otherwise here than there: should not be
    old = job.old.manifest.models.get(source.name)
    job.manifest.models.pop(source.name)
    if old is not None:
        job.manifest.models[source.name] = old
    said = "its own blocks" if len(whole) == len(own) else f"{len(whole)} of {len(own)} blocks of its own"
    add(job, source, whole | {*record.recovery.given_back}, (f"stored with {said}: {error}",))
