"""The head's side of its workers: starts them, hears from them, knows when one is lost, starts it again.

One is lost when its process ends, or when it answers nothing for a while, which is asked while its work is
waited for. Nothing is tried to save what it held.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import zmq

from blockzoo.runtime.exec.interface import KVLostError
from blockzoo.runtime.exec.topology import Topology
from blockzoo.runtime.workers.logits_memory import LogitsMemory
from blockzoo.runtime.workers.meeting import Host, Meeting
from blockzoo.runtime.workers.pairs import Pair, pairs_among
from blockzoo.runtime.workers.processes import Processes, UnloadableError, WorkerProcess, WorkerStartError
from blockzoo.runtime.workers.settings import Member, WorkerPlan, WorkerSettings
from blockzoo.runtime.workers.sockets import LOOPBACK, Keys, Sockets
from blockzoo.runtime.workers.state import WorkerState
from blockzoo.runtime.workers.wire import ALIVE, LOADER, NUMBER, attach, pack_json, unpack_done, unpack_json

SILENT_S = 5.0
"""Without an answer for so long, a worker is taken for hung."""
_PING_EVERY_S = 0.5
_LOOK_EVERY_S = 0.1


class WorkerGroup:
    """Workers that run. Not thread-safe. They meet when it is made, and serve once they are told what.

    Args:
        processes: starts theirs.
        delays_s: by worker, see `Member`.
        host: address of this machine on which the head listens.

    Attributes:
        facts: of the machines that they are on.
        links: between them.
        plan: what they have now (`go_over`).
        logits: by worker, where the head has its logits, float32.

    Raises:
        WorkerStartError: one ended at once.
    """

    plan: WorkerPlan

    def __init__(self, processes: Processes, delays_s: tuple[float, ...], host: str = LOOPBACK) -> None:
        self.processes: Processes | None = processes  # until it is closed: it may hold what they take
        self._delays_s = delays_s
        self._keys = Keys.new()
        self._sockets = Sockets(self._keys)
        self._socket, self._address = self._sockets.listen(zmq.ROUTER, host)
        self.logits: list[np.ndarray] = []
        self._workers = [WorkerState(index) for index in range(len(delays_s))]
        self._step = 0
        self._close = weakref.finalize(self, _close, self._workers, self._sockets)
        try:
            for worker in self._workers:
                self._launch(worker).tell(Meeting(self._member(worker)))
            identities = [worker.identity for worker in self._workers]
            self.facts, self.links = Host(self._socket, identities, self._check_starts).meet()
        except BaseException:
            self.close()
            raise

    def serve(self, plan: WorkerPlan) -> None:
        """Have them load their parts of a zoo.

        Raises:
            WorkerStartError: one ended.
            UnloadableError: spans could not be loaded.
        """
        self.plan = plan
        try:
            for worker in self._workers:
                worker.memory = LogitsMemory(plan.num_logits)
                self.logits.append(worker.memory.array)
            self.restart()
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of the workers' processes."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    @property
    def num_restarts(self) -> int:
        """Processes that were started in the place of others."""
        return sum(worker.number - 1 for worker in self._workers)

    def close(self) -> None:
        """End all workers."""
        self._close()
        self.processes = None

    def restart(self) -> list[int]:
        """Start those that do not run, and wait until all do; which they were. Raises as at first."""
        started = [worker for worker in self._workers if worker.ended or worker.address is None]
        for worker in started:
            self._start(worker)
        try:
            self._await_ready()
        except BaseException:
            for worker in started:
                worker.kill()
            raise
        self._introduce()
        self.go_over(self.plan.homes)  # some may have heard of others before one was lost
        return [worker.index for worker in started]

    def _introduce(self) -> None:
        """Tell all workers where the others are, with pairs for those that run here; new ones, whatever was
        under way between some of them."""
        here = [w.index for w in self._workers if w.pair is not None and not self._delays_s[w.index]]
        ends = pairs_among(here)
        for worker in self._workers:
            mine = ends.get(worker.index, {})
            told = {"addresses": [each.address for each in self._workers], "pairs": list(mine)}
            self.send(worker.index, b"peers", pack_json(told), ends=list(mine.values()))
            for end in mine.values():
                end.close()

    # ---- spans that move

    def load(self, worker: int, spans: Mapping[int, int]) -> None:
        """Have a worker get spans ready, beside the steps that it runs: by index, the span of now that it is
        or will be a copy of."""
        self._workers[worker].loading = True
        self._workers[worker].unloadable = {}
        self.send(worker, b"load", pack_json(list(spans.items())))

    def has_loaded(self, workers: Iterable[int]) -> bool:
        """Whether all have what they were told to `load`.

        Raises:
            UnloadableError: some cannot.
            KVLostError: some worker has ended.
        """
        for _ in self._messages(0):
            pass
        self.check()
        waited = [self._workers[index] for index in workers]
        problems = {span: why for worker in waited for span, why in worker.unloadable.items()}
        if problems:
            raise UnloadableError(problems)
        return not any(worker.loading for worker in waited)

    def go_over(self, homes: Sequence[int], topology: Topology | None = None) -> None:
        """Between two steps: by span, the worker that has it from now on; and the topology where it has other
        copies of spans from now on."""
        topology = self.plan.topology if topology is None else topology
        self.plan = replace(self.plan, homes=tuple(homes), topology=topology)
        told = pack_json({"homes": homes, "copies": topology.copies})
        for index in range(len(self._workers)):
            self.send(index, b"homes", told)

    def _launch(self, worker: WorkerState) -> WorkerProcess:
        worker.kill()
        worker.number += 1
        worker.waits = True
        assert self.processes is not None, "it is closed"
        worker.num_told = 0
        worker.process = self.processes.start(worker.index)
        self._watch()
        return worker.process

    def _member(self, worker: WorkerState) -> Member:
        return Member(worker.index, worker.identity, self._address, self._keys, self._delays_s)

    def _start(self, worker: WorkerState) -> None:
        process = worker.process
        if process is None or process.ended or not worker.waits:
            process = self._launch(worker)
        worker.waits = False
        worker.problems = {}
        worker.loading = False
        assert worker.memory is not None, "it is made with the plan"
        process.tell(WorkerSettings(self._member(worker), self.plan, worker.memory.shared))

    def _check_starts(self) -> None:
        for worker in self._workers:
            if worker.ended:
                raise WorkerStartError(f"{worker.why} while it loaded its part of the zoo")

    def _await_ready(self) -> None:
        while any(worker.address is None and not worker.problems for worker in self._workers):
            self._check_starts()
            for index, kind, what in self._messages(_LOOK_EVERY_S):
                if kind == "ready":
                    self._workers[index].address = what["address"]
                elif kind == "failed":
                    self._workers[index].problems = {int(span): why for span, why in what.items()}
        problems = {span: why for worker in self._workers for span, why in worker.problems.items()}
        if problems:
            raise UnloadableError(problems)

    # ---- messages

    def next_step(self) -> int:
        """The number of a step, or of what is done before it: workers forget those below."""
        self._step += 1
        return self._step

    def send(self, worker: int, *frames: bytes | memoryview, ends: Sequence[Pair] = ()) -> None:
        """Tell a worker something; `ends` of pairs go along where it runs here."""
        to = self._workers[worker]
        numbered = [NUMBER.pack(to.num_told), *frames]
        to.num_told += 1
        if self._delays_s[worker] or to.pair is None or not to.pair.send(numbered, ends):
            self._socket.send_multipart([to.identity.encode(), *numbered])

    def release_memory(self) -> None:
        """Have all workers give back scratch, and the files that their engines have their own copy of."""
        for index in range(len(self._workers)):
            self.send(index, b"release")

    def answers(self, workers: Iterable[int]) -> Iterator[tuple[int, str, Any]]:
        """What workers say of the step, as it comes: (worker, kind, what), without end.

        Raises KVLostError where one of them cannot answer any more, or any has ended.
        """
        waited = [self._workers[index] for index in workers]
        now = time.monotonic()
        for worker in waited:
            worker.heard = now
        while True:
            yield from self._messages(_LOOK_EVERY_S)
            self.check()
            self._check_heard(waited)

    def check(self) -> None:
        """Raise KVLostError where a worker has ended."""
        lost = [worker for worker in self._workers if worker.ended]
        if lost:
            raise KVLostError(", ".join(worker.why for worker in lost))

    def _check_heard(self, workers: Sequence[WorkerState]) -> None:
        now = time.monotonic()
        for worker in workers:
            if now - worker.heard > SILENT_S:
                worker.kill()
                raise KVLostError(f"worker {worker.index} answered nothing for {SILENT_S:g} s")
            if now - max(worker.heard, worker.asked) > _PING_EVERY_S:
                worker.asked = now
                self._socket.send_multipart([(worker.identity + ALIVE).encode(), b""])

    def _watch(self) -> None:  # where messages may come from now
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._by_descriptor = {w.pair.fileno(): w for w in self._workers if w.pair is not None}
        for descriptor in self._by_descriptor:
            self._poller.register(descriptor, zmq.POLLIN)

    def _messages(self, timeout_s: float) -> Iterator[tuple[int, str, Any]]:
        """What has come from processes that run now; waits for something."""
        timeout = int(timeout_s * 1000)
        while events := dict(self._poller.poll(timeout)):
            timeout = 0
            for descriptor in events.keys() & self._by_descriptor.keys():
                worker = self._by_descriptor[descriptor]
                if worker.pair is not None and (message := worker.pair.receive()) is not None:
                    yield from self._heard(worker, message.frames)
                else:  # it has ended
                    self._poller.unregister(descriptor)
                    del self._by_descriptor[descriptor]
            if self._socket in events:
                identity, *frames = self._socket.recv_multipart()
                name = identity.decode().removesuffix(ALIVE).removesuffix(LOADER)
                for worker in self._workers:
                    if worker.identity == name:  # of no process that is no more
                        yield from self._heard(worker, frames)

    def _heard(self, worker: WorkerState, frames: Sequence[bytes]) -> Iterator[tuple[int, str, Any]]:
        kind, what, *more = frames
        worker.heard = time.monotonic()
        if kind == b"loaded":
            worker.loading = False
            problems = unpack_json(what)["problems"]
            worker.unloadable = {int(span): why for span, why in problems.items()}
        elif kind != b"pong":
            said = unpack_done(what, more.pop(0)) if kind == b"done" else unpack_json(what)
            for data, (begin, *_) in zip(attach(said, more), said.get("logits", ()), strict=False):
                logits = np.frombuffer(data, np.float32)  # to where a worker of this machine has them
                self.logits[worker.index][begin : begin + len(logits)] = logits
            yield worker.index, kind.decode(), said


def _close(workers: list[WorkerState], sockets: Sockets) -> None:
    for worker in workers:
        worker.kill()
        if worker.memory is not None:
            worker.memory.close()
    workers.clear()
    sockets.close()
