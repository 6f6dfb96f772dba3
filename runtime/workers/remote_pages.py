"""The pages of one pool, where they lie in workers, as the head works on them.

What it copies or has taken over stays where it is: only integers are sent. What it looks at, keeps or loads
comes and goes, some pages at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from blockzoo.engines.arrays import Arrays
from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.approx.state import Borrowed
from blockzoo.runtime.exec.kv_tensors import KVTensors
from blockzoo.runtime.exec.topology import Family
from blockzoo.runtime.workers.group import WorkerGroup
from blockzoo.runtime.workers.kv_orders import pack_borrow
from blockzoo.runtime.workers.wire import STEP

_MOST_PAGES = 64
"""Read or written at a time."""

Take = Callable[[int, np.ndarray, np.ndarray], None]
"""(step, pages, owners): pages belong to these workers from now on."""


class RemotePages(KVTensors):
    """See `KVTensors`, whose place it takes.

    Args:
        family: of the models.
        num_pages: of its pool.
        number: of the family in messages.
        arrays: of a maker of engines like the workers'.
        group: the workers.
        owners: by page, the worker that has it, int8; whoever holds it changes it.
        take: changes owners.
        layer_homes: by chain, the worker of each layer, int8, as it is now.

    What asks or answers raises KVLostError where a worker cannot answer any more.
    """

    def __init__(
        self,
        family: Family,
        num_pages: int,
        number: int,
        arrays: Arrays,
        group: WorkerGroup,
        owners: np.ndarray,
        take: Take,
        layer_homes: Callable[[], Mapping[int, np.ndarray]],
    ) -> None:
        shape = (1, family.num_kv_heads, family.head_dim)  # one: what a page is like
        pool = {name: arrays.pages(*shape) for name in ("key_cache", "value_cache")}
        super().__init__(pool, num_pages, {}, arrays)
        self._number, self._group, self._owners = number, group, owners
        self._take, self._layer_homes, self._head_dim = take, layer_homes, family.head_dim

    def copy(self, source: np.ndarray, destination: np.ndarray) -> None:
        """Copy pages of K and V, int32 [n] each, each where it lies."""
        source, destination = self._checked(source), self._checked(destination)
        step = self._group.next_step()
        owners = self._owners[source]
        self._take(step, destination, owners)
        for worker, mine in _by_worker(owners):
            self._send(worker, b"copy", step, np.stack([source[mine], destination[mine]]))

    def borrow(self, chain: int, borrowed: Borrowed, page_table: np.ndarray) -> None:
        """See `KVTensors.borrow`: each worker copies what lies in the layers that it has."""
        pages = self._checked(borrowed.pages)
        targets = self._checked(page_table[:, borrowed.positions // PAGE_TOKENS])
        homes, step = self._layer_homes()[chain], self._group.next_step()
        self._take(step, targets.ravel(), np.repeat(homes, targets.shape[1]))
        for worker, mine in _by_worker(homes):
            own = borrowed._replace(pages=pages[mine])
            which = STEP.pack(step, 0, self._number)
            self._group.send(worker, b"borrow", which, pack_borrow(chain, own, targets[mine]))

    def values(self, pages: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `KVTensors.values`."""
        wanted = self._checked(pages[..., positions // PAGE_TOKENS])
        slots = np.broadcast_to(positions % PAGE_TOKENS, wanted.shape).ravel()
        heads, width = self.page_shape[0], self._head_dim
        found = np.empty((wanted.size, heads, width), np.float32)
        step, asked = self._group.next_step(), {}
        for worker, mine in _by_worker(self._owners[wanted.ravel()]):
            self._send(worker, b"values", step, np.stack([wanted.ravel()[mine], slots[mine]]))
            asked[worker] = mine
        for worker, (frame,) in self._answers(step, asked):
            found[asked[worker]] = np.frombuffer(frame, np.float32).reshape(-1, heads, width)
        return found.reshape(*wanted.shape, heads, width)

    def read(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `KVTensors.read`."""
        wanted = self._checked(pages).ravel()
        found = [np.empty((wanted.size, *self.page_shape), self.page_dtype) for _ in range(2)]
        for worker, mine in _by_worker(self._owners[wanted]):
            for piece in _pieces(mine):
                step = self._group.next_step()
                self._send(worker, b"read", step, wanted[piece])
                for _, frames in self._answers(step, [worker]):
                    for whole, frame in zip(found, frames, strict=True):
                        whole[piece] = np.frombuffer(frame, self.page_dtype).reshape(-1, *self.page_shape)
        keys, values = (whole.reshape(*pages.shape, *self.page_shape) for whole in found)
        return keys, values

    def fill(
        self, chain: int, first_layer: int, pages: np.ndarray, keys: np.ndarray, values: np.ndarray
    ) -> None:
        """See `KVTensors.fill`."""
        wanted = self._checked(pages)
        homes = self._layer_homes()[chain][first_layer : first_layer + len(wanted)]
        owners = np.repeat(homes, wanted.shape[1])
        self._take(self._group.next_step(), wanted.ravel(), owners)
        contents = [each.reshape(wanted.size, *self.page_shape) for each in (keys, values)]
        for worker, mine in _by_worker(owners):
            for piece in _pieces(mine):
                step, parts = self._group.next_step(), [each[piece].data for each in contents]
                self._send(worker, b"write", step, wanted.ravel()[piece], *parts)
                for _ in self._answers(step, [worker]):  # so that no more than this is under way
                    pass

    def _send(self, worker: int, kind: bytes, step: int, ints: np.ndarray, *more: memoryview) -> None:
        which = STEP.pack(step, 0, self._number)
        self._group.send(worker, kind, which, ints.astype(np.int32).tobytes(), *more)

    def _answers(self, step: int, asked: Any) -> Iterator[tuple[int, list[bytes]]]:
        """What some workers answer, each once."""
        open_workers = set(asked)
        answers = self._group.answers(open_workers)
        while open_workers:
            worker, kind, what = next(answers)
            if kind == "kv" and what["step"] == step:
                open_workers.discard(worker)
                yield worker, what["frames"]


def _by_worker(owners: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each worker among owners int8 [n], and where it is: int64 [m]."""
    for worker in np.unique(owners).tolist():
        yield worker, np.flatnonzero(owners == worker)


def _pieces(indices: np.ndarray) -> list[np.ndarray]:
    return [indices[begin : begin + _MOST_PAGES] for begin in range(0, indices.size, _MOST_PAGES)]
