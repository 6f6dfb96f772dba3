"""What a compilation did, as frozen records; the CLI prints them or writes them as JSON."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from blockzoo.build.tensorrt_plans import PlanReport
from blockzoo.zoo.manifest import Manifest, ModelRecord, VerificationRecord

Status = Literal["added", "replaced", "unchanged"]


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model of a compilation."""

    name: str
    status: Status
    base: str | None
    """Of an adapter: the model that it belongs to."""
    num_blocks: int
    """Length of the chain."""
    num_reused: int
    """Blocks of the chain that were in the zoo, or came with an earlier model or layer."""
    num_recovered: int
    """Those among them that stand for a block of the checkpoint, together with an adapter that was found."""
    rank: int
    """Largest rank of the model's adapters, 0 without."""
    notes: tuple[str, ...]
    """What else there is to say about how it is shared."""
    model_bytes: int
    """Bytes of the whole chain and its adapters."""
    new_bytes: int
    """Bytes of the blocks and adapters that only this model brought."""
    verification: VerificationRecord | None


@dataclass(frozen=True, slots=True)
class CompileReport:
    """A whole run; `unshared_bytes` is what all models of the zoo would take if nothing were shared."""

    models: tuple[ModelReport, ...]
    removed: tuple[str, ...]
    zoo_models: int
    zoo_blocks: int
    unshared_bytes: int
    stored_bytes: int
    freed_bytes: int
    plans: PlanReport | None
    """Of TensorRT, where they were asked for."""
    dry_run: bool


def model_bytes(manifest: Manifest, model: ModelRecord) -> int:
    """Bytes of a model's chain and adapters when nothing of them is shared."""
    adapters = sum(manifest.adapters[adapter_id].num_bytes for adapter_id in model.adapters.values())
    return adapters + sum(manifest.blocks[block_id].num_bytes for block_id in model.chain)


def sharing_bytes(manifest: Manifest) -> tuple[int, int]:
    """(bytes of all models if each were a checkpoint of its own, bytes stored)."""
    # a merged checkpoint is as large as its base: adapters do not count
    unshared = sum(
        manifest.blocks[block_id].num_bytes for model in manifest.models.values() for block_id in model.chain
    )
    stored = sum(block.num_bytes for block in manifest.blocks.values())
    return unshared, stored + sum(adapter.num_bytes for adapter in manifest.adapters.values())


def left_behind(manifest: Manifest, replaced: str, compiled: Collection[str]) -> list[str]:
    """Adapters of a model that was replaced, and adapters of those, that were not compiled again."""
    stay: list[str] = []
    bases = {replaced}
    while bases:
        found = {name for name, model in manifest.models.items() if model.source.base in bases}
        bases = found - {*compiled, *stay}
        stay += sorted(bases)
    return stay


def human_bytes(count: int) -> str:
    """A byte count for people: 1.5 MB is 1500000 bytes."""
    if count < 1000:
        return f"{count} B"
    value, units = float(count), iter("kMGTP")
    unit = ""
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}B"


def verification_text(record: VerificationRecord) -> str:
    """One line of verification figures."""
    said = [
        f"{precision} greedy {figures.greedy_agreement:.1%}, logit error {figures.max_relative_error:.1e}"
        for precision, figures in sorted(record.figures.items(), key=lambda item: item[0] != "f32")
    ]
    if record.rounding_error is not None:
        said.append(f"rounding of weights {record.rounding_error:.1e}")
    twin = f" (same chain as {record.same_as})" if record.same_as else ""
    return f"verified on {record.num_tokens} tokens{twin}: {'; '.join(said)}"


def quantization_texts(manifest: Manifest, model: ModelRecord) -> list[str]:
    """What a quantized model is stored in, and how near it is to what was given: a line of each."""
    found = model.quantization
    if found is None:
        return []
    sizes: dict[str, list[int]] = {}
    for key in model.chain:
        sizes.setdefault(manifest.blocks[key].dtype, []).append(manifest.blocks[key].num_bytes)
    blocks = ", ".join(
        f"{len(sizes[dtype])} blocks {dtype} ({human_bytes(sum(sizes[dtype]))})" for dtype in sorted(sizes)
    )
    lines = [f"weights {found.weights}: {blocks}"]
    if found.figures:
        lines[0] += (
            f"; over {found.num_tokens} tokens of {found.probe} text, perplexity {found.perplexity:.4g}"
        )
        lines += [
            f"  {name}: KL {figures.kl:.2e}, same top token {figures.top1:.1%}, greedy "
            f"{figures.greedy_agreement:.1%}, perplexity {figures.perplexity:.4g}"
            for name, figures in found.figures.items()
        ]
    return lines


def equivalence_text(model: ModelRecord) -> str:
    """One line about the blocks of other models that stand for a model's own."""
    found = model.equivalence
    assert found is not None
    return (
        f"{len(found.own_blocks)} blocks replaced by equivalent ones: cosine {found.cosine:.4f}, KL "
        f"{found.kl:.1e}, same top token {found.top1:.1%} (asked for {found.threshold:g}, over "
        f"{found.num_tokens} tokens of {found.probe} text)"
    )


def adapters_text(manifest: Manifest, name: str) -> str:
    """One line about a model's adapters."""
    model = manifest.models[name]
    records = [manifest.adapters[adapter_id] for adapter_id in model.adapters.values()]
    rank, size = max(r.spec.rank for r in records), human_bytes(sum(r.num_bytes for r in records))
    said = f"adapters of rank {rank} on {len(records)} blocks, {size}"
    if model.recovery is not None:
        said += (
            f", {len(model.recovery.own_blocks)} of them recovered from merged weights "
            f"(left out: {model.recovery.rounding:.2f} times the rounding)"
        )
    return said
