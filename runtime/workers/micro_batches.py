"""A step cut into micro-batches, so that a worker runs one while the next works on another.

Each is a run of the step's rows; a long prompt is cut within, where none of its rows gives logits. A worker
runs the calls of a span in the order of the micro-batches, so that of one sequence the first piece's K and V
are there before the second reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from blockzoo.runtime.exec.rows import Rows


class MicroBatch(NamedTuple):
    """Rows, and whose they are, by index into the step's batch."""

    rows: list[Rows]
    members: list[int]


def micro_batches(batch: Sequence[Rows], least: int, most: int) -> list[MicroBatch]:
    """Cut a batch into at most `most` pieces of about equal size, of `least` rows or more each."""
    total = sum(len(rows.token_ids) for rows in batch)
    count = min(most, total // least)
    if count < 2:
        return [MicroBatch(list(batch), list(range(len(batch))))]
    size = -(-total // count)
    made: list[MicroBatch] = []
    room = 0
    for member, rows in enumerate(batch):
        left: Rows | None = rows
        while left is not None:
            if room <= 0:
                made.append(MicroBatch([], []))
                room = size if len(made) < most else total
            piece, left = _cut(left, room)
            made[-1].rows.append(piece)
            made[-1].members.append(member)
            room -= len(piece.token_ids)
    return made


def _cut(rows: Rows, room: int) -> tuple[Rows, Rows | None]:
    """The first `room` rows, and the rest; all, where it would part those with logits."""
    if len(rows.token_ids) - rows.num_logits <= room:
        return rows, None
    rest = len(rows.token_ids) - room
    first = rows._replace(
        token_ids=rows.token_ids[:room],
        num_logits=0,
        hidden=None if rows.hidden is None else rows.hidden[:room],
        score_window=max(0, rows.score_window - rest),
    )
    return first, rows._replace(
        token_ids=rows.token_ids[room:],
        past_len=rows.past_len + room,
        hidden=None if rows.hidden is None else rows.hidden[room:],
        score_window=min(rows.score_window, rest),
    )
