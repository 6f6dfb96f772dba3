"""What head and workers tell each other: a kind, then JSON or arrays. Nothing of it is executed. What the
head tells a worker comes by two ways (`pairs`), so it is numbered.

head -> worker   step     (step, micro-batch, family), rows as integers
                 copy     (step, 0, family), pages int32 [2, n]: from, to
                 discard  (step, 0, family), pages int32 [n]
                 load     spans that it is to have ready, beside the steps
                 expect   (step, 0, family): pages will come; answered by `took`, none yet
                 give     (step, worker that takes them, family), pages int32 [n]
                 homes    by span, the worker that has it from now on
                 peers    the workers' addresses; which of them an end of a pair comes for, and these ends
                 release
                 ping
worker -> head   ready, failed   once, when it has loaded
                 loaded          spans, and what is wrong with some
                 done, error     of each micro-batch; with logits, where the head is on another machine
                 took            how many pages have come
                 pong
worker -> worker rows     (step, micro-batch, source call, destination call), hidden states
                 pages    (step, PAGES, family, 0), pages int32 [n], their K, their V
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from itertools import pairwise
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
_FIELDS = 6  # of each member: chain, tokens, past_len, num_logits, layers, pages


def pack_rows(batch: Sequence[Rows]) -> bytes:
    """A batch as int32: how many, their fields, their token ids, the pages of their tables."""
    tables = [rows.used_pages() for rows in batch]
    fields = [
        (rows.chain, len(rows.token_ids), rows.past_len, rows.num_logits, *table.shape)
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
    """The batch of `pack_rows`, over its memory. Raises ValueError where it is cut short."""
    ints = np.frombuffer(data, np.int32)
    count = int(ints[0])
    fields = ints[1 : 1 + _FIELDS * count].reshape(count, _FIELDS)
    sizes = np.concatenate([fields[:, 1], fields[:, 4] * fields[:, 5]])
    ends = 1 + _FIELDS * count + np.cumsum(sizes)
    if int(ends[-1]) != ints.size:
        raise ValueError(f"{ints.size} integers of a step; {ends[-1]} expected")
    bounds = [1 + _FIELDS * count, *ends.tolist()]
    pieces = [ints[begin:end] for begin, end in pairwise(bounds)]
    return [
        Rows(chain, tokens, past, table.reshape(layers, pages), num_logits)
        for (chain, _, past, num_logits, layers, pages), tokens, table in zip(
            fields.tolist(), pieces[:count], pieces[count:], strict=True
        )
    ]


def pack_json(value: Any) -> bytes:
    """Anything JSON."""
    return json.dumps(value).encode()


def unpack_json(data: bytes) -> Any:
    """What `pack_json` was given."""
    return json.loads(data)
