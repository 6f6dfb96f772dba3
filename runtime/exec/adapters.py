"""Adapters in use: loaded when a step first needs them, side by side where rows of several meet in a call.

The base's engines take the adapters of a call as inputs (`engines.base.Engine`), so loading one, or dropping
it, touches nothing else. Per span there is a *bank*: the matrices of the adapters in use there, one below the
other. It is put together again when an adapter that is not in it is needed, or when most of it has fallen
idle, and stays as it is in between.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from blockzoo.engines.adapters import lora_matrices
from blockzoo.engines.arrays import Array, Arrays
from blockzoo.runtime.api.errors import RequestError
from blockzoo.runtime.exec.calls import Call
from blockzoo.runtime.exec.topology import ChainPlan, Span
from blockzoo.zoo.blocks import Adapter, BlockSpec, tensor_shapes
from blockzoo.zoo.errors import StoreError

Pairs = dict[str, tuple[Array, Array]]  # by projection: A [rank, in], B [rank, out], as activations

_MAX_IDLE = 2  # a bank of more than this many times the rank in use is put together again


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
        self.num_bytes = self.num_loads = self.num_evictions = 0

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
        self.num_bytes += _num_bytes(pairs)
        while self.num_bytes > self._budget:
            _, oldest = self._loaded.popitem(last=False)
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


class _Bank:
    """The adapters in use at one place of the chains."""

    def __init__(self, span: Span, specs: Sequence[BlockSpec], position: int, cache: AdapterCache) -> None:
        self._cache, self._arrays = cache, cache.arrays
        self._places = range(position, position + len(span.block_ids))
        self._shapes = {  # (index in the span, projection) -> (out, in)
            (index, name): tensor_shapes(specs[index])[name] for index, names in span.lora for name in names
        }
        self._slots: dict[int, slice] = {}  # chain -> its part of the ranks
        self._rank = 0
        self._none = self._packed({}, 0)
        self._inputs = self._none

    def inputs(
        self, parts: Sequence[tuple[int, int]], adapters: dict[int, tuple[tuple[int, str], ...]]
    ) -> dict[str, Array]:
        """The inputs of a call over `parts`, (chain, rows); `adapters` by chain."""
        here = {
            chain: {place - self._places.start: key for place, key in found if place in self._places}
            for chain, found in adapters.items()
        }
        here = {chain: found for chain, found in here.items() if found}
        num_rows = sum(count for _, count in parts)
        if not here:
            return self._none | {"lora_mask": self._arrays.zeros((num_rows, 0), "activation")}
        self._bring_in(here)
        mask = np.zeros((num_rows, self._rank), np.float32)
        row = 0
        for chain, count in parts:
            if chain in here:
                mask[row : row + count, self._slots[chain]] = 1
            row += count
        return self._inputs | {"lora_mask": self._arrays.activations(mask)}

    def _bring_in(self, needed: dict[int, dict[int, str]]) -> None:
        """Put the bank together again if a chain is missing or too many are idle; by chain and index, ids."""
        in_use = sum(slot.stop - slot.start for chain, slot in self._slots.items() if chain in needed)
        if needed.keys() <= self._slots.keys() and self._rank <= _MAX_IDLE * in_use:
            return
        loaded: dict[int, dict[int, Pairs]] = {}
        for chain, found in needed.items():
            try:
                loaded[chain] = {index: self._cache.get(key) for index, key in found.items()}
            except StoreError as error:
                raise AdapterUnavailableError(chain, str(error)) from error
        self._slots, self._rank = {}, 0
        for chain, matrices in loaded.items():
            rank = max(len(a) for pairs in matrices.values() for a, _ in pairs.values())
            self._slots[chain] = slice(self._rank, self._rank + rank)
            self._rank += rank
        if self._arrays.records:  # few shapes, so that steps repeat them
            self._rank = 1 << (self._rank - 1).bit_length()
        self._inputs = self._packed(loaded, self._rank)

    def _packed(self, loaded: dict[int, dict[int, Pairs]], rank: int) -> dict[str, Array]:
        """Every A and B of the span with the chains' matrices in their slots."""
        packed = {}
        for (index, name), (out_features, in_features) in self._shapes.items():
            a = self._arrays.zeros((rank, in_features), "activation")
            b = self._arrays.zeros((rank, out_features), "activation")
            for chain, found in loaded.items():
                pair = found.get(index, {}).get(name)
                if pair is not None:
                    begin = self._slots[chain].start
                    end = begin + len(pair[0])
                    a[begin:end], b[begin:end] = pair
            packed[f"lora_a.{index}.{name}"], packed[f"lora_b.{index}.{name}"] = a, b
        return packed


def _num_bytes(pairs: Pairs) -> int:
    return sum(matrix.nbytes for pair in pairs.values() for matrix in pair)
