"""What goes through a pair arrives whole, or is not taken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blockzoo.runtime.workers.pairs import MOST_BYTES, Pair


@pytest.fixture
def pair() -> Iterator[tuple[Pair, Pair]]:
    ends = Pair.new()
    yield ends
    for end in ends:
        end.close()


def test_messages_arrive_one_by_one_with_their_parts(pair: tuple[Pair, Pair]) -> None:
    one, other = pair
    sent = [[b"step", b"", bytes(range(256))], [b"done"], [], [memoryview(b"rows")]]
    assert all(one.send(frames) for frames in sent)
    for frames in sent:
        message = other.receive()
        assert message is not None
        assert message.frames == [bytes(frame) for frame in frames]
        assert not message.ends
    with pytest.raises(BlockingIOError):
        other.receive()


def test_what_has_no_room_is_not_taken(pair: tuple[Pair, Pair]) -> None:
    one, other = pair
    assert not one.send([bytes(MOST_BYTES)])
    piece = bytes(MOST_BYTES // 2)
    count = 0
    while one.send([piece]):  # nobody reads
        count += 1
    assert 0 < count < 100
    for _ in range(count):
        message = other.receive()
        assert message is not None
        assert message.frames == [piece]
    assert one.send([piece])


def test_ends_of_other_pairs_go_along(pair: tuple[Pair, Pair]) -> None:
    one, other = pair
    near, far = Pair.new()
    assert one.send([b"peers"], [far])
    far.close()
    message = other.receive()
    assert message is not None
    (come,) = message.ends
    assert near.send([b"rows"])
    rows = come.receive()
    assert rows is not None
    assert rows.frames == [b"rows"]
    come.close()
    assert not near.send([b"rows"])
    assert near.receive() is None
    near.close()
