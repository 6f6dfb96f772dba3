"""Who does not hold a group's keys reaches nobody in it."""

from __future__ import annotations

from contextlib import suppress

import pytest
import zmq

from blockzoo.runtime.workers.sockets import Keys, Sockets


@pytest.mark.parametrize("stranger", ["without keys", "with other keys", "who knows the public key"])
def test_strangers_are_not_heard(stranger: str) -> None:
    keys, theirs = Keys.new(), Keys.new()
    ours = Sockets(keys)
    listening, address = ours.listen(zmq.ROUTER)
    other = zmq.Context.instance().socket(zmq.DEALER)
    other.linger = 0
    if stranger != "without keys":
        other.curve_publickey, other.curve_secretkey = theirs
        other.curve_serverkey = keys.public if "public" in stranger else theirs.public
    other.connect(address)
    with suppress(zmq.Again):  # it has been turned away already
        other.send_multipart([b"ready", b"{}"], zmq.NOBLOCK)
    friend = ours.connect(zmq.DEALER, address, "friend")
    friend.send_multipart([b"hello", b"{}"])
    try:
        assert listening.recv_multipart() == [b"friend", b"hello", b"{}"]
        assert not listening.poll(300), "a stranger was heard"
    finally:
        other.close(0)
        ours.close()


def test_keys_are_not_shown() -> None:
    keys = Keys.new()
    assert keys.secret.decode() not in f"{keys} {keys!r}"
