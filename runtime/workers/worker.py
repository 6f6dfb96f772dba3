"""A worker: the process that has the engines of some spans, and the pages of their layers.

    head --step--> lay out --> run the calls here, as the rows they need come in --> done --> head
                                    ^                   |
                              rows from workers    rows to workers

It is told what to serve through its standard input, which the head holds open: when it ends, so does the
worker, whatever became of the head (in actors Ray sees to both: `on_ray`). What comes in is looked at between
two calls; of several micro-batches the first that can go on does.
"""

from __future__ import annotations

import os
import pickle
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import zmq

from blockzoo.runtime.exec.adapters import AdapterUnavailableError
from blockzoo.runtime.workers.hosted import Hosted, SpanError
from blockzoo.runtime.workers.meeting import Guest, Meeting
from blockzoo.runtime.workers.part import Inbox, PartStep
from blockzoo.runtime.workers.settings import Member, WorkerSettings
from blockzoo.runtime.workers.sockets import Sockets, own_address
from blockzoo.runtime.workers.wire import (
    ALIVE,
    LOADER,
    PAGES,
    PASSED,
    STEP,
    pack_json,
    unpack_json,
    unpack_rows,
)


class Worker:
    """Takes messages, and runs what can be run."""

    def __init__(self, settings: WorkerSettings, hosted: Hosted, sockets: Sockets) -> None:
        self._me, self._hosted, self._sockets = settings.index, hosted, sockets
        self._member = member = settings.member
        self._head = sockets.connect(zmq.DEALER, member.head, member.identity, member.to_head_s)
        self._inward, self.address = sockets.listen(zmq.PULL, own_address(member.head))
        self._outward: dict[int, tuple[str, zmq.Socket[bytes]]] = {}  # by worker
        self._poller = zmq.Poller()
        for socket in (self._head, self._inward):
            self._poller.register(socket, zmq.POLLIN)
        self._step = 0  # the newest that is known: what belongs to others is not waited for any more
        self._running: dict[int, PartStep] = {}  # by micro-batch, in order
        self._came: dict[tuple[int, int], Inbox] = {}  # by step, micro-batch

    def run(self) -> None:
        """Never returns."""
        self._tell(b"ready", {"address": self.address})
        while True:
            self._take_in(None if self._next() is None else 0)
            micro = self._next()
            if micro is not None:
                self._run_call(micro)

    def _tell(self, kind: bytes, what: Any) -> None:
        self._head.send_multipart([kind, pack_json(what)])

    def _take_in(self, timeout: int | None) -> None:
        """All that has come; waits for something where `timeout` is None."""
        while events := dict(self._poller.poll(timeout)):
            timeout = 0
            if self._head in events:
                kind, *frames = self._head.recv_multipart()
                self._obey(kind, frames)
            if self._inward in events:
                which, *rows = self._inward.recv_multipart()
                step, micro, source, taker = PASSED.unpack(which)
                if step < self._step:  # of something that was given up
                    continue
                if micro == PAGES:
                    self._take_pages(step, source, rows)
                else:
                    self._came.setdefault((step, micro), {})[source, taker] = rows

    def _obey(self, kind: bytes, frames: list[bytes]) -> None:
        if kind == b"peers":
            self._connect(unpack_json(frames[0]))
        elif kind == b"load":
            threading.Thread(target=self._load, args=(unpack_json(frames[0]),), daemon=True).start()
        elif kind == b"homes":
            self._hosted.take(unpack_json(frames[0]))
        elif kind == b"release":
            self._hosted.release_memory()
        else:
            step, micro, family = STEP.unpack(frames[0])
            self._go_on_to(step)
            if kind == b"step":
                self._begin(micro, family, frames[1])
            elif kind == b"copy":
                source, destination = np.frombuffer(frames[1], np.int32).reshape(2, -1)
                self._hosted.executor(family, 0).kv.copy(source, destination)
            elif kind == b"discard":
                self._hosted.executor(family, 0).discard(np.frombuffer(frames[1], np.int32))
            elif kind == b"expect":
                self._tell(b"took", {"step": step, "pages": 0})
            elif kind == b"give":
                self._give_pages(step, micro, family, np.frombuffer(frames[1], np.int32))

    def _give_pages(self, step: int, worker: int, family: int, pages: np.ndarray) -> None:
        keys, values = self._hosted.executor(family, 0).kv.read(pages)
        which = PASSED.pack(step, PAGES, family, 0)
        self._outward[worker][1].send_multipart([which, pages.data, keys.data, values.data])

    def _take_pages(self, step: int, family: int, frames: list[bytes]) -> None:
        kv = self._hosted.executor(family, 0).kv
        pages = np.frombuffer(frames[0], np.int32)
        shape = (len(pages), *kv.page_shape)
        kv.write(pages, *(np.frombuffer(each, kv.page_dtype).reshape(shape) for each in frames[1:]))
        self._tell(b"took", {"step": step, "pages": len(pages)})

    def _load(self, spans: list[int]) -> None:
        """From a thread of its own, while calls run here."""
        try:
            problems = self._hosted.load(spans)
        except Exception as error:
            traceback.print_exception(error)
            problems = dict.fromkeys(spans, str(error))
        socket = self._sockets.connect(zmq.DEALER, self._member.head, self._member.identity + LOADER)
        socket.linger = -1
        socket.send_multipart([b"loaded", pack_json({"spans": spans, "problems": problems})])
        socket.close()

    def _go_on_to(self, step: int) -> None:
        """Forget what was under way of steps before: the head does not wait for it any more."""
        if step > self._step:
            self._step = step
            self._running.clear()
            self._came = {key: rows for key, rows in self._came.items() if key[0] >= step}

    def _connect(self, addresses: list[str]) -> None:
        for index, address in enumerate(addresses):
            known = self._outward.get(index)
            if index == self._me or (known is not None and known[0] == address):
                continue
            if known is not None:
                known[1].close(0)
            delay_s = self._member.to_worker_s(index)
            self._outward[index] = address, self._sockets.connect(zmq.PUSH, address, delay_s=delay_s)

    def _begin(self, micro: int, family: int, rows: bytes) -> None:
        try:
            self._running[micro] = self._hosted.executor(family, micro).begin(unpack_rows(rows))
        except Exception as error:
            self._fail(micro, error)
        else:
            self._report(micro)  # none of whose rows may come as far as here

    def _next(self) -> int | None:
        """The first micro-batch that can go on: calls of a span run in the order of the micro-batches."""
        taken: set[int] = set()
        for micro, part in self._running.items():
            inbox = self._came.setdefault((self._step, micro), {})
            if part.next_span not in taken and part.can_run(inbox):
                return micro
            taken |= part.pending_spans()
        return None

    def _run_call(self, micro: int) -> None:
        part = self._running[micro]
        try:
            passings = part.run_next(self._came[self._step, micro])
        except Exception as error:
            self._fail(micro, error)
            return
        for worker, source, taker, rows in passings:
            which = PASSED.pack(self._step, micro, source, taker)
            self._outward[worker][1].send_multipart([which, *(each.data for each in rows)])
        self._report(micro)

    def _report(self, micro: int) -> None:
        """Tell the head of a micro-batch that is done here."""
        part = self._running[micro]
        if part.is_done:
            del self._running[micro]
            self._came.pop((self._step, micro), None)
            logits = part.logits()
            done = {"step": self._step, "micro": micro, "logits": logits}
            done |= {"calls": part.num_calls, "rows": part.num_call_rows}
            self._head.send_multipart([b"done", pack_json(done), *self._hosted.far_logits(logits)])

    def _fail(self, micro: int, error: Exception) -> None:
        """Give up the step; the head decides what becomes of it."""
        chain = error.chain if isinstance(error, AdapterUnavailableError) else None
        if chain is None:
            traceback.print_exception(error)
        self._running.clear()
        self._tell(b"error", {"step": self._step, "micro": micro, "chain": chain, "message": str(error)})


def _answer_pings(sockets: Sockets, member: Member) -> None:
    """From a thread, which a long call does not hold up."""
    socket = sockets.connect(zmq.DEALER, member.head, member.identity + ALIVE, member.to_head_s)
    while True:
        socket.recv_multipart()
        socket.send_multipart([b"pong", b""])


def serve(told: Callable[[], Any]) -> None:
    """Meet the others, where that is the first thing told, and serve until this process ends."""
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
    Worker(settings, hosted, sockets).run()


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
    serve(told.get)


if __name__ == "__main__":
    main()
