"""A worker's part of a step: the calls of its spans, between rows that come from and go to other workers.

Every worker lays out the whole step from its shapes, as all others do; so a call's number, and the place of
the rows that enter it, mean the same everywhere, and only the rows themselves are sent.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from blockzoo.engines.base import Embedding, Engine
from blockzoo.runtime.exec.adapters import AdapterInputs
from blockzoo.runtime.exec.batch import StepLayout, batch_order
from blockzoo.runtime.exec.calls import Call
from blockzoo.runtime.exec.executor import Executor, Hidden
from blockzoo.runtime.exec.rows import Rows
from blockzoo.runtime.exec.step_arrays import make_buffers
from blockzoo.runtime.exec.topology import ChainPlan, Family, Span
from blockzoo.runtime.workers.wire import pack_json

Inbox = dict[tuple[int, int], list[bytes]]
"""Rows that have come, by the call that made them and the call that takes them."""


class Passing(NamedTuple):
    """Rows for another worker: by which call they were made, and which one takes them."""

    worker: int
    source: int
    taker: int
    rows: list[np.ndarray]


class Logits(NamedTuple):
    """Where logits lie in the memory for them, in elements, and whose they are, by index into the batch."""

    begin: int
    vocab: int
    members: list[int]

    @property
    def end(self) -> int:
        """Where they end."""
        return self.begin + self.vocab * len(self.members)


class PartExecutor(Executor):
    """Runs the calls of one worker's spans, of the micro-batches that have one place.

    Args:
        homes: by span index, the worker that has it.
        me: this worker.
        inputs: of adapters.
        shared: all logits of this worker, float32, flat.
        logits: the part of them for these micro-batches.
        before: of another place, over the same pool and engines.
        family, others, more: of `Executor`, with the engines and embeddings of this worker.
    """

    def __init__(
        self,
        family: Family,
        *others: Any,
        homes: Sequence[int],
        me: int,
        inputs: AdapterInputs,
        shared: np.ndarray,
        logits: np.ndarray,
        before: PartExecutor | None,
        **more: Any,
    ) -> None:
        super().__init__(family, *others, before=before, **more)  # type: ignore[misc]
        self.homes, self.me = homes, me
        if before is not None:
            self._bound_call = before._bound_call  # engines are bound to one call of any place
            tokens = len(self._buffers.hidden[0])
            kept = len(self._buffers.kept[0])
            self._buffers = make_buffers(family, self._device, tokens, kept, 0)
        self._buffers.logits = logits
        self._shared, self._inputs = shared, inputs
        self._stamped: tuple[StepLayout | None, dict[int, tuple[int, ...]]] = None, {}
        self._shares: WeakKeyDictionary[StepLayout, _Share] = WeakKeyDictionary()

    def host(
        self,
        chains: Sequence[ChainPlan],
        spans: Sequence[Span],
        engines: Mapping[int, Engine],
        embeddings: Mapping[str, Embedding],
        homes: Sequence[int],
    ) -> None:
        """Between two steps, have other spans of the family than before."""
        if tuple(chains) != self.chains:
            self.chains, self._spans = tuple(chains), spans
            self._layouts.clear()
        for index, engine in engines.items():
            if self._engines.get(index) is not engine:
                self._bind_pool(engine)
        for index in self._engines.keys() | engines.keys():
            if self._engines.get(index) is not engines.get(index):
                self._bound_call.pop(index, None)
        self._engines, self._embeddings, self.homes = engines, embeddings, homes
        self._shares.clear()

    def begin(self, batch: Sequence[Rows]) -> PartStep:
        """Lay out a batch, and look up what enters its first calls."""
        order = batch_order([(rows.chain, rows.entry, rows.exit is not None) for rows in batch])
        ordered = [batch[i] for i in order]
        layout, _ = self._layout_for(ordered)
        self._most_rows = max(self._most_rows, layout.num_rows)
        self._fill(layout, ordered)
        self._scores = {}
        self._gather(layout)
        share = self._shares.get(layout)
        if share is None or share.shapes is not layout.shapes:  # logits are others'
            share = self._shares[layout] = _Share(self, layout)
        return PartStep(self, layout, share, order)

    def run_call(self, layout: StepLayout, kept: list[Hidden], index: int) -> None:
        """Run a call of this worker; hidden states that somebody keeps are added to `kept`. Raises
        AdapterUnavailableError."""
        call = layout.calls[index]
        if self._spans[call.span].lora:
            self._bind_adapters(layout, index, call)
        self._run_call(layout, kept, call)

    def _bind_adapters(self, layout: StepLayout, index: int, call: Call) -> None:
        """Now and not when it is laid out: a call of another place may have moved them since."""
        if self._stamped[0] is not layout:
            self._stamped = layout, {}
        stamps = self._stamped[1]
        if index not in stamps or stamps[index] != self._inputs.stamp(call):
            call.binds |= self._inputs.of(call)
            self._bound_call.pop(call.span, None)
            stamps[index] = self._inputs.stamp(call)

    @property
    def scores(self) -> dict[int, np.ndarray]:
        """Attention received in the calls run here, by place in the layout."""
        return self._scores

    def place_of(self, rows: np.ndarray) -> int:
        """Where logits begin in the shared memory, in elements."""
        begin = rows.__array_interface__["data"][0] - self._shared.__array_interface__["data"][0]
        return int(begin) // rows.itemsize


class _Share:
    """What a worker does of all steps with one layout, as it fits some shapes.

    Attributes:
        shapes: these.
        calls: their numbers, in order.
        sources: by call, the calls elsewhere whose rows it takes, and where these go.
        takers: by call, who takes its rows elsewhere.
        logits: where they begin, a row's size, and whose they are by place in the layout.
        num_rows: of all calls.
        said: what was said last, where nothing went along, and of which order of the batch (`PartStep.said`).
    """

    def __init__(self, executor: PartExecutor, layout: StepLayout) -> None:
        homes, me, calls = executor.homes, executor.me, layout.calls
        self.shapes = layout.shapes
        self.calls = [index for index, call in enumerate(calls) if homes[call.span] == me]
        self.sources: dict[int, dict[int, list[np.ndarray]]] = {index: {} for index in self.calls}
        self.takers: dict[int, list[Passing]] = defaultdict(list)
        for taker, call in enumerate(calls):
            by_source: dict[int, list[np.ndarray]] = defaultdict(list)
            for fed in call.fed:
                by_source[fed.call].append(fed.rows)
            for source, rows in sorted(by_source.items()):
                home = homes[calls[source].span]
                if home == me != homes[call.span]:
                    self.takers[source].append(Passing(homes[call.span], source, taker, rows))
                elif home != me == homes[call.span]:
                    self.sources[taker][source] = rows
        outputs = [calls[index].binds.get("logits") for index in self.calls]
        self.logits = [
            Logits(executor.place_of(rows), rows.shape[1], places)
            for rows, places in layout.logits
            if any(rows is output for output in outputs)
        ]
        self.num_rows = sum(calls[index].num_rows for index in self.calls)
        self.said: tuple[Sequence[int], bytes] = (), b""


class PartStep:
    """A micro-batch under way on one worker."""

    def __init__(
        self, executor: PartExecutor, layout: StepLayout, share: _Share, order: Sequence[int]
    ) -> None:
        self._executor, self._layout, self._share, self._order = executor, layout, share, order
        self._pending = deque(share.calls)
        self._kept: list[Hidden] = []

    @property
    def is_done(self) -> bool:
        """Whether all calls here have run."""
        return not self._pending

    @property
    def next_span(self) -> int:
        """Of the next call."""
        return self._layout.calls[self._pending[0]].span

    def pending_spans(self) -> set[int]:
        """Of all calls that are still to run here."""
        return {self._layout.calls[index].span for index in self._pending}

    def can_run(self, inbox: Inbox) -> bool:
        """Whether the rows of the next call have come."""
        taker = self._pending[0]
        return all((source, taker) in inbox for source in self._share.sources[taker])

    def run_next(self, inbox: Inbox) -> list[Passing]:
        """Run the next call; what is to be sent on.

        Raises:
            AdapterUnavailableError, and what engines raise.
            ValueError: rows do not fit.
        """
        index = self._pending.popleft()
        for source, targets in self._share.sources[index].items():
            for target, data in zip(targets, inbox.pop((source, index)), strict=True):
                target[...] = np.frombuffer(data, target.dtype).reshape(target.shape)
        self._executor.run_call(self._layout, self._kept, index)
        return self._share.takers.get(index, [])

    def logits(self) -> list[Logits]:
        """Those that were computed here."""
        return [
            each._replace(members=[self._order[place] for place in each.members])
            for each in self._share.logits
        ]

    def scores(self) -> dict[int, np.ndarray]:
        """The attention that tokens received here, as in `StepResult`."""
        return {self._order[place]: values for place, values in self._executor.scores.items()}

    def hidden(self) -> list[Hidden]:
        """Hidden states that left spans here and are kept."""
        return [each._replace(member=self._order[each.member]) for each in self._kept]

    def said(self) -> tuple[bytes, list[np.ndarray]]:
        """What was done here, as JSON, and arrays that go along. Most steps say what the one before said."""
        scores, hidden = self.scores(), self.hidden()
        arrays = [*scores.values(), *(each.rows for each in hidden)]
        order, said = self._share.said
        if arrays or order != self._order:
            said = pack_json(
                {
                    "logits": self.logits(),
                    "calls": len(self._share.calls),
                    "rows": self._share.num_rows,
                    "scores": list(scores),
                    "hidden": [(each.member, each.entry) for each in hidden],
                    "frames": len(arrays),
                }
            )
        if not arrays:
            self._share.said = self._order, said
        return said, arrays
