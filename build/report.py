"""What a compilation did, as frozen records; the CLI prints them or writes them as JSON."""

from dataclasses import dataclass
from typing import Literal

from blockzoo.build.tensorrt_plans import PlanReport
from blockzoo.zoo.manifest import Manifest, VerificationRecord

Status = Literal["added", "replaced", "unchanged"]


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model of a compilation."""

    name: str
    status: Status
    base: str | None
    """Of an adapter: the model that it was merged into."""
    num_blocks: int
    """Length of the chain."""
    num_reused: int
    """Blocks of the chain that were in the zoo, or came with an earlier model or layer."""
    model_bytes: int
    """Bytes of the whole chain."""
    new_bytes: int
    """Bytes of the blocks that only this model brought."""
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


def chain_bytes(manifest: Manifest, chain: tuple[str, ...]) -> int:
    """Bytes of a chain's weights when nothing in it is shared."""
    return sum(manifest.blocks[block_id].num_bytes for block_id in chain)


def sharing_bytes(manifest: Manifest) -> tuple[int, int]:
    """(bytes of all chains if nothing were shared, bytes stored)."""
    unshared = sum(chain_bytes(manifest, model.chain) for model in manifest.models.values())
    return unshared, sum(block.num_bytes for block in manifest.blocks.values())


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
