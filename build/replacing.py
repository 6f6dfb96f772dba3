"""Other blocks in the place of a model's own: of other models, differences, quantized; and surrogates."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from blockzoo.build import common_bits, deltas, equivalence, quantized_models, surrogates
from blockzoo.build.compilation import Compilation
from blockzoo.build.draft import weights
from blockzoo.build.originals import oracle_for
from blockzoo.build.own_text import OwnText
from blockzoo.build.quantize import Choice
from blockzoo.build.quantized_models import GivenModel, Weights
from blockzoo.build.sources import Source
from blockzoo.build.trials import MAX_FORWARDS
from blockzoo.zoo.manifest import ModelRecord
from blockzoo.zoo.summary import (
    delta_text,
    equivalence_text,
    model_bytes,
    quantization_texts,
    surrogate_text,
)


def substitute(job: Compilation, source: Source, encoded: list[list[int]], besides: Collection[str]) -> None:
    """Let other models' blocks take the place of those that only this model has, where that is alike."""
    record, report = job.manifest.models[source.name], job.reports[source.name]
    if job.writer is None or record.replaced_blocks or report.status == "unchanged":
        return
    if job.manifest.models.keys() <= {source.name, *besides}:  # the first of all
        return
    search = equivalence.substitute(
        source.name,
        job.zoo,
        encoded,
        job.maker("f32"),
        oracle_for(source, True, job.options.dtype),
        job.options.threshold,
        job.probe_name,
        job.progress,
        besides,
    )
    if search.cut_short:
        job.note(
            source.name,
            f"the search for equivalent blocks ended at its bound of {MAX_FORWARDS} forwards of the "
            f"model: {search.num_trials} sets of {search.num_candidates} candidates were tried",
        )
    changed = search.record
    if changed.equivalence is None:
        at = f"at {job.options.threshold:g}"
        job.note(source.name, f"no block is equivalent to another model's {at}{_not_compared(job)}")
        return
    job.manifest.models[source.name] = changed
    own = changed.equivalence.own_blocks.values()
    freed = sum(job.manifest.blocks[block_id].num_bytes for block_id in own)
    job.reports[source.name] = replace(report, new_bytes=report.new_bytes - freed)
    job.note(source.name, equivalence_text(changed))


def _not_compared(job: Compilation) -> str:
    """What to say of quantized blocks where nothing was found."""
    quantized = any(block.is_quantized for block in job.manifest.blocks.values())
    return " (those in 8 or 4 bits are not compared: compile both models together)" if quantized else ""


def take_differences(
    job: Compilation, source: Source, encoded: list[list[int]], besides: Collection[str]
) -> None:
    """Let other models' blocks and differences to them take the place of a model's own."""
    name = source.name
    record, report = job.manifest.models[name], job.reports[name]
    if record.replaced_blocks or report.status == "unchanged":
        return
    others = job.manifest.models.keys() - {name, *besides}
    if not others:  # the first of all
        return
    if job.writer is None:
        job.note(name, "differences to other models' blocks are not looked for in a dry run")
        return
    found = deltas.take_differences(
        name,
        job.zoo,
        OwnText(source, record, job.zoo, 0, job.probe_name, encoded, job.maker, job.progress),
        oracle_for(source, True, job.options.dtype),
        job.maker("f32"),
        job.options.max_kl,
        job.probe_name,
        job.progress,
        besides,
    )
    if not found.num_candidates:
        job.note(
            name,
            f"no block that it alone uses is near to another model's{_not_compared(job)}: no differences are "
            "taken",
        )
        return
    if found.record.delta is None:
        job.note(
            name,
            f"{found.num_candidates} blocks are near to others, but no differences of low rank to them "
            f"keep the model near enough to itself ({found.num_trials} trials)",
        )
        return
    new = {each.id: each for each in found.adapters if each.id not in job.manifest.adapters}
    for adapter in new.values():
        job.draft.store_adapter(adapter)
    job.manifest.models[name] = found.record
    added = sum(adapter.num_bytes for adapter in new.values())
    job.adapter_bytes[name] += added
    freed = set(found.record.delta.own_blocks.values())
    job.reports[name] = replace(
        report,
        num_reused=report.num_reused + len(found.record.delta.own_blocks),
        model_bytes=model_bytes(job.manifest, found.record),
        new_bytes=report.new_bytes + added - sum(job.manifest.blocks[key].num_bytes for key in freed),
    )
    job.note(name, delta_text(found.record))


def quantize(
    job: Compilation, sources: Sequence[Source], texts: Mapping[str, list[list[int]]], asked: Weights
) -> None:
    """Put quantized blocks in the place of the models' own. `texts`: to judge by, as token ids, by name."""
    known = set(job.old.manifest.blocks)
    models = {source.name: _to_quantize(job, source, texts[source.name], asked) for source in sources}
    waiting = [model for model in models.values() if model is not None]
    chosen: Mapping[str, Choice] = {}
    if asked == "auto" and job.writer is not None:
        chosen = common_bits.choose(job.draft, _without_twins(job, waiting), job.progress)
    for model in waiting:
        changed = _quantized_twin(job, model.record)
        if changed is None:
            changed = model.quantized(chosen[model.name] if model.name in chosen else model.uniform())
        _take(job, model.name, changed, known)
        known |= {*changed.chain}
        if job.options.dry_run and asked == "auto":
            job.note(model.name, "auto chooses bits as it compiles: counted with 8")


def _to_quantize(
    job: Compilation, source: Source, encoded: list[list[int]], asked: Weights
) -> GivenModel | None:
    """A model with its blocks as they were given; None where it is to stay as it is."""
    name = source.name
    record, report = job.manifest.models[name], job.reports[name]
    if not job.can_be_quantized(name):
        job.note(name, f"its base is quantized in the zoo: --weights {asked} leaves its blocks as they are")
        return None
    done = record.quantization
    kept = done is not None and (done.figures or not job.options.verify)
    if report.status == "unchanged" and kept and all(map(job.draft.is_whole, record.chain)):
        _take(job, name, record, record.chain)
        return None
    given = replace(record, chain=tuple(_chain_to_quantize(job, name)))
    how = quantized_models.Asked(
        weights=asked,
        max_kl=job.max_kl(asked),
        min_top1=job.min_top1(asked),
        probe_name=job.probe_name,
        probe=encoded,
        judge=job.options.verify,
        threads=job.options.threads,
        num_texts=job.options.calibration_texts,
        group=job.options.group_size,
    )
    return GivenModel(source, job.draft, given, how, job.options.dtype, job.maker, job.progress)


def _without_twins(job: Compilation, models: Sequence[GivenModel]) -> list[GivenModel]:
    """Models of which no other one of equal weights is quantized, or comes before them here."""
    found: list[GivenModel] = []
    for model in models:
        whole = [other for other in found if not other.record.replaced_blocks]
        same = any(weights(model.record) == weights(other.record) for other in whole)
        if not same and _quantized_twin(job, model.record) is None:
            found.append(model)
    return found


def _take(job: Compilation, name: str, changed: ModelRecord, known: Collection[str]) -> None:
    """Enter a quantized model. `known`: blocks that were there, or that a model before it has."""
    job.manifest.models[name] = changed
    new = set(changed.chain).difference(known)
    job.reports[name] = replace(
        job.reports[name],
        num_reused=sum(key not in new for key in changed.chain),
        model_bytes=model_bytes(job.manifest, changed),
        new_bytes=sum(job.manifest.blocks[key].num_bytes for key in new) + job.adapter_bytes[name],
    )
    job.note_all(name, quantization_texts(job.manifest, changed))


def _quantized_twin(job: Compilation, given: ModelRecord) -> ModelRecord | None:
    """A model quantized as another one of equal weights was, None where there is none."""
    for name, other in job.manifest.models.items():
        found = other.quantization
        if found is None or not job.quantized_before(name, other) or other.replaced_blocks:
            continue
        judged = bool(found.figures) or not job.options.verify
        same = judged and weights(job.draft.given(other)) == weights(given)
        if same and all(map(job.draft.is_whole, other.chain)):
            return replace(given, chain=other.chain, quantization=found)
    return None


def _chain_to_quantize(job: Compilation, name: str) -> list[str]:
    """The chain as given, with blocks of other models where they stand for its own."""
    record, given = job.manifest.models[name], job.given[name]
    own = record.replaced_blocks
    return [record.chain[at] if at in own else key for at, key in enumerate(given.chain)]


def find_surrogate(job: Compilation, source: Source, encoded: list[list[int]], kind: str) -> None:
    """Give a model the surrogate that pays most, or none."""
    name, before = source.name, set(job.manifest.blocks)
    record = job.manifest.models[name]
    asked = surrogates.Asked(kind, job.probe_name, encoded, job.options.calibration_texts, job.options.dtype)
    chosen = surrogates.known_surrogate(job.draft, record, asked)
    if chosen is None:
        given = replace(record, chain=job.given[name].chain) if job.can_be_quantized(name) else None
        found = surrogates.find_surrogate(source, job.draft, record, given, asked, job.maker, job.progress)
        if found is None:
            job.note(name, f"no surrogate to try with --surrogate {kind}: its base is quantized in the zoo")
        elif found.speedup < surrogates.LEAST_SPEEDUP:
            job.note(name, f"no surrogate pays; the best would be a {_surrogate_said(job, record, found)}")
        else:
            chosen = found.record(kind, job.probe_name)
    changed = replace(record, surrogate=chosen)
    job.manifest.models[name] = changed
    if chosen is not None:
        more = sum(job.manifest.blocks[key].num_bytes for key in {*chosen.blocks.values()} - before)
        report = job.reports[name]
        job.reports[name] = replace(report, new_bytes=report.new_bytes + more)
        job.note(name, surrogate_text(job.manifest, changed))


def _surrogate_said(job: Compilation, record: ModelRecord, found: surrogates.Found) -> str:
    """What one that is not kept would have given."""
    kind = job.options.surrogate or "auto"
    return surrogate_text(job.manifest, replace(record, surrogate=found.record(kind, job.probe_name)))
