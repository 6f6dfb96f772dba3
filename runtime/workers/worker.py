"""A worker: the process that has the engines of some spans, and the pages of their layers.

    head --step--> lay out --> run the calls here, as the rows they need come in --> done --> head
                                    ^                   |
                              rows from workers    rows to workers

What comes in is looked at between
two calls; of several micro-batches the first that can go on does.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zmq

from blockzoo.runtime.exec.adapters import AdapterUnavailableError
from blockzoo.runtime.workers import kv_orders
from blockzoo.runtime.workers.hosted import Hosted
from blockzoo.runtime.workers.pairs import Frame, Pair
from blockzoo.runtime.workers.part import Inbox, PartStep
from blockzoo.runtime.workers.settings import WorkerSettings
from blockzoo.runtime.workers.sockets import Sockets, own_address
from blockzoo.runtime.workers.wire import (
    LOADER,
    NUMBER,
    PAGES,
    PASSED,
    STEP,
    pack_json,
    unpack_json,
)


class Worker:
    """Takes messages, and runs what can be run.

    Args:
        pair: this process's end of one with the head.
        bell: descriptor that can be read once the head is gone.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        hosted: Hosted,
        sockets: Sockets,
        pair: Pair | None = None,
        bell: int | None = None,
    ) -> None:
        self._me, self._hosted, self._sockets = settings.index, hosted, sockets
        self._member = member = settings.member
        self._head = sockets.connect(zmq.DEALER, member.head, member.identity, member.to_head_s)
        self._inward, self.address = sockets.listen(zmq.PULL, own_address(member.head))
        self._outward: dict[int, tuple[str, zmq.Socket[bytes]]] = {}  # by worker
        self._to_head = None if member.to_head_s else pair
        self._bell, self._has_head = bell, True
        self._loading: threading.Thread | None = None
        self._pairs: dict[int, Pair] = {}  # by worker
        self._num_heard, self._early = 0, dict[int, tuple[list[bytes], list[Pair]]]()
        self._watch()
        self._step = 0  # the newest that is known: what belongs to others is not waited for any more
        self._running: dict[int, PartStep] = {}  # by micro-batch, in order
        self._came: dict[tuple[int, int], Inbox] = {}  # by step, micro-batch

    def run(self) -> None:
        """Until the head is gone."""
        # by ZeroMQ, so that what comes that way afterwards finds the way
        self._head.send_multipart([b"ready", pack_json({"address": self.address})])
        while self._has_head:
            self._take_in(None if self._next() is None else 0)
            micro = self._next()
            if micro is not None:
                self._run_call(micro)
        if self._loading is not None:
            self._loading.join()
        for pair in self._by_descriptor.values():
            pair.close()

    def _watch(self) -> None:
        """Look for messages where they may come from now."""
        self._poller = zmq.Poller()
        bell = [] if self._bell is None else [self._bell]
        for source in (self._head, self._inward, *bell):
            self._poller.register(source, zmq.POLLIN)
        pairs = [*([] if self._to_head is None else [self._to_head]), *self._pairs.values()]
        self._by_descriptor = {pair.fileno(): pair for pair in pairs}
        for descriptor in self._by_descriptor:
            self._poller.register(descriptor, zmq.POLLIN)

    def _tell(self, kind: bytes, what: Any, more: Sequence[Frame] = ()) -> None:
        self._say([kind, pack_json(what), *more])

    def _say(self, frames: Sequence[Frame]) -> None:
        if self._to_head is None or not self._to_head.send(frames):
            self._head.send_multipart(frames)

    def _send(self, worker: int, frames: Sequence[Frame]) -> None:
        pair = self._pairs.get(worker)
        if pair is None or not pair.send(frames):
            self._outward[worker][1].send_multipart(frames)

    def _take_in(self, timeout: int | None) -> None:
        """All that has come; waits for something where `timeout` is None."""
        while events := dict(self._poller.poll(timeout)):
            timeout = 0
            if self._bell in events:
                self._has_head = False
                return
            pairs = [self._by_descriptor[source] for source in events if source in self._by_descriptor]
            for pair in pairs:  # which the first may replace
                self._take_from(pair)
            if self._head in events:
                self._hear(self._head.recv_multipart(), [])
            if self._inward in events:
                self._take_rows(self._inward.recv_multipart())

    def _take_from(self, pair: Pair) -> None:
        message = pair.receive()
        if message is None:  # its other end is no more
            if pair is self._to_head:
                self._to_head = None
            self._pairs = {index: each for index, each in self._pairs.items() if each is not pair}
            self._watch()
        elif pair is self._to_head:
            self._hear(*message)
        else:
            self._take_rows(message.frames)

    def _hear(self, frames: list[bytes], ends: list[Pair]) -> None:
        """What the head says, in the order in which it said it, whichever way it came."""
        self._early[NUMBER.unpack(frames[0])[0]] = frames[1:], ends
        while self._num_heard in self._early:
            (kind, *rest), ends = self._early.pop(self._num_heard)
            self._num_heard += 1
            if kind == b"peers":
                self._connect(**unpack_json(rest[0]), ends=ends)
            else:
                self._obey(kind, rest)

    def _take_rows(self, frames: list[bytes]) -> None:
        which, *rows = frames
        step, micro, source, taker = PASSED.unpack(which)
        if step < self._step:  # of something that was given up
            return
        if micro == PAGES:
            self._take_pages(step, source, rows)
        else:
            self._came.setdefault((step, micro), {})[source, taker] = rows

    def _obey(self, kind: bytes, frames: list[bytes]) -> None:
        if kind == b"load":
            spans = dict(unpack_json(frames[0]))
            self._loading = threading.Thread(target=self._load, args=(spans,), daemon=True)
            self._loading.start()
        elif kind == b"homes":
            self._hosted.take(**unpack_json(frames[0]))
        elif kind == b"release":
            self._hosted.release_memory()
        else:
            step, micro, family = STEP.unpack(frames[0])
            self._go_on_to(step)
            if kind == b"step":
                self._begin(micro, family, frames[1], frames[2:])
            elif kind in kv_orders.KINDS:
                found = kv_orders.obey(self._hosted.executor(family, 0).kv, kind, frames[1:])
                if found is not None:
                    self._tell(b"kv", {"step": step, "frames": len(found)}, _frames(found))
            elif kind == b"discard":
                self._hosted.executor(family, 0).discard(np.frombuffer(frames[1], np.int32))
            elif kind == b"expect":
                self._tell(b"took", {"step": step, "pages": 0})
            elif kind == b"give":
                self._give_pages(step, micro, family, np.frombuffer(frames[1], np.int32))

    def _give_pages(self, step: int, worker: int, family: int, pages: np.ndarray) -> None:
        keys, values = self._hosted.executor(family, 0).kv.read(pages)
        which = PASSED.pack(step, PAGES, family, 0)
        self._send(worker, [which, pages.data, keys.data, values.data])

    def _take_pages(self, step: int, family: int, frames: list[bytes]) -> None:
        count = kv_orders.write(self._hosted.executor(family, 0).kv, frames)
        self._tell(b"took", {"step": step, "pages": count})

    def _load(self, spans: Mapping[int, int]) -> None:
        """From a thread of its own, while calls run here."""
        try:
            problems = self._hosted.load(spans)
        except Exception as error:
            traceback.print_exception(error)
            problems = dict.fromkeys(spans, str(error))
        socket = self._sockets.connect(zmq.DEALER, self._member.head, self._member.identity + LOADER)
        socket.linger = -1
        socket.send_multipart([b"loaded", pack_json({"problems": problems})])
        socket.close()

    def _go_on_to(self, step: int) -> None:
        """Forget what was under way of steps before: the head does not wait for it any more."""
        if step > self._step:
            self._step = step
            self._running.clear()
            self._came = {key: rows for key, rows in self._came.items() if key[0] >= step}

    def _connect(self, addresses: list[str], pairs: list[int], ends: list[Pair]) -> None:
        for pair in self._pairs.values():
            pair.close()
        self._pairs = dict(zip(pairs, ends, strict=False))  # where some did not come, the other way is there
        self._watch()
        for index, address in enumerate(addresses):
            known = self._outward.get(index)
            if index == self._me or (known is not None and known[0] == address):
                continue
            if known is not None:
                known[1].close(0)
            delay_s = self._member.to_worker_s(index)
            self._outward[index] = address, self._sockets.connect(zmq.PUSH, address, delay_s=delay_s)

    def _begin(self, micro: int, family: int, data: bytes, hidden: list[bytes]) -> None:
        try:
            rows = self._hosted.rows_of(data, hidden)
            self._running[micro] = self._hosted.executor(family, micro).begin(rows)
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
            self._send(worker, [which, *(each.data for each in rows)])
        self._report(micro)

    def _report(self, micro: int) -> None:
        """Tell the head of a micro-batch that is done here."""
        part = self._running[micro]
        if part.is_done:
            del self._running[micro]
            self._came.pop((self._step, micro), None)
            said, arrays = part.said()
            more = [*_frames(arrays), *self._hosted.far_logits(part.logits)]
            self._say([b"done", STEP.pack(self._step, micro, 0), said, *more])

    def _fail(self, micro: int, error: Exception) -> None:
        """Give up the step; the head decides what becomes of it."""
        chain = error.chain if isinstance(error, AdapterUnavailableError) else None
        if chain is None:
            traceback.print_exception(error)
        self._running.clear()
        self._tell(b"error", {"step": self._step, "micro": micro, "chain": chain, "message": str(error)})


def _frames(arrays: Sequence[np.ndarray]) -> list[memoryview]:
    return [np.ascontiguousarray(each).data for each in arrays]
