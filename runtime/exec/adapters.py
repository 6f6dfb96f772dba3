"""Adapters in use: loaded when a step first needs them, side by side where rows of several meet in a call.

The base's engines take the adapters of a call as inputs (`engines.base.Engine`), so loading one, or dropping
it, touches nothing else. Per span there is a *bank*: the matrices of the adapters in use there, one below the
other. An adapter that joins goes where room is, or in the place of one that has fallen idle; those that run
stay as they are. Only when most of the bank has fallen idle the rest is put together again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
Placed = tuple[tuple[int, str], ...]  # (position in the chain, adapter id)

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
        self._held: dict[str, Pairs] = {}  # for who takes them next
        self.num_bytes = self.num_loads = self.num_reloads = self.num_evictions = 0

    def has(self, adapter_id: str) -> bool:
        """Whether an adapter is kept ready; from any thread."""
        return adapter_id in self._loaded

    def get(self, adapter_id: str) -> Pairs:
        """The adapter's matrices. Raises StoreError when its file is damaged."""
        held = self._held.pop(adapter_id, None)
        if held is not None:
            return held
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

    def keep(self, adapters: Collection[str]) -> None:
        """Forget any other adapter: no model has it any more."""
        for key in self._loaded.keys() - adapters:
            self.num_bytes -= _num_bytes(self._loaded.pop(key))
        self._dropped.intersection_update(adapters)

    def hold(self, pairs: Mapping[str, Pairs]) -> None:
        """Have matrices of adapters, whose files may be gone, ready for the next who asks; those held before
        are dropped."""
        self._held = dict(pairs)


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
        self._cache, self._chains, self._spans, self._specs = cache, chains, spans, specs
        self._banks: dict[tuple[int, int], _Bank] = {}

    def of(self, call: Call) -> dict[str, Array]:
        """Inputs by name; none for a span that takes no adapters. Raises AdapterUnavailableError."""
        span = self._spans[call.span]
        if not span.lora:
            return {}
        key = call.span, call.position
        if key not in self._banks:
            self._banks[key] = _Bank(span, self._specs[call.span], call.position, self._cache)
        return self._banks[key].inputs(call.parts, {c: self._chains[c].adapters for c, _ in call.parts})

    def stamp(self, call: Call) -> tuple[int, ...]:
        """Changes when the inputs that a call was given are no longer those of its adapters."""
        bank = self._banks.get((call.span, call.position))
        if bank is None:
            return ()
        return tuple(bank.version(self._chains[chain].adapters) for chain, _ in call.parts)

    def follow(
        self, chains: Sequence[ChainPlan], spans: Sequence[Span], specs: Sequence[Sequence[BlockSpec]]
    ) -> None:
        """Have the spans of a topology with other copies (`with_copies`): of one that is run here before and
        after, nothing changes."""
        self._chains, self._spans, self._specs = chains, spans, specs

    def forget_others(self, spans: Collection[int]) -> None:
        """Drop what is in place in other spans: they are run here no more."""
        self._banks = {key: bank for key, bank in self._banks.items() if key[0] in spans}

    def take_over(self, before: AdapterInputs, running: Iterable[Placed]) -> dict[str, Pairs]:
        """Go on with the banks of the spans that are the same as before; in steps of `before` no more.

        Returns of the adapters in its other banks those that chains of `running` adapters need, by id.
        """
        index, running = {span: i for i, span in enumerate(self._spans)}, tuple(running)
        held: dict[str, Pairs] = {}
        for (span, position), bank in before._banks.items():
            now = index.get(before._spans[span])
            if now is not None:
                self._banks[now, position] = bank
            else:
                held |= bank.loaded(running)
        return held


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
        # adapters of the blocks here -> their ranks; the least recently needed first
        self._slots: OrderedDict[Placed, slice] = OrderedDict()
        self._versions = np.zeros(0, np.int64)  # by rank that there is room for
        self._matrices = self._zeros(0)
        self._none = self._shown(0)
        self._inputs = self._none

    def _here(self, adapters: Placed) -> Placed:
        """Those of a chain's adapters that are on blocks here, by index of the block."""
        return tuple((place - self._places.start, key) for place, key in adapters if place in self._places)

    def version(self, adapters: Placed) -> int:
        """Of what lies in the slot of a chain's adapters; -1 where it has none."""
        slot = self._slots.get(self._here(adapters))
        return -1 if slot is None else int(self._versions[slot.start])

    def loaded(self, chains: Iterable[Placed]) -> dict[str, Pairs]:
        """Copies of the matrices of those of some chains' adapters that are in slots, by id."""
        found: dict[str, Pairs] = {}
        for here in {self._here(adapters) for adapters in chains} & self._slots.keys():
            slot = self._slots[here]
            for index, key in here:
                prefix = f"lora_a.{index}."
                names = [n.removeprefix(prefix) for n in self._features if n.startswith(prefix)]
                matrices = {
                    name: tuple(self._copy(f"lora_{which}.{index}.{name}", slot) for which in "ab")
                    for name in names
                }
                # zeros: it leaves the projection alone
                found[key] = {n: (a, b) for n, (a, b) in matrices.items() if bool((a != 0).any())}
        return found

    def _copy(self, name: str, slot: slice) -> Array:
        part = self._matrices[name][slot]
        own = self._arrays.rows_like(part, len(part))
        own[...] = part
        return own

    def inputs(self, parts: Sequence[tuple[int, int]], adapters: Mapping[int, Placed]) -> dict[str, Array]:
        """The inputs of a call over `parts`, (chain, rows); `adapters` by chain."""
        here = {chain: found for chain, placed in adapters.items() if (found := self._here(placed))}
        num_rows = sum(rows for _, rows in parts)
        if not here:
            return self._none | {"lora_mask": self._arrays.zeros((num_rows, 0), "activation")}
        self._bring_in(here)
        mask = np.zeros((num_rows, len(self._inputs["lora_versions"])), np.float32)
        row = 0
        for chain, rows in parts:
            if chain in here:
                mask[row : row + rows, self._slots[here[chain]]] = 1
            row += rows
        return self._inputs | {"lora_mask": self._arrays.activations(mask)}

    def _bring_in(self, chains: Mapping[int, Placed]) -> None:
        """Have the adapters of chains in slots."""
        joining: dict[Placed, dict[int, Pairs]] = {}
        for chain, found in chains.items():
            if found in self._slots:
                self._slots.move_to_end(found)
                continue
            if found in joining:  # of two chains
                continue
            try:
                joining[found] = {index: self._cache.get(key) for index, key in found}
            except StoreError as error:
                raise AdapterUnavailableError(chain, str(error)) from error
        needed = set(chains.values())
        ranks = {owner: slot.stop - slot.start for owner, slot in self._slots.items() if owner in needed}
        for owner, loaded in joining.items():
            ranks[owner] = max(len(a) for pairs in loaded.values() for a, _ in pairs.values())
        limit = self._limit(sum(ranks.values()))
        if not joining and self._end <= limit:
            return
        slots = None if self._end > limit else self._place({o: ranks[o] for o in joining}, needed, limit)
        if slots is None:  # too far apart: side by side
            self._move({owner: rank for owner, rank in ranks.items() if owner not in joining})
            slots = self._place({o: ranks[o] for o in joining}, needed, limit)
            assert slots is not None, "what is side by side leaves the rest of the limit free"
        self._make_room(max([self._end, *(slot.stop for slot in slots.values())]))
        for owner, slot in slots.items():
            self._write(slot, joining[owner])
            self._slots[owner] = slot
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
        self, joining: Mapping[Placed, int], needed: Collection[Placed], limit: int
    ) -> dict[Placed, slice] | None:
        """Slots below `limit` for adapters by their ranks, idle ones dropped as that needs; None: no room."""
        taken = dict(self._slots)
        placed = {}
        idle = [owner for owner in self._slots if owner not in needed]
        for owner, rank in joining.items():
            while (start := _gap(taken.values(), rank, limit)) is None:
                if not idle:
                    return None
                del taken[idle.pop(0)]
            placed[owner] = taken[owner] = slice(start, start + rank)
        for owner in self._slots.keys() - taken.keys():
            del self._slots[owner]
        return placed

    def _move(self, ranks: Mapping[Placed, int]) -> None:
        """Put the slots of adapters side by side, in new matrices, and drop the others."""
        old, old_slots = self._matrices, self._slots
        ends = np.cumsum([0, *ranks.values()]).tolist()
        self._slots = OrderedDict(
            (owner, slice(begin, end)) for owner, begin, end in zip(ranks, ends, ends[1:], strict=False)
        )
        self._matrices, self._versions = self._zeros(0), np.zeros(0, np.int64)
        self._make_room(ends[-1])
        for owner, slot in self._slots.items():
            for name, matrix in self._matrices.items():
                matrix[slot] = old[name][old_slots[owner]]
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
        """Write adapters, by index of their block, into their slot."""
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
