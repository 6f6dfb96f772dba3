"""Workers that the head before has left behind, as the next one finds and takes them (`head_line`)."""

from __future__ import annotations

import fcntl
import os
import pickle
import select
import shutil
import signal
import socket
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blockzoo.runtime.workers.head_line import Held, connect, peer_of
from blockzoo.runtime.workers.pairs import Pair

_ANSWER_S = 5.0  # that a worker has to say what it holds: its head has gone in the middle of a step, perhaps
_LOG = 2


class HeadFolder:
    """Where the workers of one head wait for the next one, should it go without closing them. It goes with
    this object.

    Attributes:
        folder: of all heads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = Path(tempfile.mkdtemp(dir=folder))  # of this user alone
        lock = _lock(self._path)
        assert lock is not None, "nobody else knows of it"
        self._number = 0
        weakref.finalize(self, _remove, self._path, lock)

    def next_path(self) -> Path:
        """Where another worker may listen."""
        self._number += 1
        return self._path / f"{self._number}.sock"


class AdoptedProcess:
    """A worker that another head started, told through a socket. See `WorkerProcess`."""

    def __init__(self, connection: socket.socket, path: Path) -> None:
        self._pid = peer_of(connection)[0]
        self._process = os.pidfd_open(self._pid)  # no other process has it, whatever becomes of the number
        weakref.finalize(self, os.close, self._process)
        self._pair, theirs = Pair.new()
        socket.send_fds(connection, [b"+"], [theirs.fileno(), _LOG])
        theirs.close()
        self._line = connection.makefile("wb")
        connection.close()  # the line is left
        self.tell(path)

    @property
    def pair(self) -> Pair:
        """See `WorkerProcess`."""
        return self._pair

    @property
    def pid(self) -> int:
        """See `WorkerProcess`."""
        return self._pid

    @property
    def ended(self) -> bool:
        """See `WorkerProcess`."""
        return bool(select.select([self._process], [], [], 0)[0])

    @property
    def why(self) -> str:
        """See `WorkerProcess`."""
        return "ended"

    def tell(self, what: object) -> None:
        """See `WorkerProcess`."""
        with suppress(OSError, ValueError):  # it has ended; that is seen where it is waited for
            pickle.dump(what, self._line)
            self._line.flush()

    def kill(self) -> None:
        """See `WorkerProcess`."""
        _kill(self._process)
        self._pair.close()
        with suppress(OSError):
            self._line.close()


@dataclass
class Orphan:
    """A worker without a head, that waits for what becomes of it."""

    held: Held
    connection: socket.socket

    def end(self) -> None:
        """Nobody wants it."""
        with suppress(OSError):
            process = os.pidfd_open(peer_of(self.connection)[0])
            _kill(process)
            os.close(process)
        self.connection.close()


class Orphans:
    """Those that heads that are gone have left in a folder; none is there for any other head meanwhile.

    Attributes:
        found: they.
    """

    def __init__(self, folder: Path) -> None:
        self.found: list[Orphan] = []
        self._left: list[tuple[Path, int]] = []
        for path in sorted(each for each in folder.iterdir() if each.is_dir()):
            with suppress(OSError):  # another head removes it right now
                lock = _lock(path)
                if lock is not None:
                    self._left.append((path, lock))
                    self.found += _those_in(path)

    def adopt(self, chosen: Mapping[int, Orphan], home: HeadFolder) -> dict[int, AdoptedProcess]:
        """Take some, and end all others."""
        taken: dict[int, AdoptedProcess] = {}
        with suppress(OSError):  # one has ended: then it is missing
            for index, orphan in chosen.items():
                taken[index] = AdoptedProcess(orphan.connection, home.next_path())
        for orphan in self.found:
            if orphan not in chosen.values():
                orphan.end()
        for path, lock in self._left:
            _remove(path, lock)
        self.found, self._left = [], []
        return taken


def _those_in(path: Path) -> list[Orphan]:
    found = []
    for each in path.glob("*.sock"):
        connection = None
        with suppress(OSError, EOFError, pickle.UnpicklingError):  # nobody listens: it has ended
            connection = connect(each, _ANSWER_S)
            if not peer_of(connection)[1]:
                raise PermissionError
            with connection.makefile("rb") as said:
                found.append(Orphan(pickle.load(said), connection))
            continue
        if connection is not None:
            connection.close()
    return found


def _lock(path: Path) -> int | None:
    """Lock a head's folder; None: it lives."""
    descriptor = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _kill(process: int) -> None:
    """End a process, and wait until it has."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [], _ANSWER_S)
