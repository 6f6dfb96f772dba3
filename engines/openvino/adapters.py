"""Adapters as OpenVINO graphs take them: only the rows and the ranks that do something.

An engine is given one bank for all rows and all projections (`engines.base.Engine`): most of it is zeros
where tenants mix. The products cost rows times ranks, so the graph has inputs of its own, made from what is
bound whenever that changes (not every step):

    lora_rows    int32 [N]    the rows of the call that use an adapter, and one that does not if there is one
    lora_back    int32 [T]    where in lora_rows each row of the call stands
    lora_mask.<i>.<projection>    precision [N, Q']     of these rows and the Q' ranks of the projection
    lora_a.<i>.<projection>       precision [Q', in]
    lora_b.<i>.<projection>       precision [Q', out]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Lora = tuple[tuple[int, tuple[str, ...]], ...]
"""`SpanSpec.lora`."""


class AdapterPacker:
    """Between the adapter inputs that an engine is given and those of its graph.

    Args:
        lora: by index of a block in the span, the projections that take adapters.
        bind: hands an array to the graph's input of a name, and keeps both alive.
    """

    def __init__(self, lora: Lora, bind: Callable[[str, np.ndarray], None]) -> None:
        self._projections = [f"{index}.{name}" for index, names in lora for name in names]
        self._bind = bind
        self._given: dict[str, np.ndarray] = {}
        self._ranks: dict[str, np.ndarray] = {}  # by projection, the ranks of the bank that it has
        self._changed: set[str] = set()

    def takes(self, name: str) -> bool:
        """Whether an input of an engine is one of its adapters'."""
        return name.startswith("lora_")

    def give(self, name: str, array: np.ndarray) -> None:
        """Note an input as it is bound to the engine; its contents stay until another one is bound."""
        if self._given.get(name) is not array:
            self._given[name] = array
            self._changed.add(name)

    def pack(self) -> None:
        """Bring the graph's inputs up to date, where anything has changed."""
        if not self._changed:
            return
        for projection in self._projections:
            if {f"lora_a.{projection}", f"lora_b.{projection}"} & self._changed:
                self._pack_matrices(projection)
        self._pack_masks(self._given["lora_mask"])
        self._changed.clear()

    def _pack_matrices(self, projection: str) -> None:
        a, b = (self._given[f"lora_{which}.{projection}"] for which in "ab")
        ranks = np.flatnonzero(a.any(axis=1) & b.any(axis=1))
        whole = len(ranks) == len(a)
        self._ranks[projection] = ranks
        self._bind(f"lora_a.{projection}", a if whole else a[ranks])
        self._bind(f"lora_b.{projection}", b if whole else b[ranks])

    def _pack_masks(self, mask: np.ndarray) -> None:
        uses = mask.any(axis=1)
        rows = np.flatnonzero(uses)
        back = np.cumsum(uses) - 1
        if not uses.all():  # all rows without an adapter stand at one of them, whose mask is zeros
            back[~uses] = len(rows)
            rows = np.append(rows, np.argmin(uses))
        self._bind("lora_rows", rows.astype(np.int32))
        self._bind("lora_back", back.astype(np.int32))
        mask = mask[rows]
        packed: dict[bytes, np.ndarray] = {}  # projections with the same ranks share one
        for projection in self._projections:
            ranks = self._ranks[projection]
            key = ranks.tobytes()
            if key not in packed:
                packed[key] = np.ascontiguousarray(mask[:, ranks])
            self._bind(f"lora_mask.{projection}", packed[key])
