"""The layer loop: one step's rows through the engines of one family of models.

Everything that depends only on the shapes of a step is prepared once per shape (`batch.StepLayout`);
in steady decode a step fills a few integer arrays, gathers embeddings and rotary rows, and runs the
engines on what is bound already.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from blockzoo.engines.arrays import Array, Arrays
from blockzoo.engines.base import Embedding, Engine
from blockzoo.runtime.exec.adapters import AdapterInputs, Pairs
from blockzoo.runtime.exec.batch import SeqShape, StepLayout, batch_order, layout_key
from blockzoo.runtime.exec.calls import Call
from blockzoo.runtime.exec.kv_tensors import KVTensors
from blockzoo.runtime.exec.parallel_calls import CallRunner
from blockzoo.runtime.exec.rows import RowChecks, Rows
from blockzoo.runtime.exec.step_arrays import Buffers, make_buffers
from blockzoo.runtime.exec.topology import ChainPlan, Family, Span

_SMALL_STEP = 128  # rows; the scratch of smaller steps is not worth giving back
_KEPT_LAYOUTS = 4  # of steps that take turns: of drafts, and of those that check them
_KEPT_RECORDINGS = 64  # where steps are recorded, each a CUDA graph
_TABLE_CHUNK = 8  # page tables are handed over in multiples of this, so that shapes change rarely


class Hidden(NamedTuple):
    """Hidden states [n, hidden] of the rows of number `member` of the batch that entered span use `entry`."""

    member: int
    entry: int
    rows: Array


Program = Callable[[], list[Hidden] | None]
"""Runs a filled layout; None where a recording runs in its place: nothing is kept there."""


Stamps = tuple[tuple[int, ...], ...]
"""Of a layout's calls, which versions of adapters they are bound to (`AdapterInputs.stamp`)."""


class StepResult(NamedTuple):
    """What a step gave.

    Attributes:
        logits: matrices float32 [n, vocab], valid until the next run, each with the indices of the
            batch whose last new tokens its rows belong to, in order. All that were wanted are in one.
        num_calls: engine calls made.
        num_call_rows: rows that went through them.
        hidden: of the batch's rows that keep theirs; the caller's own.
        scores: by index into the batch, of members with a score window: float32 [past + new], what each token
            of the context received of the attention of these rows, summed over rows, heads and layers run.
    """

    logits: list[tuple[np.ndarray, list[int]]]
    num_calls: int
    num_call_rows: int
    hidden: list[Hidden]
    scores: dict[int, np.ndarray]


class Executor:
    """Runs steps of the models of one family over one pool.

    Where models come or go another executor takes its place, `before`, between two steps: with the same pool,
    buffers and threads, and what engines are the same.

    Args:
        family: what the models have in common.
        chains, spans: of the whole topology; only those of the family are run.
        engines: by span index.
        embeddings: by embed block id.
        rope_tables: per chain index, (cos, sin) float32 [positions, head_dim].
        arrays: of the maker of the engines.
        num_pages: pages of the pool. There is one more, for rows that nobody reads.
        max_tokens, max_seqs: bounds of a step.
        max_more_logits: rows of logits that a step may have besides one for each sequence.
        adapters: their inputs, by call; None in a zoo without any.
        before: whose place it takes, of the same `num_pages`.
    """

    def __init__(
        self,
        family: Family,
        chains: Sequence[ChainPlan],
        spans: Sequence[Span],
        engines: Mapping[int, Engine],
        embeddings: Mapping[str, Embedding],
        rope_tables: Mapping[int, tuple[np.ndarray, np.ndarray]],
        arrays: Arrays,
        num_pages: int,
        max_tokens: int,
        max_seqs: int,
        adapters: AdapterInputs | None = None,
        max_more_logits: int = 0,
        before: Executor | None = None,
    ) -> None:
        self.adapters = adapters
        self.chains, self._spans = tuple(chains), spans
        self._engines, self._embeddings, self._device = engines, embeddings, arrays
        self._rotation = dict(rope_tables)  # on the host; the pages look here too
        unique = {id(tables): tables for tables in rope_tables.values()}
        mirrored = {key: tuple(map(arrays.mirror, tables)) for key, tables in unique.items()}
        self._rope_tables = {chain: mirrored[id(tables)] for chain, tables in rope_tables.items()}
        self._num_pages = num_pages
        self._pool: dict[str, Array] = self._make_pool(family) if before is None else before._pool
        for engine in engines.values():
            if before is None or not before.has(engine):  # it may run at this moment
                self._bind_pool(engine)
        self.kv = KVTensors(self._pool, num_pages, self._rotation, arrays)
        vocab = max(chain.vocab_size for chain in chains if chain.family == family)
        if arrays.records:  # padding at most doubles a decode step
            max_seqs *= 2
            max_tokens = max(max_tokens, max_seqs)
        max_logits = max_seqs + max_more_logits
        self._buffers: Buffers
        if before is not None and len(before._buffers.logits) == max_logits * vocab:
            self._buffers = before._buffers
        else:
            self._buffers = make_buffers(family, arrays, max_tokens, max_logits, vocab)
        self._layouts: dict[Hashable, tuple[StepLayout, Program, Stamps]] = {}
        self._runner: CallRunner = CallRunner(arrays.call_threads) if before is None else before._runner
        self._bound_call: dict[int, Call] = {}  # by span, the call that its engine is bound to
        self._most_rows = 0  # of a step since scratch was given back
        self._scores: dict[int, np.ndarray] = {}  # of the step that runs, by place in its layout
        vocab_sizes = {embed_id: table.vocab_size for embed_id, table in embeddings.items()}
        self._check = RowChecks(
            self.chains, vocab_sizes, self._rotation, num_pages, family.hidden_size, max_tokens, max_logits
        )

    def has(self, engine: Engine) -> bool:
        """Whether it runs an engine."""
        return any(engine is own for own in self._engines.values())

    def take_over(self, before: Executor, running: Iterable[int]) -> dict[str, Pairs]:
        """Go on with the adapters that `before` has in place, of which chains `running` are in use. Returns
        those of them that were in place in spans that are no more (`AdapterCache.hold`)."""
        before.forget_bindings()
        if self.adapters is None or before.adapters is None:
            return {}
        return self.adapters.take_over(before.adapters, {before.chains[i].adapters for i in running})

    def forget_bindings(self) -> None:
        """Bind engines anew before they run: another executor has run them."""
        self._bound_call.clear()

    def close(self) -> None:
        """Let go of the engines and all that is bound to them; nothing can be run any more."""
        self._layouts.clear()
        self._bound_call.clear()
        self._engines = {}
        self.adapters = None

    def discard(self, pages: np.ndarray) -> None:
        """Give back the memory of pages, int32 [n], that are written before they are read again."""
        if self._device.is_lazy:
            for pool in self._pool.values():
                self._device.discard(pool, pages)

    def is_sound(self, chain: int) -> bool:
        """Run one token through a chain, in no page of a sequence: whether its logits are finite."""
        result = self._run([self._padding(chain)])
        return all(bool(np.isfinite(logits).all()) for logits, _ in result.logits)

    def run_padding(self, chain: int, counts: Sequence[int]) -> None:
        """Run tokens through a chain that nobody reads, so many of each of some sequences, a page at most."""
        self._run([self._padding(chain, count) for count in counts])

    def release_memory(self) -> None:
        """Give back the engines' scratch if a step was large enough for that to be worth it."""
        if self._most_rows > _SMALL_STEP:
            for engine in self._engines.values():
                engine.release_memory()
            self._device.trim()
            self._most_rows = 0

    def run(self, batch: Sequence[Rows]) -> StepResult:
        """Run a batch; K and V of all its rows are written when it returns.

        Raises:
            RowError: a member's page table, token ids or lengths are out of range; nothing was run.
            ValueError: more rows than a step may have; nothing was run.
            AdapterUnavailableError: the members of a chain cannot run; nothing was run.
        """
        self._check(batch)
        return self._run(batch)

    def _run(self, batch: Sequence[Rows]) -> StepResult:
        order = batch_order([(rows.chain, rows.entry, rows.exit is not None) for rows in batch])
        ordered = [batch[i] for i in order]
        if self._device.records:
            order, ordered = self._padded(order, ordered)
        layout, program = self._layout_for(ordered)
        self._most_rows = max(self._most_rows, layout.num_rows)
        self._fill(layout, ordered)
        self._scores = {}
        looks = any(rows.score_window for rows in ordered)
        kept = (self._launch(layout) if looks else program()) or []  # a recording would not read scores
        logits = []
        for rows, places in layout.logits:
            matrix, indices = self._device.to_host(rows), [order[place] for place in places]
            if -1 in indices:  # padding
                real = [row for row, index in enumerate(indices) if index >= 0]
                matrix, indices = matrix[real], [indices[row] for row in real]
            logits.append((matrix, indices))
        hidden = [item._replace(member=order[item.member]) for item in kept]
        scores = {order[place]: values for place, values in self._scores.items()}
        num_rows = sum(call.num_rows for call in layout.calls)
        return StepResult(logits, len(layout.calls), num_rows, hidden, scores)

    def _padded(self, order: list[int], batch: list[Rows]) -> tuple[list[int], list[Rows]]:
        """A decode step with each chain's sequences filled up to a power of two, by rows of index -1."""
        if any(
            len(r.token_ids) > 1 or not r.num_logits or r.entry or r.keeps_hidden or r.exit for r in batch
        ):
            return order, batch
        indices: list[int] = []
        padded: list[Rows] = []
        for chain, own in groupby(zip(order, batch, strict=True), key=lambda item: item[1].chain):
            items = list(own)
            missing = (1 << (len(items) - 1).bit_length()) - len(items)
            indices += [index for index, _ in items] + [-1] * missing
            padded += [rows for _, rows in items] + [self._padding(chain)] * missing
        return indices, padded

    def _padding(self, chain: int, count: int = 1) -> Rows:
        """Rows that nobody reads: tokens in the page beyond those that sequences have."""
        table = np.full((self.chains[chain].num_layers, 1), self._num_pages, np.int32)
        return Rows(chain, np.zeros(count, np.int32), 0, table, count)

    def _make_pool(self, family: Family) -> dict[str, Array]:
        shape = (self._num_pages + 1, family.num_kv_heads, family.head_dim)
        return {name: self._device.pages(*shape) for name in ("key_cache", "value_cache")}

    def _bind_pool(self, engine: Engine) -> None:
        if engine.spec.layers:
            for name, pages in self._pool.items():
                engine.bind(name, pages)

    def _layout_for(self, batch: Sequence[Rows]) -> tuple[StepLayout, Program]:
        """The layout of a batch's shapes, and what runs it; the last ones are kept."""
        lens = [_table_len(rows) for rows in batch]
        if self._device.records:  # the same for all, and few of them
            lens = [1 << (max(lens) - 1).bit_length()] * len(batch)
        shapes = tuple(
            SeqShape(
                rows.chain,
                len(rows.token_ids),
                length,
                rows.num_logits,
                rows.entry,
                rows.keeps_hidden,
                rows.exit,
            )
            for rows, length in zip(batch, lens, strict=True)
        )
        # what is recorded may depend on more than on keys
        key = shapes if self._device.records else layout_key(shapes)
        kept = self._layouts.pop(key, None)
        if kept is None or kept[2] != self._stamps(kept[0]):
            layout = StepLayout(shapes, self.chains, self._spans, self._buffers, self._device)
            if self.adapters is not None:
                for call in layout.calls:
                    call.binds |= self.adapters.of(call)
            program: Program = partial(self._launch, layout)
            if not any(call.passed for call in layout.calls):  # what is handed out must be new each time
                program = self._device.recorded(program)
            kept = layout, program, self._stamps(layout)
            while len(self._layouts) >= (_KEPT_RECORDINGS if self._device.records else _KEPT_LAYOUTS):
                self._layouts.pop(next(iter(self._layouts)))
        self._layouts[key] = kept  # the last one used is the last to go
        kept[0].fit(shapes)
        return kept[:2]

    def _stamps(self, layout: StepLayout) -> Stamps:
        """Change when adapters that the layout's calls are bound to have given way to others."""
        return () if self.adapters is None else tuple(map(self.adapters.stamp, layout.calls))

    def _launch(self, layout: StepLayout) -> list[Hidden]:
        self._gather(layout)
        return self._run_calls(layout)

    def _fill(self, layout: StepLayout, batch: Sequence[Rows]) -> None:
        arrays, begins = layout.arrays, layout.seq_begins
        counts = np.diff(begins)
        arrays.token_ids[...] = np.concatenate([rows.token_ids for rows in batch])
        arrays.past_lens[...] = [rows.past_len for rows in batch]
        arrays.score_windows[...] = [rows.score_window for rows in batch]
        arrays.positions[...] = np.arange(begins[-1]) + np.repeat(arrays.past_lens - begins[:-1], counts)
        for rows, begin in zip(batch, layout.table_begins.tolist(), strict=False):
            used = rows.used_pages()  # beyond: some valid id, never read
            arrays.tables[: used.shape[0], begin : begin + used.shape[1]] = used
        arrays.max_context_len[...] = (arrays.past_lens + counts).max()
        layout.upload()
        for i, rows in enumerate(batch):
            if rows.hidden is not None:
                layout.entering_rows(i)[...] = rows.hidden

    def _gather(self, layout: StepLayout) -> None:
        """Rotary rows of the step's tokens, and the embeddings of those that enter at the bottom: one look-up
        for neighbouring chains that share a table."""
        arrays, buffers, take = layout.device_arrays, self._buffers, self._device.take
        groups = layout.group_rows()
        for _, run in groupby(groups, key=lambda group: id(self._rope_tables[group[0]])):
            chain, rows = _joined(list(run))
            cos, sin = self._rope_tables[chain]
            positions = arrays.positions[rows]
            take(cos, positions, buffers.cos[rows, 0, 0])
            take(sin, positions, buffers.sin[rows, 0, 0])
        for (entry, embed_id), run in groupby(groups, key=lambda g: (g[1], self.chains[g[0]].embed_id)):
            if not entry and embed_id in self._embeddings:
                _, rows = _joined(list(run))
                self._embeddings[embed_id].lookup(arrays.token_ids[rows], buffers.hidden[0][rows])

    def _run_calls(self, layout: StepLayout) -> list[Hidden]:
        """Run the engines; copies of the hidden states that somebody keeps, by place in the layout."""
        kept: list[Hidden] = []
        self._runner.run(layout.graph, partial(self._run_call, layout, kept))
        return kept

    def _run_call(self, layout: StepLayout, kept: list[Hidden], call: Call) -> None:
        """From any thread, while others of the graph that it need not wait for run."""
        engine = self._engines[call.span]
        if self._bound_call.get(call.span) is not call:
            for name, array in call.binds.items():
                engine.bind(name, array)
            self._bound_call[call.span] = call
        for destination, source in call.copies_in:
            destination[...] = source
        engine.run()
        for destination, source in call.copies_out:
            destination[...] = source
        if call.scored and layout.arrays.score_windows.any():
            self._add_scores(call.scored, layout, engine)
        for seq, entry, rows in call.passed:
            own = self._device.rows_like(rows, len(rows))
            own[...] = rows
            kept.append(Hidden(seq, entry, own))

    def _add_scores(self, seqs: Sequence[int], layout: StepLayout, engine: Engine) -> None:
        """Add those that an engine has just given, of sequences by place in the layout, to the step's."""
        lens = layout.arrays.past_lens + np.diff(layout.seq_begins)
        values = np.split(self._device.to_host(engine.scores()), np.cumsum(lens[list(seqs)])[:-1])
        for seq, own in zip(seqs, values, strict=True):
            if layout.arrays.score_windows[seq]:
                known = self._scores.get(seq)
                self._scores[seq] = own.copy() if known is None else known + own


def _joined(groups: Sequence[tuple[int, int, slice]]) -> tuple[int, slice]:
    """The chain of the first, and the rows of all, of neighbouring groups (`StepLayout.group_rows`)."""
    return groups[0][0], slice(groups[0][2].start, groups[-1][2].stop)


def _table_len(rows: Rows) -> int:
    return -(-rows.num_pages // _TABLE_CHUNK) * _TABLE_CHUNK
