"""Checkpoints -> zoo: read, cut into blocks, store what is new, verify, time, commit the manifest last."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from blockzoo.build import given_models, profiles, replacing
from blockzoo.build.compilation import Compilation
from blockzoo.build.compile_options import CompileOptions
from blockzoo.build.draft import Draft
from blockzoo.build.progress import Progress, no_progress
from blockzoo.build.report import CompileReport
from blockzoo.build.sources import nearest, open_sources
from blockzoo.build.tensorrt_plans import build_plans
from blockzoo.build.verify import encode_prompts
from blockzoo.engines.choose import make_engines
from blockzoo.zoo.errors import StoreError
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.writer import ZooWriter

__all__ = ["CompileOptions", "compile_models"]


def compile_models(
    models: Mapping[str, str | Path],
    zoo: str | Path,
    options: CompileOptions | None = None,
    *,
    remove: Sequence[str] = (),
    progress: Progress = no_progress,
) -> CompileReport:
    """Compile models into the zoo directory `zoo`, which is made or extended; drop those in `remove`.

    `models`: name -> HF folder or PEFT folder (`PATH` or `PATH@BASE`). Raises ZooError; the zoo is then what
    it was before.
    """
    options = options or CompileOptions()
    path = Path(zoo)
    if options.dry_run:
        manifest = Manifest.load(path / "manifest.json") if (path / "manifest.json").exists() else Manifest()
        return _run(Compilation(Draft(path, manifest, None), options, progress), models, remove)
    with ZooWriter(path) as writer:
        return _run(Compilation(Draft(path, writer.manifest, writer), options, progress), models, remove)


def _run(job: Compilation, models: Mapping[str, str | Path], remove: Sequence[str]) -> CompileReport:
    for name in remove:
        if job.manifest.models.pop(name, None) is None:
            hint = nearest(name, job.old.manifest.models)
            raise StoreError(f"{job.old.path}: there is no model {name!r} to remove{hint}")
    sources = open_sources(models, job.old)
    for source in sources:
        encode_prompts(source)  # a tokenizer that does not fit is told before anything is written
    texts = {source.name: job.probe(source) for source in sources}
    for source in sources:
        given_models.add(job, source)
    job.note_left_behind()
    if job.writer is not None and job.options.verify:
        for source in sources:
            given_models.verify(job, source)
    if job.options.share in ("equivalent", "delta"):
        take = replacing.substitute if job.options.share == "equivalent" else replacing.take_differences
        later = {source.name for source in sources}
        for source in sources:  # a model takes blocks of those that were there before it
            later.discard(source.name)
            take(job, source, texts[source.name], later)
    if job.options.weights is not None:
        replacing.quantize(job, sources, texts, job.options.weights)
    if job.writer is not None and job.options.surrogate is not None:
        for source in sources:
            if source.name != job.options.surrogate:
                replacing.find_surrogate(job, source, texts[source.name], job.options.surrogate)
    job.draft.prune()
    if job.writer is not None and job.options.profile:
        served_by = make_engines(zoo=job.zoo, num_threads=job.options.threads)
        profiles.measure(job.zoo, served_by, job.progress)
    if job.options.tensorrt is not None:
        job.plans = build_plans(job.zoo, job.writer, job.options.tensorrt, job.progress)
    freed = job.writer.commit(job.manifest) if job.writer is not None else 0
    return job.report(list(models), tuple(remove), freed)
