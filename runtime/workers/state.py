"""What the head knows of a worker, whose processes follow each other as they fail."""

from __future__ import annotations

from dataclasses import dataclass, field

from blockzoo.runtime.workers.logits_memory import LogitsMemory
from blockzoo.runtime.workers.pairs import Pair
from blockzoo.runtime.workers.processes import WorkerProcess


@dataclass(slots=True)
class WorkerState:
    """A worker's process, which others follow as it fails."""

    index: int
    number: int = 0  # of its processes so far
    process: WorkerProcess | None = None
    waits: bool = False  # to be told what to serve
    memory: LogitsMemory | None = None
    address: str | None = None  # for the other workers; None: it does not serve
    problems: dict[int, str] = field(default_factory=dict)  # with its spans
    loading: bool = False  # more spans, beside the steps
    unloadable: dict[int, str] = field(default_factory=dict)  # of these
    heard: float = 0.0
    asked: float = 0.0
    num_told: int = 0  # messages to its process

    @property
    def identity(self) -> str:
        """Of the process that runs now."""
        return f"{self.index}.{self.number}"

    @property
    def pair(self) -> Pair | None:
        """With the process that runs now, where there is one and it runs here."""
        return None if self.process is None else self.process.pair

    @property
    def ended(self) -> bool:
        """Whether there is no process."""
        return self.process is None or self.process.ended

    def kill(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
        self.process = self.address = None

    @property
    def why(self) -> str:
        """What became of it."""
        return f"worker {self.index} {'is not there' if self.process is None else self.process.why}"
