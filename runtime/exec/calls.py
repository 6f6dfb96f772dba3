"""Calls of engines, and which of a step's may run at the same time.

What must wait for what follows from memory alone: a call that writes bytes which another reads or writes is
ordered against it, as are two calls of one engine. So nothing has to be kept in step with how calls are made.

The K and V of a layer and sequence are touched by one call of a step, so pages of the pool order nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from blockzoo.engines.arrays import Array, byte_range

FEW_ROWS = 4
"""Up to so many rows cost as much as one: such calls may run beside others (`parallel_calls`)."""

_OUTPUTS = ("hidden_out", "logits")  # of what is bound to an engine; it only reads the rest


class Passed(NamedTuple):
    """Hidden states after a call that somebody keeps: rows of sequence `seq` that enter span use `entry`."""

    seq: int
    entry: int
    rows: Array


class Fed(NamedTuple):
    """Rows that enter a call as an earlier one, number `call` of the step, has left them."""

    call: int
    rows: Array


@dataclass(slots=True, eq=False)
class Call:
    """One engine run. Before it, `copies_in` fill its private arrays; after it, `copies_out`."""

    span: int
    first_layer: int
    num_rows: int
    binds: dict[str, Array]
    position: int = 0  # of the span's first block in the chains
    parts: tuple[tuple[int, int], ...] = ()  # (chain, number of rows) of each group, in the rows' order
    scored: tuple[int, ...] = ()  # the sequences that its engine gives scores of, in their order
    copies_in: list[tuple[Array, Array]] = field(default_factory=list)  # (destination, source)
    copies_out: list[tuple[Array, Array]] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)
    fed: list[Fed] = field(default_factory=list)

    @property
    def is_small(self) -> bool:
        """Whether it is worth running beside others: what it copies would keep the caller busy too."""
        return self.num_rows <= FEW_ROWS and not self.copies_in and not self.copies_out

    def written(self) -> list[Array]:
        """The arrays that it writes, but for the pool's pages."""
        outputs = [array for name, array in self.binds.items() if name in _OUTPUTS]
        return outputs + [destination for destination, _ in (*self.copies_in, *self.copies_out)]

    def read(self) -> list[Array]:
        """The arrays that it reads, but for the pool's pages."""
        inputs = [array for name, array in self.binds.items() if name not in _OUTPUTS]
        copied = [source for _, source in (*self.copies_in, *self.copies_out)]
        return [*inputs, *copied, *(passed.rows for passed in self.passed)]


class CallGraph:
    """The calls of a step and what each must wait for.

    Args:
        calls: in an order in which they could run one after the other.
        weights: by span, how long it takes, in any unit.

    Attributes:
        small, large: indices of the calls that may, and may not, run beside others.
    """

    def __init__(self, calls: Sequence[Call], weights: Sequence[int]) -> None:
        self.calls = list(calls)
        longest_first = sorted(range(len(calls)), key=lambda i: -weights[calls[i].span])
        self.small = [i for i in longest_first if calls[i].is_small]
        self.large = [i for i, call in enumerate(calls) if not call.is_small]

    @cached_property
    def waits_for(self) -> list[set[int]]:
        """Per call, the earlier ones that it must follow."""
        return _conflicts(self.calls)

    @cached_property
    def is_chain(self) -> bool:
        """Whether no two calls may run at the same time."""
        return all(i - 1 in self.waits_for[i] for i in range(1, len(self.calls)))


def _conflicts(calls: Sequence[Call]) -> list[set[int]]:
    """Per call, the earlier ones of its engine and those with which it shares bytes that either writes."""
    spans = np.array([call.span for call in calls])
    together = spans[:, None] == spans[None, :]
    writer, written = _ranges((i, call.written()) for i, call in enumerate(calls))
    reader, read = _ranges((i, call.read()) for i, call in enumerate(calls))
    for user, used in ((writer, written), (reader, read)):
        overlap = (written[:, None, 0] < used[None, :, 1]) & (used[None, :, 0] < written[:, None, 1])
        one, other = np.nonzero(overlap)
        together[writer[one], user[other]] = together[user[other], writer[one]] = True
    return [set(np.flatnonzero(together[i, :i]).tolist()) for i in range(len(calls))]


def _ranges(used: Iterable[tuple[int, list[Array]]]) -> tuple[np.ndarray, np.ndarray]:
    """Whose, int [n], and the bytes [begin, end) of each array that is not empty, int [n, 2]."""
    found = {(i, *byte_range(array)) for i, arrays in used for array in arrays}
    table = np.array(sorted(r for r in found if r[1] < r[2]), np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1:]
