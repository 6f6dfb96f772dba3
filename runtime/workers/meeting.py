"""Before blocks are placed: what the machines of workers have, and what the links between them cost.

Links are measured with messages over sockets of the kind that rows will take: the same interface, encryption
and delays.

    head -> worker     peers    addresses of all
                       measure  another worker
                       echo     to be sent back
                       over     the meeting
    worker -> head     here, measured, echo
    worker -> worker   (who asks, whether it is asked to answer), bytes
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import zmq

from blockzoo.runtime.workers.logits_memory import boot_id
from blockzoo.runtime.workers.settings import Member
from blockzoo.runtime.workers.sockets import Sockets, own_address
from blockzoo.runtime.workers.wire import pack_json, unpack_json
from blockzoo.zoo.available_memory import available_memory

MEETS = ".meets"
"""Behind a worker's identity, while it meets the others."""
_ASKED = struct.Struct("<i?")
_SMALL_TIMES, _LARGE_TIMES, _LARGE = 20, 3, 1 << 20  # messages that are timed, and bytes of large ones


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What a worker found where it runs.

    Attributes:
        machine: its boot id: the same for all workers of a machine.
        memory: bytes that are available, to all of them together.
        cores: that its process may use; those of others there may be the same.
    """

    machine: str
    memory: int
    cores: int

    @classmethod
    def here(cls) -> MachineFacts:
        """Of this process."""
        return cls(boot_id(), available_memory(), len(os.sched_getaffinity(0)))


class Links(NamedTuple):
    """Seconds on the way.

    Attributes:
        hop_s: [from][to] of a small message; 0 from a worker to itself.
        byte_s: [from][to] of each byte more.
        head_s: by worker, of a small message from the head.
    """

    hop_s: list[list[float]]
    byte_s: list[list[float]]
    head_s: list[float]


@dataclass(frozen=True, slots=True)
class Meeting:
    """What a worker is told first."""

    member: Member


# ---- workers


class Guest:
    """A worker's part of the meeting."""

    def __init__(self, sockets: Sockets, member: Member) -> None:
        self._sockets, self._member = sockets, member
        self._head = sockets.connect(zmq.DEALER, member.head, member.identity + MEETS, member.to_head_s)
        self._inward, self._address = sockets.listen(zmq.PULL, own_address(member.head))
        self._outward: dict[int, zmq.Socket[bytes]] = {}

    def take_part(self) -> None:
        """Until the head says that it is over."""
        here = {"address": self._address, "facts": asdict(MachineFacts.here())}
        self._head.send_multipart([b"here", pack_json(here)])
        for index, address in enumerate(unpack_json(self._head.recv_multipart()[1])):
            delay_s = self._member.to_worker_s(index)
            self._outward[index] = self._sockets.connect(zmq.PUSH, address, delay_s=delay_s)
        poller = zmq.Poller()
        for socket in (self._head, self._inward):
            poller.register(socket, zmq.POLLIN)
        is_over = False
        while not is_over:
            events = dict(poller.poll())
            if self._inward in events:
                self._answer()
            if self._head in events:
                kind, what = self._head.recv_multipart()
                is_over = kind == b"over"
                self._obey(kind, what)
        for each in (self._head, self._inward, *self._outward.values()):
            each.close(0)

    def _obey(self, kind: bytes, what: bytes) -> None:
        if kind == b"echo":
            self._head.send_multipart([b"echo", what])
        elif kind == b"measure":
            small, byte = self._measure(unpack_json(what))
            self._head.send_multipart([b"measured", pack_json([small, byte])])

    def _measure(self, peer: int) -> tuple[float, float]:
        """Seconds of a small message to another worker, and of a byte more."""
        for _ in range(2):  # connects, and begins to encrypt
            self._round_trip(peer, 1)
        small = min(self._round_trip(peer, 1) for _ in range(_SMALL_TIMES))
        large = min(self._round_trip(peer, _LARGE) for _ in range(_LARGE_TIMES))
        return small / 2, max(0.0, large - small) / _LARGE

    def _round_trip(self, peer: int, size: int) -> float:
        data = bytes(size)
        start = time.perf_counter()
        self._outward[peer].send_multipart([_ASKED.pack(self._member.index, True), data])
        while not self._answer():
            pass
        return time.perf_counter() - start

    def _answer(self) -> bool:
        """Take a message, and answer it where that is asked; whether it was an answer."""
        which, _ = self._inward.recv_multipart()
        who, asks = _ASKED.unpack(which)
        if asks:
            self._outward[who].send_multipart([_ASKED.pack(self._member.index, False), b""])
        return not asks


# ---- the head


class Host:
    """The head's part.

    Args:
        socket: of the head.
        identities: of the workers.
        check: raises where a worker is lost.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], identities: Sequence[str], check: Callable[[], None]
    ) -> None:
        self._socket, self._check = socket, check
        self._identities = [(identity + MEETS).encode() for identity in identities]

    def meet(self) -> tuple[list[MachineFacts], Links]:
        """All about the workers. Raises what `check` does."""
        count = len(self._identities)
        here = self._await(b"here", range(count))
        facts = [MachineFacts(**here[index]["facts"]) for index in range(count)]
        for index in range(count):
            self._send(index, b"peers", [here[each]["address"] for each in range(count)])
        hop_s, byte_s = ([[0.0] * count for _ in range(count)] for _ in range(2))
        for pairs in _rounds(count):
            for first, second in pairs:
                self._send(first, b"measure", second)
            measured = self._await(b"measured", [first for first, _ in pairs])
            for a, b in pairs:
                hop_s[a][b], byte_s[a][b] = hop_s[b][a], byte_s[b][a] = measured[a]
        head_s = [min(self._echo(index) for _ in range(_SMALL_TIMES)) / 2 for index in range(count)]
        for index in range(count):
            self._send(index, b"over", None)
        return facts, Links(hop_s, byte_s, head_s)

    def _send(self, index: int, kind: bytes, what: Any) -> None:
        self._socket.send_multipart([self._identities[index], kind, pack_json(what)])

    def _echo(self, index: int) -> float:
        start = time.perf_counter()
        self._send(index, b"echo", None)
        self._await(b"echo", [index])
        return time.perf_counter() - start

    def _await(self, kind: bytes, workers: Sequence[int]) -> dict[int, Any]:
        """What each of some workers says. Raises what `check` does."""
        found: dict[int, Any] = {}
        while len(found) < len(workers):
            if not self._socket.poll(100):
                self._check()
                continue
            identity, said, what = self._socket.recv_multipart()
            if said == kind and identity in self._identities:
                found[self._identities.index(identity)] = unpack_json(what)
        return found


def _rounds(count: int) -> list[list[tuple[int, int]]]:
    """All pairs, in rounds in each of which nobody is in two (the circle method)."""
    players = list(range(count + count % 2))
    found = []
    for _ in players[1:]:
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < count])
        players[1:] = [players[-1], *players[1:-1]]
    return found
