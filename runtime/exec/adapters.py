"""Adapters in use: loaded when a step first needs them, side by side where rows of several meet in a call.

The base's engines take the adapters of a call as inputs (`engines.base.Engine`), so loading one, or dropping
it, touches nothing else. Per span there is a *bank*: the matrices of the adapters in use there, one below the
other. An adapter that joins goes where room is, or in the place of one that has fallen idle; those that run
stay as they are. Only when most of the bank has fallen idle the rest is put together again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import numpy as np

from blockzoo.engines.adapters import lora_matrices
from blockzoo.engines.arrays import Array, Arrays
from blockzoo.runtime.api.errors import RequestError
from blockzoo.runtime.exec.calls import Call
from blockzoo.runtime.exec.topology import ChainPlan, Span
from blockzoo.zoo.blocks import Adapter, BlockSpec, tensor_shapes
from blockzoo.zoo.errors import StoreError

Pairs = dict[str, tuple[Array, Array]]  # by projection: A [rank, in], B [rank, out], as activations

_NEW_VERSION = count(1)  # no two banks give out the same: a span may stand in two places
_MAX_IDLE = 2  # a bank has at most this many times the ranks in use


class AdapterUnavailableError(RequestError):
    """An adapter's file is missing or damaged: nothing was run; the rows of `chain` cannot be."""

    def __init__(self, chain: int, message: str) -> None:
        super().__init__(message)
        self.chain = chain


class AdapterCache:
    """Adapters in the type of the engines, the most recently used ones within a budget.

    What banks have taken over is theirs: the budget bounds what is kept for adapters to come back quickly.

    Args:
        read: adapter id -> the adapter, from the zoo.
        arrays: of the engine maker.
        budget: bytes.
    """

    def __init__(self, read: Callable[[str], Adapter], arrays: Arrays, budget: int) -> None:
        self.arrays = arrays
        self.read, self._budget = read, budget
        self._loaded: OrderedDict[str, Pairs] = OrderedDict()
        self._dropped: set[str] = set()
        self.num_bytes = self.num_loads = self.num_reloads = self.num_evictions = 0

    def get(self, adapter_id: str) -> Pairs:
        """The adapter's matrices. Raises StoreError when its file is damaged."""
        pairs = self._loaded.get(adapter_id)
        if pairs is not None:
            self._loaded.move_to_end(adapter_id)
            return pairs
        adapter = self.read(adapter_id)
        made = self.arrays.activations
        pairs = {name: (made(a), made(b)) for name, (a, b) in lora_matrices(adapter).items()}
        adapter.drop_pages()
        self._loaded[adapter_id] = pairs
        self.num_loads += 1
        self.num_reloads += adapter_id in self._dropped
        self.num_bytes += _num_bytes(pairs)
        while self.num_bytes > self._budget:
            oldest_id, oldest = self._loaded.popitem(last=False)
            self._dropped.add(oldest_id)
            self.num_bytes -= _num_bytes(oldest)
            self.num_evictions += 1
        return pairs


class AdapterInputs:
    """The adapter inputs of every call of one executor.

    Args:
        cache: where adapters come from.
        chains, spans: of the topology.
        specs: per span, those of its blocks.
    """

    def __init__(
        self,
        cache: AdapterCache,
        chains: Sequence[ChainPlan],
        spans: Sequence[Span],
        specs: Sequence[Sequence[BlockSpec]],
    ) -> None:
        self._cache, self.chains, self._spans, self._specs = cache, chains, spans, specs
        self._banks: dict[tuple[int, int], _Bank] = {}

    def of(self, call: Call) -> dict[str, Array]:
        """Inputs by name; none for a span that takes no adapters. Raises AdapterUnavailableError."""
        span = self._spans[call.span]
        if not span.lora:
            return {}
        key = call.span, call.position
        if key not in self._banks:
            self._banks[key] = _Bank(span, self._specs[call.span], call.position, self._cache)
        adapters = {chain: self.chains[chain].adapters for chain, _ in call.parts}
        return self._banks[key].inputs(call.parts, adapters)

    def stamp(self, call: Call) -> tuple[int, ...]:
        """Changes when the inputs that a call was given are no longer those of its adapters."""
        bank = self._banks.get((call.span, call.position))
        return () if bank is None else tuple(bank.version(chain) for chain, _ in call.parts)


class _Bank:
    """The adapters in use at one place of the chains, each in a slot of ranks."""

    def __init__(self, span: Span, specs: Sequence[BlockSpec], position: int, cache: AdapterCache) -> None:
        self._cache, self._arrays = cache, cache.arrays
        self._places = range(position, position + len(span.block_ids))
        self._features: dict[str, int] = {}  # by input, columns of the matrix
        for index, names in span.lora:
            for name in names:
                for which, features in zip("ba", tensor_shapes(specs[index])[name], strict=True):
                    self._features[f"lora_{which}.{index}.{name}"] = features
        # chain -> its ranks; the least recently needed first
        self._slots: OrderedDict[int, slice] = OrderedDict()
        self._versions = np.zeros(0, np.int64)  # by rank that there is room for
        self._matrices = self._zeros(0)
        self._none = self._shown(0)
        self._inputs = self._none

    def version(self, chain: int) -> int:
        """Of what lies in a chain's slot; -1 where it has none."""
        slot = self._slots.get(chain)
        return -1 if slot is None else int(self._versions[slot.start])

    def inputs(
        self, parts: Sequence[tuple[int, int]], adapters: dict[int, tuple[tuple[int, str], ...]]
    ) -> dict[str, Array]:
        """The inputs of a call over `parts`, (chain, rows); `adapters` by chain."""
        here = {
            chain: {place - self._places.start: key for place, key in found if place in self._places}
            for chain, found in adapters.items()
        }
        here = {chain: found for chain, found in here.items() if found}
        num_rows = sum(rows for _, rows in parts)
        if not here:
            return self._none | {"lora_mask": self._arrays.zeros((num_rows, 0), "activation")}
        self._bring_in(here)
        mask = np.zeros((num_rows, len(self._inputs["lora_versions"])), np.float32)
        row = 0
        for chain, rows in parts:
            if chain in here:
                mask[row : row + rows, self._slots[chain]] = 1
            row += rows
        return self._inputs | {"lora_mask": self._arrays.activations(mask)}

    def _bring_in(self, needed: dict[int, dict[int, str]]) -> None:
        """Have the adapters of chains in slots; by chain and index of a block, ids."""
        joining: dict[int, dict[int, Pairs]] = {}
        for chain, found in needed.items():
            if chain in self._slots:
                self._slots.move_to_end(chain)
                continue
            try:
                joining[chain] = {index: self._cache.get(key) for index, key in found.items()}
            except StoreError as error:
                raise AdapterUnavailableError(chain, str(error)) from error
        ranks = {chain: slot.stop - slot.start for chain, slot in self._slots.items() if chain in needed}
        for chain, loaded in joining.items():
            ranks[chain] = max(len(a) for pairs in loaded.values() for a, _ in pairs.values())
        limit = self._limit(sum(ranks.values()))
        if not joining and self._end <= limit:
            return
        slots = None if self._end > limit else self._place({c: ranks[c] for c in joining}, needed, limit)
        if slots is None:  # too far apart: side by side
            self._move({chain: rank for chain, rank in ranks.items() if chain not in joining})
            slots = self._place({c: ranks[c] for c in joining}, needed, limit)
            assert slots is not None, "what is side by side leaves the rest of the limit free"
        self._make_room(max([self._end, *(slot.stop for slot in slots.values())]))
        for chain, slot in slots.items():
            self._write(slot, joining[chain])
            self._slots[chain] = slot
        self._inputs = self._shown(_power_of_two(self._end) if self._arrays.records else self._end)

    def _limit(self, in_use: int) -> int:
        """Where the last slot may end, given the ranks in use."""
        if not self._arrays.records:
            return _MAX_IDLE * in_use
        # few shapes, so that steps repeat them; and no larger ones than what is in use has needed so far
        room = len(self._versions)
        return room if in_use <= room <= _MAX_IDLE * in_use else _power_of_two(in_use)

    @property
    def _end(self) -> int:
        """Behind the last slot."""
        return max((slot.stop for slot in self._slots.values()), default=0)

    def _place(
        self, joining: dict[int, int], needed: dict[int, dict[int, str]], limit: int
    ) -> dict[int, slice] | None:
        """Slots below `limit` for chains by their ranks, idle ones dropped as that needs; None: no room."""
        taken = dict(self._slots)
        placed = {}
        idle = [chain for chain in self._slots if chain not in needed]
        for chain, rank in joining.items():
            while (start := _gap(taken.values(), rank, limit)) is None:
                if not idle:
                    return None
                del taken[idle.pop(0)]
            placed[chain] = taken[chain] = slice(start, start + rank)
        for chain in self._slots.keys() - taken.keys():
            del self._slots[chain]
        return placed

    def _move(self, ranks: dict[int, int]) -> None:
        """Put the slots of chains side by side, in new matrices, and drop the others."""
        old, old_slots = self._matrices, self._slots
        ends = np.cumsum([0, *ranks.values()]).tolist()
        self._slots = OrderedDict(
            (chain, slice(begin, end)) for chain, begin, end in zip(ranks, ends, ends[1:], strict=False)
        )
        self._matrices, self._versions = self._zeros(0), np.zeros(0, np.int64)
        self._make_room(ends[-1])
        for chain, slot in self._slots.items():
            for name, matrix in self._matrices.items():
                matrix[slot] = old[name][old_slots[chain]]
            self._stamp(slot)

    def _make_room(self, rank: int) -> None:
        """Have matrices of at least so many ranks; those that are too small are copied to larger ones."""
        room = len(self._versions)
        if rank <= room:
            return
        larger = _power_of_two(rank)  # at least doubled, so that growing is rare
        old, self._matrices = self._matrices, self._zeros(larger)
        self._versions = np.pad(self._versions, (0, larger - room))
        for name, matrix in self._matrices.items():
            matrix[:room] = old[name]

    def _write(self, slot: slice, loaded: dict[int, Pairs]) -> None:
        """Write the adapters of a chain's blocks, by index, into its slot."""
        for matrix in self._matrices.values():
            matrix[slot] = 0
        for index, pairs in loaded.items():
            for name, pair in pairs.items():
                rows = slice(slot.start, slot.start + len(pair[0]))
                for which, matrix in zip("ab", pair, strict=True):
                    self._matrices[f"lora_{which}.{index}.{name}"][rows] = matrix
        self._stamp(slot)

    def _stamp(self, slot: slice) -> None:
        self._versions[slot] = next(_NEW_VERSION)

    def _zeros(self, rank: int) -> dict[str, Array]:
        return {name: self._arrays.zeros((rank, n), "activation") for name, n in self._features.items()}

    def _shown(self, rank: int) -> dict[str, Array]:
        """The inputs of the first ranks."""
        views = {name: matrix[:rank] for name, matrix in self._matrices.items()}
        return views | {"lora_versions": self._versions[:rank].copy()}


def _power_of_two(number: int) -> int:
    """The least one that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def _gap(taken: Iterable[slice], length: int, limit: int) -> int | None:
    """Where the first gap of a length begins that ends at `limit` or before; None: nowhere."""
    begin = 0
    for slot in sorted(taken, key=lambda slot: slot.start):
        if slot.start - begin >= length:
            break
        begin = slot.stop
    return begin if begin + length <= limit else None


def _num_bytes(pairs: Pairs) -> int:
    return sum(matrix.nbytes for pair in pairs.values() for matrix in pair)
