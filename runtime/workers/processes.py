"""Processes of workers, as the head starts and ends them: here those of this machine (`on_ray`: any)."""

from __future__ import annotations

import pickle
import subprocess
import sys
from contextlib import suppress
from typing import Protocol

from blockzoo.runtime.workers.pairs import Pair

_MODULE = "blockzoo.runtime.workers.worker_process"


class WorkerStartError(RuntimeError):
    """A worker did not start."""


class UnloadableError(Exception):
    """Workers could not have some spans; why, by index."""

    def __init__(self, problems: dict[int, str]) -> None:
        super().__init__(str(problems))
        self.problems = problems


class WorkerProcess(Protocol):
    """One process, which ends when the head does."""

    @property
    def pair(self) -> Pair | None:
        """The head's end of one with it; None: there is none."""

    @property
    def pid(self) -> int:
        """Its process id, where it runs. Raises WorkerStartError: it does not."""

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""

    @property
    def why(self) -> str:
        """What became of it, once it has ended: "ended with 1"."""

    def tell(self, what: object) -> None:
        """Give it what it asks for next; nothing happens where it has ended."""

    def kill(self) -> None:
        """End it."""


class Processes(Protocol):
    """Starts processes."""

    def start(self, index: int) -> WorkerProcess:
        """A new process of a worker."""


class LocalProcess:
    """A child of this process, told through its standard input, which it reads to the end of the head."""

    def __init__(self) -> None:
        self._pair, theirs = Pair.new()
        descriptor = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(descriptor)], stdin=subprocess.PIPE, pass_fds=[descriptor]
        )
        theirs.close()

    @property
    def pair(self) -> Pair:
        """See `WorkerProcess`."""
        return self._pair

    @property
    def pid(self) -> int:
        """See `WorkerProcess`."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """See `WorkerProcess`."""
        return self._process.poll() is not None

    @property
    def why(self) -> str:
        """See `WorkerProcess`."""
        return f"ended with {self._process.returncode}"

    def tell(self, what: object) -> None:
        """See `WorkerProcess`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; that is seen where it is waited for
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()

    def kill(self) -> None:
        """See `WorkerProcess`."""
        self._process.kill()
        self._process.wait()
        self._pair.close()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()


class LocalProcesses:
    """Starts processes on this machine."""

    def start(self, index: int) -> LocalProcess:
        """See `Processes`."""
        return LocalProcess()
