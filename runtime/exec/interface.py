"""What serves steps of one family, wherever its engines are: here (`executor`) or in workers (`workers`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from blockzoo.runtime.exec.executor import StepResult
from blockzoo.runtime.exec.kv_tensors import KVTensors
from blockzoo.runtime.exec.rows import Rows
from blockzoo.runtime.exec.topology import ChainPlan


class KVLostError(Exception):
    """K and V of some layers are gone: what is cached is of no use, and what runs begins anew."""


class StepExecutor(Protocol):
    """Runs steps over one pool; see `Executor`."""

    chains: tuple[ChainPlan, ...]
    kv: KVTensors

    def run(self, batch: Sequence[Rows]) -> StepResult:
        """Run a batch; see `Executor.run`."""

    def is_sound(self, chain: int) -> bool:
        """Whether a chain gives finite logits."""

    def release_memory(self) -> None:
        """Give back scratch, where that is worth it."""
