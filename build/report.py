"""What a compilation did, as frozen records; the CLI prints them or writes them as JSON."""

from collections.abc import Collection
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


def left_behind(manifest: Manifest, replaced: str, compiled: Collection[str]) -> list[str]:
    """Adapters of a model that was replaced, and adapters of those, that were not compiled again."""
    stay: list[str] = []
    bases = {replaced}
    while bases:
        found = {name for name, model in manifest.models.items() if model.source.base in bases}
        bases = found - {*compiled, *stay}
        stay += sorted(bases)
    return stay
