"""The process of a worker: from what it is told to what it serves.

It is told what to serve through its standard input, which the head holds open: when it ends, so does the
worker, whatever became of the head (in actors Ray sees to both: `on_ray`). Where it has been given a place to
wait, it keeps its engines, and waits there for another head.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from blockzoo.runtime.workers.head_line import HeadLine, wait_for_head
from blockzoo.runtime.workers.hosted import Hosted, SpanError
from blockzoo.runtime.workers.meeting import Guest, Meeting
from blockzoo.runtime.workers.pairs import Pair
from blockzoo.runtime.workers.settings import Member, WorkerSettings
from blockzoo.runtime.workers.sockets import Sockets
from blockzoo.runtime.workers.wire import ALIVE, pack_json
from blockzoo.runtime.workers.worker import Worker

_LOOK_EVERY_MS = 200


class _Pings:
    """Answers the head's, from a thread, which a long call does not hold up."""

    def __init__(self, sockets: Sockets, member: Member) -> None:
        self._sockets, self._member = sockets, member
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._over.set()
        self._thread.join()

    def _answer(self) -> None:
        member = self._member
        socket = self._sockets.connect(zmq.DEALER, member.head, member.identity + ALIVE, member.to_head_s)
        while not self._over.is_set():
            if socket.poll(_LOOK_EVERY_MS):
                socket.recv_multipart()
                socket.send_multipart([b"pong", b""])


def serve(
    told: Callable[[], Any],
    pair: Pair | None = None,
    line: HeadLine | None = None,
    before: Hosted | None = None,
) -> Hosted:
    """Meet the others, where that is the first thing told, and serve.

    Args:
        told: what the head says.
        pair: this process's end of one with the head.
        line: to a head that this process outlives; None: it ends with the head.
        before: what was served to another head.

    Returns:
        What is here, once the head is gone.
    """
    first: Meeting | WorkerSettings = told()
    member = first.member
    sockets = Sockets(member.keys)
    pings = _Pings(sockets, member)
    if isinstance(first, Meeting):
        Guest(sockets, member).take_part()
        settings: WorkerSettings = told()
    else:
        settings = first
    try:
        hosted = Hosted(settings, before)
    except SpanError as error:
        head = sockets.connect(zmq.DEALER, member.head, member.identity)
        head.linger = -1
        head.send_multipart([b"failed", pack_json(error.problems)])
        threading.Event().wait()  # for the head to end it
    if line is not None:
        line.survive()
    Worker(settings, hosted, sockets, pair, None if line is None else line.bell).run()
    pings.stop()
    sockets.close()
    return hosted


def main() -> None:
    """Serve until the head ends, and then the next one that comes."""
    descriptor, *paths = sys.argv[1:]
    line, pair = HeadLine(os.fdopen(os.dup(0), "rb")), Pair.inherited(int(descriptor))
    path = Path(paths[0]) if paths else None
    hosted: Hosted | None = None
    while True:
        hosted = serve(line.told, pair, None if path is None else line, hosted)
        assert path is not None, "it ends with its head"
        next_one = wait_for_head(path, hosted.forget_pages())
        if next_one is None:
            os._exit(0)
        line.close()
        line, pair, path = next_one


if __name__ == "__main__":
    main()
