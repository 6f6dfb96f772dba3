"""Pairs of sockets between processes of one machine: short messages take a tenth of the time of ZeroMQ's.

No thread stands between, and nothing is encrypted: an end has no name, and only who was handed it has it. A
message that does not fit into the kernel's memory at once is not taken, and goes the other way: nobody waits
for one who does not read.
"""

from __future__ import annotations

import socket
import struct
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

Frame = bytes | memoryview
"""A part of a message."""
MOST_BYTES = 192 << 10
"""Of a message: below what Linux keeps for a socket."""
_MOST_ENDS = 128  # that come with a message
_COUNT = struct.Struct("<i")  # of frames, before their lengths
_FD = array("i").itemsize
_SPACE = socket.CMSG_SPACE(_MOST_ENDS * _FD)


class Message(NamedTuple):
    """What has come: its parts, and ends of other pairs that came along."""

    frames: list[bytes]
    ends: list[Pair]


class Pair:
    """One end. Ends close with the last reference to them."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)  # Linux doubles it, for its own needs
        self._buffer = bytearray(MOST_BYTES)
        self._view = memoryview(self._buffer)

    @classmethod
    def new(cls) -> tuple[Pair, Pair]:
        """Two ends."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    @classmethod
    def inherited(cls, descriptor: int) -> Pair:
        """The end that a process was started with."""
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """Its descriptor, to wait for messages."""
        return self._socket.fileno()

    def send(self, frames: Sequence[Frame], ends: Sequence[Pair] = ()) -> bool:
        """Send a message, with ends of other pairs; whether there was room, and anybody to read it."""
        lengths = [memoryview(frame).nbytes for frame in frames]
        head = struct.pack(f"<{1 + len(lengths)}i", len(lengths), *lengths)
        if len(head) + sum(lengths) > MOST_BYTES:
            return False
        rights = array("i", [end.fileno() for end in ends])
        along = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if ends else []
        try:
            self._socket.sendmsg([head, *frames], along, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:  # it is full, or nobody has the other end any more
            return False
        return True

    def receive(self) -> Message | None:
        """What has come; None: nobody has the other end any more. Raises BlockingIOError: nothing has."""
        try:
            size, along, _, _ = self._socket.recvmsg_into([self._buffer], _SPACE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise
        except OSError:  # also where this end has been closed
            return None
        if not size:
            return None
        (count,) = _COUNT.unpack_from(self._buffer)
        lengths = struct.unpack_from(f"<{count}i", self._buffer, _COUNT.size)
        frames, begin = [], _COUNT.size * (1 + count)
        for length in lengths:
            frames.append(bytes(self._view[begin : begin + length]))
            begin += length
        if not along:
            return Message(frames, [])
        rights = array("i")
        for _, _, data in along:
            rights.frombytes(data[: len(data) - len(data) % _FD])
        return Message(frames, [Pair.inherited(descriptor) for descriptor in rights])

    def close(self) -> None:
        """Let go of this end."""
        self._socket.close()


def pairs_among(members: Iterable[int]) -> dict[int, dict[int, Pair]]:
    """For each member, its end of a pair with each other one."""
    ends: dict[int, dict[int, Pair]] = defaultdict(dict)
    for one, other in combinations(members, 2):
        ends[one][other], ends[other][one] = Pair.new()
    return ends
