"""What head and workers tell each other: a kind, then JSON or arrays. Nothing of it is executed. What the
head tells a worker comes by two ways (`pairs`), so it is numbered.

head -> worker   step     (step, micro-batch, family), rows as integers, hidden states that enter late
                 copy, borrow, values, read, write   of pages, as `kv_orders` has them
                 discard  (step, 0, family), pages int32 [n]
                 load     spans that it is to have ready, beside the steps, and what each is or will be a
                          copy of
                 expect   (step, 0, family): pages will come; answered by `took`, none yet
                 give     (step, worker that takes them, family), pages int32 [n]
                 homes    by span, the worker that has it from now on; the copies of spans
                 peers    the workers' addresses; which of them an end of a pair comes for, and these ends
                 release
                 ping
worker -> head   ready, failed   once, when it has loaded
                 loaded          what is wrong with some of the spans
                 done            (step, micro-batch, 0), what was done, as JSON; with attention received,
                                 hidden states that are kept, and logits, where the head is elsewhere
                 error           of a micro-batch
                 kv              what was asked of pages
                 took            how many pages have come
                 pong
worker -> worker rows     (step, micro-batch, source call, destination call), hidden states
                 pages    (step, PAGES, family, 0), pages int32 [n], their K, their V
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from blockzoo.runtime.exec.rows import Rows

NUMBER = struct.Struct("<q")  # of what the head has told a worker
STEP = struct.Struct("<qii")  # step, micro-batch, family
PASSED = struct.Struct("<qiii")  # step, micro-batch, call that made the rows, call that takes them

PAGES = -1
"""In the place of a micro-batch: what comes is K and V."""
ALIVE = ".alive"
"""Behind a worker's identity, its thread that answers pings."""
LOADER = ".loader"
"""Behind a worker's identity, its thread that makes more spans ready."""
_FIELDS = 10  # of each member: tokens, layers, pages, and seven of `Rows`
_NO_EXIT = -1


def pack_rows(batch: Sequence[Rows]) -> bytes:
    """A batch as int32: how many, their fields, their token ids, the pages of their tables."""
    tables = [rows.used_pages() for rows in batch]
    fields = [
        (
            *(len(rows.token_ids), *table.shape),
            *(rows.chain, rows.past_len, rows.num_logits, rows.entry),
            _NO_EXIT if rows.exit is None else rows.exit,
            *(rows.keeps_hidden, rows.score_window),
        )
        for rows, table in zip(batch, tables, strict=True)
    ]
    parts = [
        np.array([len(batch)], np.int32),
        np.array(fields, np.int32).ravel(),
        *(rows.token_ids for rows in batch),
        *(table.ravel() for table in tables),
    ]
    return np.concatenate(parts).astype(np.int32, copy=False).tobytes()


def unpack_rows(data: bytes) -> list[Rows]:
    """The batch of `pack_rows`, over its memory, without hidden states. Raises ValueError where it is cut
    short."""
    ints = np.frombuffer(data, np.int32)
    count = int(ints[0])
    ids = 1 + _FIELDS * count
    fields = ints[1:ids].tolist()
    members = [fields[begin : begin + _FIELDS] for begin in range(0, len(fields), _FIELDS)]
    tables = ids + sum(fields[::_FIELDS])
    expected = tables + sum(layers * columns for _, layers, columns, *_ in members)
    if len(members) != count or expected != ints.size:
        raise ValueError(f"{ints.size} integers of a step; {expected} expected")
    batch = []
    for member in members:  # few operations of numpy: their code is cold, as a step has read all weights
        num_tokens, layers, columns, *_ = member
        pages = ints[tables : tables + layers * columns]
        batch.append(_rows(member, ints[ids : ids + num_tokens], pages))
        ids, tables = ids + num_tokens, tables + layers * columns
    return batch


def _rows(fields: list[int], token_ids: np.ndarray, pages: np.ndarray) -> Rows:
    _, layers, columns, chain, past_len, num_logits, entry, leaves, keeps_hidden, window = fields
    return Rows(
        chain,
        token_ids,
        past_len,
        pages.reshape(layers, columns),
        num_logits,
        entry,
        keeps_hidden=bool(keeps_hidden),
        exit=None if leaves == _NO_EXIT else leaves,
        score_window=window,
    )


def pack_hidden(batch: Sequence[Rows], takes: Callable[[Rows], bool]) -> list[bytes | memoryview]:
    """The hidden states of each member that enters late, for the worker that `takes` it; empty for others."""
    return [np.ascontiguousarray(rows.hidden).data if takes(rows) else b"" for rows in batch if rows.entry]


def with_hidden(batch: Sequence[Rows], frames: Sequence[bytes], dtype: np.dtype) -> list[Rows]:
    """A batch with the hidden states that have come, as `pack_hidden` sent them."""
    come = iter(frames)
    whole = []
    for rows in batch:
        data = next(come) if rows.entry else b""
        if data:
            rows = rows._replace(hidden=np.frombuffer(data, dtype).reshape(len(rows.token_ids), -1))
        whole.append(rows)
    return whole


def attach(said: dict[str, Any], frames: list[bytes]) -> list[bytes]:
    """Put as many frames as a message says in the place of their number; those that are left:
    logits, where the head is on another machine."""
    count = said.get("frames", 0)
    if count:
        said["frames"] = frames[:count]
    return frames[count:]


def unpack_done(which: bytes, said: bytes) -> dict[str, Any]:
    """What a worker says of a micro-batch that it has done: which, and what, as it says in most steps."""
    step, micro, _ = STEP.unpack(which)
    return {**_known(said), "step": step, "micro": micro}


@lru_cache(256)
def _known(said: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said)
    return found


def pack_json(value: Any) -> bytes:
    """Anything JSON."""
    return json.dumps(value).encode()


def unpack_json(data: bytes) -> Any:
    """What `pack_json` was given."""
    return json.loads(data)
