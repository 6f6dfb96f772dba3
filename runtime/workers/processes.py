"""Processes of workers, as the head starts and ends them: here those of this machine (`on_ray`: any)."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from blockzoo.runtime.workers.adoption import AdoptedProcess, HeadFolder, Orphan, Orphans
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
    """A child of this process, told through its standard input, which it reads to the end of the head.

    Args:
        path: where it waits for another head then; None: it ends.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._pair, theirs = Pair.new()
        descriptor = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(descriptor), *([] if path is None else [str(path)])],
            stdin=subprocess.PIPE,
            pass_fds=[descriptor],
            start_new_session=path is not None,  # a signal to all processes of the head's is not for it
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
    """Starts processes on this machine.

    Args:
        folder: where they wait for another head when this one ends without closing them; None: they end.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._home = None if folder is None else HeadFolder(folder)
        self._adopted: dict[int, AdoptedProcess] = {}

    def orphans(self) -> Orphans | None:
        """Those that another head has left; None: there is no folder to look into."""
        return None if self._home is None else Orphans(self._home.folder)

    def adopt(self, orphans: Orphans, chosen: Mapping[int, Orphan]) -> bool:
        """Start some of them next, and end all others; whether any are left of these."""
        assert self._home is not None, "it found them"
        self._adopted = orphans.adopt(chosen, self._home)
        return bool(self._adopted)

    def start(self, index: int) -> WorkerProcess:
        """See `Processes`."""
        adopted = self._adopted.pop(index, None)
        if adopted is not None:
            return adopted
        return LocalProcess(None if self._home is None else self._home.next_path())
