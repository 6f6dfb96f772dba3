"""A worker's line to its head, and how it finds another head when that is gone.

    FOLDER/<head>/lock              held by the head as long as it lives
    FOLDER/<head>/<worker>.sock     where the worker waits for the next one

Who connects is told what the worker holds (`Held`), and hands over an end of a pair, and its log; what it
says from then on is what a head says (`adoption` is its side).
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple

from blockzoo.runtime.exec.topology import Span
from blockzoo.runtime.workers.pairs import Pair
from blockzoo.runtime.workers.settings import EngineKind
from blockzoo.runtime.workers.socket_names import short_name

WAIT_S = 120.0
"""That a worker without a head waits for another one."""
_LOOK_EVERY_S = 0.5
_ANSWER_S = 10.0
_LOG = 2  # descriptor
_PEER = struct.Struct("3i")  # pid, uid, gid


class Held(NamedTuple):
    """What a worker has when its head is gone.

    Attributes:
        worker: its index in its group.
        kind: of its engines.
        spans: those that it has engines of.
    """

    worker: int
    kind: EngineKind
    spans: frozenset[Span]


class HeadLine:
    """What a head says through a stream that it holds open, heard by a thread.

    Attributes:
        bell: descriptor that can be read once the head is gone, where this process goes on then.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._told: SimpleQueue[Any] = SimpleQueue()
        self.bell = os.eventfd(0)
        self._goes_on = False
        self._lock = threading.Lock()
        threading.Thread(target=self._hear, args=(stream,), daemon=True).start()

    def told(self) -> Any:
        """The next thing said; waits for it."""
        return self._told.get()

    def survive(self) -> None:
        """Go on from now on when the head is gone; else this process ends with it."""
        with self._lock:
            self._goes_on = True

    def close(self) -> None:
        """Nobody waits for the bell any more."""
        os.close(self.bell)

    def _hear(self, stream: BinaryIO) -> None:
        try:
            while True:
                self._told.put(pickle.load(stream))
        except (EOFError, OSError, pickle.UnpicklingError):  # it is gone, in the middle of a word perhaps
            with self._lock:
                if not self._goes_on:
                    os._exit(0)
            os.eventfd_write(self.bell, 1)


def peer_of(connection: socket.socket) -> tuple[int, bool]:
    """The process at the other end of a Unix socket; whether it is this user's."""
    pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid == os.getuid()


def wait_for_head(path: Path, held: Held, wait_s: float = WAIT_S) -> tuple[HeadLine, Pair, Path] | None:
    """Listen at `path` until another head takes this worker: the line to it, this process's end of a pair,
    and where to wait the next time. None: none came in time, or the folder is gone."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, _LOG):  # who reads them has gone, or waits for their end
        os.dup2(null, descriptor)
    os.close(null)
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            bind(listener, path)
        except OSError:
            return None
        listener.settimeout(_LOOK_EVERY_S)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and path.exists():
            try:
                connection, _ = listener.accept()
                found = _taken(connection, held)
            except (OSError, EOFError, pickle.UnpicklingError):  # nobody, or one who has gone again
                continue
            if found is not None:
                return found
    return None


def _taken(connection: socket.socket, held: Held) -> tuple[HeadLine, Pair, Path] | None:
    if not peer_of(connection)[1]:
        connection.close()
        return None
    connection.settimeout(_ANSWER_S)
    with connection.makefile("wb") as out:
        pickle.dump(held, out)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
    if len(descriptors) != 2:
        connection.close()
        return None
    pair, log = descriptors
    for descriptor in (1, _LOG):
        os.dup2(log, descriptor)
    os.close(log)
    connection.settimeout(None)
    stream = connection.makefile("rb")
    connection.close()  # the stream is left
    path: Path = pickle.load(stream)
    return HeadLine(stream), Pair.inherited(pair), path


def bind(listener: socket.socket, path: Path) -> None:
    """Listen at a path of any length."""
    with short_name(path) as name:
        listener.bind(name)
    listener.listen(1)


def connect(path: Path, timeout_s: float) -> socket.socket:
    """Connect to who listens there. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    try:
        with short_name(path) as name:
            connection.connect(name)
    except OSError:
        connection.close()
        raise
    return connection
