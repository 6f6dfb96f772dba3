"""The head's side of its workers: starts them, hears from them, knows when one is lost, starts it again.

One is lost when its process ends, or when it answers nothing for a while, which is asked while its work is
waited for. Nothing is tried to save what it held.
"""

from __future__ import annotations

import mmap
import os
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq

from blockzoo.runtime.exec.interface import KVLostError
from blockzoo.runtime.workers.settings import WorkerPlan, WorkerSettings
from blockzoo.runtime.workers.sockets import Keys, Sockets
from blockzoo.runtime.workers.wire import ALIVE, pack_json, unpack_json

SILENT_S = 5.0
"""Without an answer for so long, a worker is taken for hung."""
_PING_EVERY_S = 0.5
_LOOK_EVERY_S = 0.1
_MODULE = "blockzoo.runtime.workers.worker"


class WorkerStartError(RuntimeError):
    """A worker did not start."""


class UnloadableError(Exception):
    """Workers could not have some spans; why, by index."""

    def __init__(self, problems: dict[int, str]) -> None:
        super().__init__(str(problems))
        self.problems = problems


@dataclass(slots=True)
class _Worker:
    """A worker's process, which others follow as it fails."""

    index: int
    memory: int  # file descriptor
    number: int = 0  # of its processes so far
    process: subprocess.Popen[bytes] | None = None
    address: str | None = None  # for the other workers; None: it does not serve
    problems: dict[int, str] = field(default_factory=dict)  # with its spans
    heard: float = 0.0
    asked: float = 0.0

    @property
    def identity(self) -> str:
        """Of the process that runs now."""
        return f"{self.index}.{self.number}"

    @property
    def ended(self) -> bool:
        """Whether there is no process."""
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdin is not None:
                with suppress(OSError):
                    self.process.stdin.close()
        self.process = self.address = None


class WorkerGroup:
    """Workers that run. Not thread-safe.

    Args:
        plan: what they have.
        delays_s: by worker, see `WorkerSettings`.

    Attributes:
        logits: by worker, the memory that it shares with the head, float32.

    Raises:
        WorkerStartError: one ended at once.
        UnloadableError: spans could not be loaded.
    """

    def __init__(self, plan: WorkerPlan, delays_s: tuple[float, ...]) -> None:
        self.plan = plan
        self._delays_s = delays_s
        self._keys = Keys.new()
        self._sockets = Sockets(self._keys)
        self._socket, self._address = self._sockets.listen(zmq.ROUTER)
        self.logits: list[np.ndarray] = []
        self._workers: list[_Worker] = []
        self._step = 0
        self._close = weakref.finalize(self, _close, self._workers, self._sockets)
        try:
            for index in range(len(delays_s)):
                descriptor, memory = _shared_memory(4 * plan.num_logits)
                self.logits.append(memory)
                self._workers.append(_Worker(index, descriptor))
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
        addresses = pack_json([worker.address for worker in self._workers])
        for index in range(len(self._workers)):
            self.send(index, b"peers", addresses)
        return [worker.index for worker in started]

    def _start(self, worker: _Worker) -> None:
        worker.kill()
        worker.number += 1
        worker.problems = {}
        settings = WorkerSettings(
            self.plan,
            worker.index,
            worker.identity,
            self._address,
            self._keys,
            worker.memory,
            self._delays_s,
        )
        worker.process = subprocess.Popen(
            [sys.executable, "-m", _MODULE], stdin=subprocess.PIPE, pass_fds=(worker.memory,)
        )
        assert worker.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; that is seen where it is waited for
            pickle.dump(settings, worker.process.stdin)
            worker.process.stdin.flush()

    def _await_ready(self) -> None:
        while any(worker.address is None and not worker.problems for worker in self._workers):
            for worker in self._workers:
                if worker.ended:
                    code = worker.process.returncode if worker.process is not None else "?"
                    raise WorkerStartError(
                        f"worker {worker.index} ended with {code} while it loaded its part of the zoo; "
                        "what it said before is above"
                    )
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

    def send(self, worker: int, *frames: bytes) -> None:
        """Tell a worker something."""
        self._socket.send_multipart([self._workers[worker].identity.encode(), *frames])

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
            codes = [None if worker.process is None else worker.process.returncode for worker in lost]
            raise KVLostError(f"workers {[worker.index for worker in lost]} have ended, with {codes}")

    def _check_heard(self, workers: Sequence[_Worker]) -> None:
        now = time.monotonic()
        for worker in workers:
            if now - worker.heard > SILENT_S:
                worker.kill()
                raise KVLostError(f"worker {worker.index} answered nothing for {SILENT_S:g} s")
            if now - max(worker.heard, worker.asked) > _PING_EVERY_S:
                worker.asked = now
                self._socket.send_multipart([(worker.identity + ALIVE).encode(), b""])

    def _messages(self, timeout_s: float) -> Iterator[tuple[int, str, Any]]:
        """What has come from processes that run now; waits for something."""
        timeout = int(timeout_s * 1000)
        known = {worker.identity: worker for worker in self._workers}
        while self._socket.poll(timeout):
            timeout = 0
            identity, kind, what = self._socket.recv_multipart()
            worker = known.get(identity.decode().removesuffix(ALIVE))
            if worker is None:  # of a process that is no more
                continue
            worker.heard = time.monotonic()
            if kind != b"pong":
                yield worker.index, kind.decode(), unpack_json(what)


def _shared_memory(size: int) -> tuple[int, np.ndarray]:
    """A descriptor for workers, and the memory; it takes none before it is written, and leaves no file."""
    descriptor = os.memfd_create("blockzoo-logits")
    os.ftruncate(descriptor, size)
    return descriptor, np.frombuffer(mmap.mmap(descriptor, size), np.float32)


def _close(workers: list[_Worker], sockets: Sockets) -> None:
    for worker in workers:
        worker.kill()
        os.close(worker.memory)
    workers.clear()
    sockets.close()
