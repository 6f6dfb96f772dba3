"""A link that takes its time, in the place of a socket: for tests and benchmarks of workers far away."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque

import zmq

_numbers = itertools.count()


def slowed(
    context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], seconds: float
) -> zmq.Socket[bytes]:
    """A socket to be used instead of one that is connected: what goes through it, either way, comes so much
    later. Both last until the process ends."""
    address = f"inproc://slow-{next(_numbers)}"
    far, near = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    for end in (far, near):
        end.sndhwm = end.rcvhwm = 0
    far.bind(address)
    near.connect(address)
    threading.Thread(target=_pass_on, args=(far, socket, seconds), daemon=True).start()
    return near


def _pass_on(far: zmq.Socket[bytes], socket: zmq.Socket[bytes], seconds: float) -> None:
    targets = {far: socket, socket: far}
    poller = zmq.Poller()
    for source in targets:
        poller.register(source, zmq.POLLIN)
    waiting: deque[tuple[float, zmq.Socket[bytes], list[bytes]]] = deque()
    while True:
        timeout = max(0, int(1e3 * (waiting[0][0] - time.monotonic()))) if waiting else None
        for source, _ in poller.poll(timeout):
            waiting.append((time.monotonic() + seconds, targets[source], source.recv_multipart()))
        while waiting and (left := waiting[0][0] - time.monotonic()) < 1e-3:  # less than polling can tell
            time.sleep(max(0.0, left))
            _, target, frames = waiting.popleft()
            target.send_multipart(frames)
