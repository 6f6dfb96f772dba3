"""Row programs: which rows of a step run through which engine, in what order, over which arrays.

A step's sequences are ordered by chain. A *group* is the run of sequences of one chain that enter it at
one place; a *call* is one engine run over the groups whose chains use that span at that position. Where
those groups are neighbours (the usual case) the call works on slices of the step's buffers; else its rows
are gathered into scratch and scattered back.

Two kinds of rows: *token rows*, one per new token, until a chain's last attention has run; then
*logit rows*, those whose logits somebody needs. Token rows may enter a chain late, with hidden states that
were kept where they left the spans below (`boundary`).

Only ints and arrays here: the executor binds the arrays to engines and runs them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from blockzoo.engines.arrays import Array, Arrays
from blockzoo.runtime.exec.calls import Call, CallGraph, Fed, Passed
from blockzoo.runtime.exec.step_arrays import Buffers, StepArrays
from blockzoo.runtime.exec.topology import ChainPlan, Span


class SeqShape(NamedTuple):
    """What decides the shapes of a step for one sequence."""

    chain: int  # index into the topology's chains
    num_tokens: int  # new tokens
    table_len: int  # page-table entries handed to the engines, >= pages in use
    num_logits: int  # of so many of its last new tokens
    entry: int = 0  # the first of its chain's span uses that runs
    keeps_hidden: bool = False  # what enters the chain's later entries is kept
    exit: int | None = None  # the first of its chain's span uses that does not run; what enters it is kept

    @property
    def is_plain(self) -> bool:
        """Whether it is a last token, and drafted ones behind it, of each of which the logits are wanted."""
        whole = not self.entry and not self.keeps_hidden and self.exit is None
        return whole and self.num_tokens == self.num_logits


class _Range(NamedTuple):
    """Neighbouring sequences: their sequence, token-row and logit-row index ranges."""

    seqs: slice
    rows: slice
    kept: slice


@dataclass(slots=True)
class _Group:
    chain: int
    entry: int
    exit: int | None
    range: _Range
    dropped: bool = False  # now logit rows
    side: int = 0  # which of the two buffers holds its rows
    last_call: int | None = None  # that moved them there


class StepLayout:
    """The calls of all steps of one `layout_key`; array contents change, shapes do not.

    Args:
        shapes: one per sequence, ordered as by `batch_order`.
        chains, spans: of the topology.
        buffers: of the family.
        device: makes arrays where the buffers are.

    `arrays` is filled on the host before each run; `upload` then brings the engines' copy up to date.
    """

    def __init__(
        self,
        shapes: Sequence[SeqShape],
        chains: Sequence[ChainPlan],
        spans: Sequence[Span],
        buffers: Buffers,
        device: Arrays,
    ) -> None:
        self._spans, self._chains, self._buffers, self._device = spans, chains, buffers, device
        self._constants: dict[bytes, Array] = {}
        self._begins_of: dict[tuple[int, ...], tuple[np.ndarray, Array]] = {}  # by sequences; host, device
        self._note_shapes(shapes)
        counts = [shape.num_tokens for shape in shapes]
        entries = np.array([shape.table_len for shape in shapes])
        num_layers = max(chains[shape.chain].num_layers for shape in shapes)
        sizes = sum(counts), len(shapes), (num_layers, int(entries.sum()))
        self._flat = np.zeros(StepArrays.size(*sizes), np.int32)
        self._device_flat = device.mirror(self._flat)
        self.arrays = StepArrays.over(self._flat, *sizes)
        self.device_arrays = StepArrays.over(self._device_flat, *sizes)
        self.table_begins = _begins(entries)  # [S + 1], first page-table entry of each sequence
        self.logits: list[tuple[Array, list[int]]] = []  # float32 [n, vocab] and whose rows they are
        self._logits_used = 0
        self._groups = self._make_groups()
        self.calls = self._make_calls()
        self.graph = CallGraph(self.calls, [len(span.block_ids) for span in spans])

    def fit(self, shapes: Sequence[SeqShape]) -> None:
        """Be the layout of other shapes of the same key: only what is written into arrays changes."""
        if tuple(shapes) == self.shapes:
            return
        self._note_shapes(shapes)
        for seqs, (host, begins) in self._begins_of.items():
            host[...] = self._row_begins(seqs)
            self._device.upload(host, begins)
        self.logits = [(rows, self._repeated(np.unique(owners))) for rows, owners in self.logits]

    def _note_shapes(self, shapes: Sequence[SeqShape]) -> None:
        self.shapes = tuple(shapes)
        self._num_logits = np.array([shape.num_logits for shape in shapes], np.int32)
        self._kept_begins = _begins(self._num_logits)
        # [S + 1], first token row of each sequence
        self.seq_begins = _begins(np.array([shape.num_tokens for shape in shapes]))

    @property
    def num_rows(self) -> int:
        """New tokens of the step."""
        return int(self.seq_begins[-1])

    def upload(self) -> None:
        """Hand the filled `arrays` to the engines."""
        self._device.upload(self._flat, self._device_flat)

    def group_rows(self) -> list[tuple[int, int, slice]]:
        """Chain, entry and token rows of each group, for the embedding look-up."""
        return [(group.chain, group.entry, group.range.rows) for group in self._groups]

    def entering_rows(self, seq: int) -> Array:
        """Where the hidden states of a sequence that enters late are expected, [n, hidden]."""
        begins = self.seq_begins
        return self._buffers.hidden[_side_at(self.shapes[seq].entry)][begins[seq] : begins[seq + 1]]

    def _make_groups(self) -> list[_Group]:
        kinds = [(shape.chain, shape.entry, shape.exit) for shape in self.shapes]
        starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
        ends = [*starts[1:], len(self.shapes)]
        return [
            _Group(*kinds[a], self._range(a, b), side=_side_at(kinds[a][1]))
            for a, b in zip(starts, ends, strict=True)
        ]

    def _range(self, first: int, end: int) -> _Range:
        def between(begins: np.ndarray) -> slice:
            return slice(int(begins[first]), int(begins[end]))

        return _Range(slice(first, end), between(self.seq_begins), between(self._kept_begins))

    def _make_calls(self) -> list[Call]:
        users: dict[tuple[int, int, int], list[_Group]] = defaultdict(list)
        for group in self._groups:
            for use in self._chains[group.chain].uses[group.entry : group.exit]:
                users[use.position, use.span, use.first_layer].append(group)
        calls: list[Call] = []
        for (position, span_index, first_layer), groups in sorted(users.items(), key=lambda item: item[0]):
            groups = [g for g in groups if not g.dropped or _length(g.range.kept)]
            if groups:
                fed = self._fed(groups, len(calls))
                calls.append(self._make_call(position, span_index, first_layer, groups))
                calls[-1].fed = fed
        return calls

    def _fed(self, groups: list[_Group], index: int) -> list[Fed]:
        """What call number `index` takes over from calls before it."""
        fed = [Fed(g.last_call, self._view(g)) for g in groups if g.last_call is not None]
        for group in groups:
            group.last_call = index
        return fed

    def _make_call(self, position: int, span_index: int, first_layer: int, groups: list[_Group]) -> Call:
        span = self._spans[span_index]
        parts = tuple((group.chain, len(self._view(group))) for group in groups)
        call = Call(span_index, first_layer, 0, {}, position, parts)
        joined = self._joined(groups)
        self._bind_source(call, groups, joined)
        if span.num_layers:
            self._bind_attention(call, groups, joined, span.num_layers)
        if span.drops_rows:
            rows = self._rows_to_keep(groups)
            call.binds["rows"] = self._constant(rows if rows.size else np.zeros(1, np.int32))
            for group in groups:
                if not group.dropped:
                    group.dropped, group.side = True, 1
        last = self._chains[groups[0].chain].uses[-1]
        if (last.span, last.first_layer) == (span_index, first_layer):
            self._bind_logits(call, groups)
        else:
            self._bind_output(call, groups)
            self._note_passed(call, groups)
        return call

    def _joined(self, groups: list[_Group]) -> _Range | None:
        """One range over all groups where their rows are neighbours in one buffer, else None."""
        if len({(group.dropped, group.side) for group in groups}) > 1:
            return None
        joined = self._range(groups[0].range.seqs.start, groups[-1].range.seqs.stop)
        if groups[0].dropped:  # groups without logit rows may lie between, they part nothing
            return joined if _length(joined.kept) == sum(_length(g.range.kept) for g in groups) else None
        return joined if _length(joined.rows) == sum(_length(g.range.rows) for g in groups) else None

    def _view(self, group: _Group, part: _Range | None = None) -> Array:
        """Where the group's rows are now (or those of a range in the same buffer)."""
        part = part or group.range
        if group.dropped:
            return self._buffers.kept[group.side][part.kept]
        return self._buffers.hidden[group.side][part.rows]

    def _bind_source(self, call: Call, groups: list[_Group], joined: _Range | None) -> None:
        if joined is not None:
            call.binds["hidden"] = self._view(groups[0], joined)
        else:
            views = [self._view(group) for group in groups]
            call.binds["hidden"] = self._stack(self._buffers.scratch[0], views, call.copies_in)
        call.num_rows = len(call.binds["hidden"])

    @staticmethod
    def _stack(scratch: Array, views: list[Array], copies: list[tuple[Array, Array]]) -> Array:
        """The leading rows of `scratch`, with one copy per view in `copies`."""
        end = 0
        for view in views:
            copies.append((scratch[end : end + len(view)], view))
            end += len(view)
        return scratch[:end]

    def _bind_attention(
        self, call: Call, groups: list[_Group], joined: _Range | None, num_layers: int
    ) -> None:
        arrays, buffers, binds = self.device_arrays, self._buffers, call.binds
        binds["max_context_len"] = arrays.max_context_len
        seqs = tuple(i for g in groups for i in range(g.range.seqs.start, g.range.seqs.stop))
        layers = range(call.first_layer, call.first_layer + num_layers)
        if joined is not None:
            entries = self._entries(joined)
            binds["cos"], binds["sin"] = buffers.cos[joined.rows], buffers.sin[joined.rows]
            binds["past_lens"] = arrays.past_lens[joined.seqs]
            windows = arrays.score_windows[joined.seqs]
            for i, layer in enumerate(layers):
                binds[f"block_indices.{i}"] = arrays.tables[layer, entries]
        else:
            rows = [group.range.rows for group in groups]
            for name, table in (("cos", buffers.cos), ("sin", buffers.sin)):
                binds[name] = self._private(call, [table[part] for part in rows])
            binds["past_lens"] = self._private(call, [arrays.past_lens[g.range.seqs] for g in groups])
            windows = self._private(call, [arrays.score_windows[g.range.seqs] for g in groups])
            for i, layer in enumerate(layers):
                parts = [arrays.tables[layer, self._entries(g.range)] for g in groups]
                binds[f"block_indices.{i}"] = self._private(call, parts)
        if self._spans[call.span].scores:
            binds["score_windows"] = windows
            call.scored = seqs
        if seqs not in self._begins_of:
            begins = self._row_begins(seqs)
            self._begins_of[seqs] = begins, self._device.mirror(begins)
        binds["subsequence_begins"] = self._begins_of[seqs][1]
        entries_of = np.array([self.shapes[i].table_len for i in seqs])
        binds["block_indices_begins"] = self._constant(_begins(entries_of))

    def _row_begins(self, seqs: Sequence[int]) -> np.ndarray:
        """[len(seqs) + 1], where the rows of each begin among those of all these."""
        return _begins(np.array([self.shapes[seq].num_tokens for seq in seqs]))

    def _repeated(self, seqs: np.ndarray) -> list[int]:
        """Each of these sequences as often as it has logits."""
        found: list[int] = np.repeat(seqs, self._num_logits[seqs]).tolist()
        return found

    def _constant(self, values: np.ndarray) -> Array:
        """An array of ints that no step changes, on the device; equal ones are one."""
        key = values.tobytes()
        if key not in self._constants:
            self._constants[key] = self._device.mirror(values)
        return self._constants[key]

    def _private(self, call: Call, parts: list[Array]) -> Array:
        """A new array with the parts one after the other, refreshed before every run of the call."""
        own = self._device.rows_like(parts[0], sum(map(len, parts)))
        return self._stack(own, parts, call.copies_in)

    def _entries(self, part: _Range) -> slice:
        begins = self.table_begins
        return slice(int(begins[part.seqs.start]), int(begins[part.seqs.stop]))

    def _rows_to_keep(self, groups: list[_Group]) -> np.ndarray:
        """Positions of the logit rows among the rows that enter the call."""
        keep, offset = [], 0
        for group in groups:
            if group.dropped:
                count = _length(group.range.kept)
                keep.append(np.arange(offset, offset + count))
            else:
                count = _length(group.range.rows)
                ends = self.seq_begins[1:][group.range.seqs] - group.range.rows.start
                keep.append(offset + _last_rows(ends, self._num_logits[group.range.seqs]))
            offset += count
        return np.concatenate(keep).astype(np.int32)

    def _bind_output(self, call: Call, groups: list[_Group]) -> None:
        for group in groups:
            group.side = 1 - group.side
        joined = self._joined(groups)
        views = [self._view(group) for group in groups]
        if not sum(map(len, views)):  # one row stayed so that the engine has an output; nobody reads it
            call.binds["hidden_out"] = self._device.rows_like(self._buffers.hidden[0], 1)
        elif joined is not None:
            call.binds["hidden_out"] = self._view(groups[0], joined)
        else:
            copies: list[tuple[Array, Array]] = []
            call.binds["hidden_out"] = self._stack(self._buffers.scratch[1], views, copies)
            call.copies_out = [(view, scratch) for scratch, view in copies]

    def _note_passed(self, call: Call, groups: list[_Group]) -> None:
        """Note the rows that are about to enter where chains part, of the sequences that keep them."""
        begins = self.seq_begins
        for group in groups:
            chain = self._chains[group.chain]
            use = 1 + next(
                i
                for i, u in enumerate(chain.uses)
                if (u.span, u.first_layer) == (call.span, call.first_layer)
            )
            if use not in (*chain.entries[1:], group.exit):
                continue
            hidden = self._buffers.hidden[group.side]
            for seq in range(group.range.seqs.start, group.range.seqs.stop):
                if self.shapes[seq].keeps_hidden or use == group.exit:
                    call.passed.append(Passed(seq, use, hidden[begins[seq] : begins[seq + 1]]))

    def _bind_logits(self, call: Call, groups: list[_Group]) -> None:
        places = np.concatenate([np.arange(g.range.seqs.start, g.range.seqs.stop) for g in groups])
        seqs = self._repeated(places)
        vocab = self._chains[groups[0].chain].vocab_size
        count = max(1, len(seqs))  # a span that ends a prefill chunk without logits still has one row
        begin = self._logits_used
        self._logits_used += count * vocab
        rows = self._buffers.logits[begin : begin + count * vocab].reshape(count, vocab)
        call.binds["logits"] = rows
        if seqs:
            self.logits.append((rows, seqs))


def layout_key(shapes: Sequence[SeqShape]) -> Hashable:
    """Steps of equal keys have one layout, `StepLayout.fit`: of a chain whose sequences decode it does not
    matter whose drafted rows are how many, as long as these are as many in all."""
    if not all(shape.is_plain for shape in shapes):
        return tuple(shapes)
    rows: dict[int, int] = defaultdict(int)
    for shape in shapes:
        rows[shape.chain] += shape.num_tokens
    return tuple(rows.items()), tuple((shape.chain, shape.table_len) for shape in shapes)


def batch_order(kinds: Sequence[tuple[int, int, bool]]) -> list[int]:
    """The order of a step's sequences, given (chain, entry, whether it leaves early) of each.

    Sequences of one chain are neighbours. Those that enter late come first in the first chain and last in
    the others, so that they do not part the rows below of two chains that share a lower span; those that
    leave early are neighbours too.
    """
    first = min((chain for chain, *_ in kinds), default=0)

    def place(index: int) -> tuple[int, int, bool]:
        chain, entry, leaves = kinds[index]
        return chain, -entry if chain == first else entry, leaves

    return sorted(range(len(kinds)), key=place)


def _side_at(use: int) -> int:
    """The buffer that holds token rows before a chain's span use: every call moves them to the other."""
    return use % 2


def _last_rows(ends: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The last `counts[i]` rows before each `ends[i]`, int [sum(counts)]."""
    begins = np.cumsum(counts) - counts
    return np.repeat(ends - counts - begins, counts) + np.arange(counts.sum())


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _begins(counts: np.ndarray) -> np.ndarray:
    """Exclusive prefix sums, int32 [n + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
