"""A worker: the process that has the engines of some spans, and the pages of their layers.

    head --step--> lay out --> run the calls here, as the rows they need come in --> done --> head
                                    ^                   |
                              rows from workers    rows to workers

It takes its settings from standard input, which the head holds open: when it ends, so does the worker,
whatever became of the head. What comes in is looked at between two calls; of several micro-batches the first
that can go on does.
"""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import zmq

from blockzoo.engines.base import Embedding, Engine
from blockzoo.engines.choose import make_engines
from blockzoo.runtime.exec.adapters import AdapterCache, AdapterInputs, AdapterUnavailableError
from blockzoo.runtime.exec.topology import ChainPlan
from blockzoo.runtime.workers.part import Inbox, PartExecutor, PartStep
from blockzoo.runtime.workers.settings import WorkerSettings
from blockzoo.runtime.workers.sockets import Sockets
from blockzoo.runtime.workers.wire import ALIVE, PASSED, STEP, pack_json, unpack_json, unpack_rows
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.store import Zoo


class SpanError(Exception):
    """Spans of this worker cannot be had; why, by index."""

    def __init__(self, problems: dict[int, str]) -> None:
        super().__init__(str(problems))
        self.problems = problems


class Part:
    """What a worker has of a zoo."""

    def __init__(self, settings: WorkerSettings) -> None:
        plan = settings.plan
        self._settings, self._plan = settings, plan
        zoo = Zoo(plan.zoo, plan.manifest)
        self._maker = make_engines(
            "openvino",
            plan.precision,
            num_threads=plan.num_threads,
            int8_activations=plan.int8_activations,
            kv_precision=plan.kv_precision,
        )
        self._blocks: dict[str, Block] = {}
        self._engines = self._compile(zoo)
        self._embeddings = self._embed(zoo)
        self._inputs = self._adapter_inputs(zoo)
        self._ropes = {key: key[0].tables(key[2], key[1]) for key in {self._rope_key(i) for i in plan.ropes}}
        memory = mmap.mmap(settings.logits, 4 * plan.num_logits)
        self._logits = np.frombuffer(memory, np.float32)
        self._places: dict[tuple[int, int], PartExecutor] = {}  # by family's number, micro-batch

    @property
    def _chains(self) -> Sequence[ChainPlan]:
        return self._plan.topology.chains

    def _rope_key(self, chain: int) -> tuple[RopeConfig, int, int]:
        """Of tables that chains share: settings, positions, width."""
        return *self._plan.ropes[chain], self._chains[chain].family.head_dim

    def _block(self, zoo: Zoo, block_id: str) -> Block:
        if block_id not in self._blocks:
            self._blocks[block_id] = zoo.read_block(block_id)
        return self._blocks[block_id]

    def _compile(self, zoo: Zoo) -> dict[int, Engine]:
        spans, homes = self._plan.topology.spans, self._plan.homes
        mine = [index for index, home in enumerate(homes) if home == self._settings.index]
        self._maker.expect(len(mine))
        engines: dict[int, Engine] = {}
        problems: dict[int, str] = {}
        for index in mine:
            span = spans[index]
            try:
                blocks = [self._block(zoo, block_id) for block_id in span.block_ids]
                engines[index] = self._maker.span(blocks, drops_rows=span.drops_rows, lora=dict(span.lora))
            except (RuntimeError, ZooError, KeyError) as error:  # an EngineError; KeyError: no such block
                problems[index] = str(error)
        if problems:
            raise SpanError(problems)
        return engines

    def _embed(self, zoo: Zoo) -> dict[str, Embedding]:
        """Tables of the chains that begin here."""
        homes = self._plan.homes
        mine = {c.embed_id for c in self._chains if homes[c.uses[0].span] == self._settings.index}
        return {key: self._maker.embedding(self._block(zoo, key)) for key in sorted(mine)}

    def _adapter_inputs(self, zoo: Zoo) -> AdapterInputs:
        topology = self._plan.topology
        cache = AdapterCache(zoo.read_adapter, self._maker.arrays, self._plan.adapter_bytes)
        blocks = self._plan.manifest.blocks
        specs = [[blocks[block_id].spec for block_id in span.block_ids] for span in topology.spans]
        return AdapterInputs(cache, topology.chains, topology.spans, specs)

    def executor(self, number: int, micro: int) -> PartExecutor:
        """Of a family, by its number, and the place of a micro-batch; the first place has the pool of all."""
        for place in (0, micro):
            if (number, place) not in self._places:
                self._places[number, place] = self._make(number, place)
        return self._places[number, micro]

    def _make(self, number: int, micro: int) -> PartExecutor:
        plan = self._plan
        family = plan.families[number]
        used = {use.span for chain in self._chains if chain.family == family for use in chain.uses}
        size = plan.logits_size(family)
        begin = plan.logits_begin(family) + micro * size
        return PartExecutor(
            family,
            self._chains,
            plan.topology.spans,
            {index: engine for index, engine in self._engines.items() if index in used},
            self._embeddings,
            {index: self._ropes[self._rope_key(index)] for index in plan.ropes},
            self._maker.arrays,
            plan.num_pages[family],
            plan.max_tokens,
            plan.max_seqs,
            max_more_logits=plan.max_more_logits,
            homes=plan.homes,
            me=self._settings.index,
            inputs=self._inputs,
            shared=self._logits,
            logits=self._logits[begin : begin + size],
            before=self._places.get((number, 0)),
        )

    def release_memory(self) -> None:
        """Give back scratch, and what engines have their own copy of."""
        for executor in self._places.values():
            executor.release_memory()
        for block in self._blocks.values():
            block.drop_pages()


class Worker:
    """Takes messages, and runs what can be run."""

    def __init__(self, settings: WorkerSettings, part: Part, sockets: Sockets) -> None:
        self._me, self._part, self._sockets = settings.index, part, sockets
        self._head = sockets.connect(zmq.DEALER, settings.head, settings.identity)
        self._inward, self.address = sockets.listen(zmq.PULL)
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
                if step >= self._step:
                    self._came.setdefault((step, micro), {})[source, taker] = rows

    def _obey(self, kind: bytes, frames: list[bytes]) -> None:
        if kind == b"peers":
            self._connect(unpack_json(frames[0]))
        elif kind == b"release":
            self._part.release_memory()
        else:
            step, micro, family = STEP.unpack(frames[0])
            self._go_on_to(step)
            if kind == b"step":
                self._begin(micro, family, frames[1])
            elif kind == b"copy":
                source, destination = np.frombuffer(frames[1], np.int32).reshape(2, -1)
                self._part.executor(family, 0).kv.copy(source, destination)
            elif kind == b"discard":
                self._part.executor(family, 0).discard(np.frombuffer(frames[1], np.int32))

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
            self._outward[index] = address, self._sockets.connect(zmq.PUSH, address)

    def _begin(self, micro: int, family: int, rows: bytes) -> None:
        try:
            self._running[micro] = self._part.executor(family, micro).begin(unpack_rows(rows))
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
            done = {"step": self._step, "micro": micro, "logits": part.logits()}
            self._tell(b"done", done | {"calls": part.num_calls, "rows": part.num_call_rows})

    def _fail(self, micro: int, error: Exception) -> None:
        """Give up the step; the head decides what becomes of it."""
        chain = error.chain if isinstance(error, AdapterUnavailableError) else None
        if chain is None:
            traceback.print_exception(error)
        self._running.clear()
        self._tell(b"error", {"step": self._step, "micro": micro, "chain": chain, "message": str(error)})


def _end_with_head() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _answer_pings(sockets: Sockets, settings: WorkerSettings) -> None:
    """From a thread, which a long call does not hold up."""
    socket = sockets.connect(zmq.DEALER, settings.head, settings.identity + ALIVE)
    while True:
        socket.recv_multipart()
        socket.send_multipart([b"pong", b""])


def main() -> None:
    """Serve until the head ends."""
    settings: WorkerSettings = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_head, daemon=True).start()
    sockets = Sockets(settings.keys)
    threading.Thread(target=_answer_pings, args=(sockets, settings), daemon=True).start()
    try:
        part = Part(settings)
    except SpanError as error:
        head = sockets.connect(zmq.DEALER, settings.head, settings.identity)
        head.linger = -1
        head.send_multipart([b"failed", pack_json(error.problems)])
        threading.Event().wait()  # for the head to end it
    Worker(settings, part, sockets).run()


if __name__ == "__main__":
    main()
