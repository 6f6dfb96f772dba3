"""The process of a worker: from what it is told to what it serves.

It is told what to serve through its standard input, which the head holds open: when it ends, so does the
worker, whatever became of the head (in actors Ray sees to both: `on_ray`).
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import zmq

from blockzoo.runtime.workers.hosted import Hosted, SpanError
from blockzoo.runtime.workers.meeting import Guest, Meeting
from blockzoo.runtime.workers.pairs import Pair
from blockzoo.runtime.workers.settings import Member, WorkerSettings
from blockzoo.runtime.workers.sockets import Sockets
from blockzoo.runtime.workers.wire import ALIVE, pack_json
from blockzoo.runtime.workers.worker import Worker


def _answer_pings(sockets: Sockets, member: Member) -> None:
    """From a thread, which a long call does not hold up."""
    socket = sockets.connect(zmq.DEALER, member.head, member.identity + ALIVE, member.to_head_s)
    while True:
        socket.recv_multipart()
        socket.send_multipart([b"pong", b""])


def serve(told: Callable[[], Any], pair: Pair | None = None) -> None:
    """Meet the others, where that is the first thing told, and serve until this process ends; `pair`: this
    process's end of one with the head."""
    first: Meeting | WorkerSettings = told()
    member = first.member
    sockets = Sockets(member.keys)
    threading.Thread(target=_answer_pings, args=(sockets, member), daemon=True).start()
    if isinstance(first, Meeting):
        Guest(sockets, member).take_part()
        settings: WorkerSettings = told()
    else:
        settings = first
    try:
        hosted = Hosted(settings)
    except SpanError as error:
        head = sockets.connect(zmq.DEALER, member.head, member.identity)
        head.linger = -1
        head.send_multipart([b"failed", pack_json(error.problems)])
        threading.Event().wait()  # for the head to end it
    Worker(settings, hosted, sockets, pair).run()


def _hear_head(told: SimpleQueue[Any]) -> None:
    with open(0, "rb", closefd=False) as head:  # of its own: nothing else waits for it as this process ends
        try:
            while True:
                told.put(pickle.load(head))
        except EOFError:
            os._exit(0)


def main() -> None:
    """Serve until the head ends."""
    told: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_hear_head, args=(told,), daemon=True).start()
    serve(told.get, Pair.inherited(int(sys.argv[1])))


if __name__ == "__main__":
    main()
