"""ZeroMQ sockets of a group: encrypted, and closed to whoever does not hold the group's keys (CURVE).

All members have one pair of keys, which the head makes when it starts and hands to its workers by a pipe. Who
listens lets in only those who show that they hold it; what a stranger sends reaches nobody.
"""

from __future__ import annotations

from socket import AF_INET, SOCK_DGRAM
from socket import socket as system_socket
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

from blockzoo.runtime.workers.slow_link import slowed

_DOMAIN = "blockzoo"
LOOPBACK = "127.0.0.1"


class Keys(NamedTuple):
    """A CURVE key pair, in Z85."""

    public: bytes
    secret: bytes

    @classmethod
    def new(cls) -> Keys:
        """A pair that nobody else has."""
        return cls(*zmq.curve_keypair())

    def __repr__(self) -> str:
        return "Keys(...)"  # no log shows them


def own_address(head: str) -> str:
    """This machine's IPv4 address on the way to a head's: of the interface that leads there."""
    host, port = head.removeprefix("tcp://").rsplit(":", 1)
    with system_socket(AF_INET, SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # nothing is sent
        return str(probe.getsockname()[0])


class Sockets:
    """Makes the sockets of one process of a group."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._context = zmq.Context(1)
        self._gate = ThreadAuthenticator(self._context)
        self._gate.start()
        self._gate.configure_curve_callback(domain=_DOMAIN, credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether who has shown to hold the secret key of `key` belongs to the group."""
        return key == self._keys.public

    def listen(self, kind: int, host: str = LOOPBACK) -> tuple[zmq.Socket[bytes], str]:
        """A socket that others of the group connect to, and its address."""
        socket = self._socket(kind)
        socket.curve_server = True
        socket.zap_domain = _DOMAIN.encode()
        port = socket.bind_to_random_port(f"tcp://{host}")
        return socket, f"tcp://{host}:{port}"

    def connect(self, kind: int, address: str, identity: str = "", delay_s: float = 0.0) -> zmq.Socket[bytes]:
        """A socket that is connected to one that listens; `delay_s`: what goes through it comes so much
        later."""
        socket = self._socket(kind)
        socket.curve_serverkey = self._keys.public
        if identity:
            socket.identity = identity.encode()
        socket.connect(address)
        return slowed(self._context, socket, delay_s) if delay_s else socket

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.curve_publickey, socket.curve_secretkey = self._keys
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0  # what is under way is bounded by a step
        return socket

    def close(self) -> None:
        """Close all sockets."""
        self._gate.stop()
        self._context.destroy(linger=0)
