"""What a worker is told when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blockzoo.engines.base import Precision
from blockzoo.engines.kv_pages import KVPrecision
from blockzoo.runtime.exec.topology import Family, Topology
from blockzoo.runtime.workers.logits_memory import SharedLogits
from blockzoo.runtime.workers.sockets import Keys
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.rope import RopeConfig

NOWHERE = -1
"""In the place of a worker."""
MOST_MICRO_BATCHES = 8
"""Of a step that are under way at once: each has buffers of its own."""


class EngineKind(NamedTuple):
    """What engines are made from and how: of one kind, those of equal spans are equal.

    Attributes:
        zoo: its folder.
        precision, int8_activations, kv_precision, num_threads: see `OpenVINOEngines`.
    """

    zoo: Path
    precision: Precision
    int8_activations: bool
    kv_precision: KVPrecision
    num_threads: int


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What all workers agree on.

    Attributes:
        manifest: of the models that are served.
        topology: planned from it.
        homes: by span index, the worker that has it; NOWHERE: no chain goes through it.
        num_pages: of each family's pool. A worker has room for all of them: which of them layers of its own
            use is known only as they are used.
        ropes: by chain index, its rotary embedding and the positions that are prepared.
        kind: of their engines.
        max_tokens, max_seqs, max_more_logits: see `Executor`.
        adapter_bytes: of `AdapterCache`, in each worker.
    """

    manifest: Manifest
    topology: Topology
    homes: tuple[int, ...]
    num_pages: Mapping[Family, int]
    ropes: Mapping[int, tuple[RopeConfig, int]]
    kind: EngineKind
    max_tokens: int
    max_seqs: int
    max_more_logits: int
    adapter_bytes: int

    @property
    def families(self) -> tuple[Family, ...]:
        """In the order in which messages number them."""
        return tuple(self.num_pages)

    def logits_size(self, family: Family) -> int:
        """Elements that a micro-batch of a family has room for."""
        vocab = max(chain.vocab_size for chain in self.topology.chains if chain.family == family)
        return (self.max_seqs + self.max_more_logits) * vocab

    def logits_begin(self, family: Family) -> int:
        """Where the first micro-batch of a family has its logits, in elements of the shared memory."""
        before = self.families[: self.families.index(family)]
        return MOST_MICRO_BATCHES * sum(map(self.logits_size, before))

    @property
    def num_logits(self) -> int:
        """Elements of the memory, float32, in which the head has each worker's logits."""
        return MOST_MICRO_BATCHES * sum(map(self.logits_size, self.families))


@dataclass(frozen=True, slots=True)
class Member:
    """Who a process is in a group.

    Attributes:
        index: of the worker.
        identity: by which the head knows this process.
        head: address of the head's socket.
        keys: of the group: whoever holds them belongs to it.
        delays_s: by worker, how far it is from the head, one way, in seconds by which whatever goes over its
            links is held up; from each other two are as far as both are from the head together.
    """

    index: int
    identity: str
    head: str
    keys: Keys
    delays_s: tuple[float, ...]

    @property
    def to_head_s(self) -> float:
        """How far this worker is from the head."""
        return self.delays_s[self.index]

    def to_worker_s(self, index: int) -> float:
        """How far this worker is from another one."""
        return self.delays_s[self.index] + self.delays_s[index]


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is told to serve.

    Attributes:
        logits: the memory of the head where its logits go.
    """

    member: Member
    plan: WorkerPlan
    logits: SharedLogits

    @property
    def index(self) -> int:
        """Of the worker."""
        return self.member.index
