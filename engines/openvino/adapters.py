"""Adapters as OpenVINO graphs take them: only the rows and the ranks that do something.

An engine is given one bank for all rows and all projections (`engines.base.Engine`). Where tenants mix, most
of the products of all rows with all ranks would be masked away, so the adapters in use are dealt out to
*tiles* of a few ranks each (`tiles`): a row meets only those of its own tile. The graph has inputs of its
own, made from what is bound whenever that changes (not every step), with S tiles, each of R rows and of Q'
ranks:

    lora_rows    int32 [S, R]    the rows of the call that use an adapter of the tile, filled up with any row
    lora_back    int32 [T]       where in lora_rows, flat, each row of the call stands; those that use no
                                 adapter stand where it is filled up: the mask is zeros there
    lora_mask.<i>.<product>    precision [S, R, Q']
    lora_a.<i>.<product>       precision [S, in, Q']
    lora_b.<i>.<product>       precision [S, Q', out]

A product is a projection, or `qkv`: q, k and v side by side, as the base computes them. Most of its B is
zeros, which cost less than the ten operators that they spare. `lora_kept_rows` and `lora_kept_back` are the
same for products behind the place where rows leave: they, and the masks there, count the rows that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from blockzoo.engines.base import SpanSpec
from blockzoo.engines.openvino.tiles import Tiles, products


class AdapterPacker:
    """Between the adapter inputs that an engine is given and those of its graph.

    Args:
        spec: of the engine's span.
        bind: hands an array to the graph's input of a name, and keeps both alive.
    """

    def __init__(self, spec: SpanSpec, bind: Callable[[str, np.ndarray], None]) -> None:
        self._products = products(spec)
        self._bind = bind
        self._given: dict[str, np.ndarray] = {}
        self._changed = False
        self._tiles: Tiles | None = None
        self._nothing: Tiles | None = None
        self._bound: dict[str, np.ndarray] = {}  # the matrices

    def takes(self, name: str) -> bool:
        """Whether an input of an engine is one of its adapters'."""
        return name.startswith("lora_")

    def give(self, name: str, array: np.ndarray) -> None:
        """Note an input (or `rows`) as it is bound to the engine; see `engines.base.Engine`."""
        if self._products and self._given.get(name) is not array:
            self._given[name] = array
            self._changed = True

    def pack(self) -> None:
        """Bring the graph's inputs up to date, where anything has changed."""
        if not self._changed:
            return
        mask = self._given["lora_mask"]
        # where no adapter is in use, those in tiles stay there for when they come back
        if mask.any():
            tiles = self._tiles = self._tiles or Tiles(self._products, mask.dtype)
            tile_of = self._bring_in(tiles, mask)
        else:
            tiles = self._nothing = self._nothing or Tiles(self._products, mask.dtype)
            tile_of = np.full(len(mask), -1)
        for name, matrix in tiles.matrices.items():
            if self._bound.get(name) is not matrix:
                self._bound[name] = matrix
                self._bind(name, matrix)
        for kept in sorted({product.kept for product in self._products}):
            rows = self._given["rows"] if kept else np.arange(len(mask))
            self._place(tiles, tile_of[rows], mask[rows], kept)
        self._changed = False

    def _bring_in(self, tiles: Tiles, mask: np.ndarray) -> np.ndarray:
        """Have the adapters that the mask knows in tiles; the tile of each row, -1 without an adapter."""
        versions = self._given["lora_versions"]
        ranks = {key: np.flatnonzero(row) for row in mask if (key := row.tobytes()) and row.any()}
        names = {key: versions[own].tobytes() for key, own in ranks.items()}
        tiles.bring_in({names[key]: own for key, own in ranks.items()}, versions, self._given)
        found = {key: tiles.tile_of(name) for key, name in names.items()}
        return np.array([found.get(row.tobytes(), -1) for row in mask])

    def _place(self, tiles: Tiles, tile_of: np.ndarray, mask: np.ndarray, kept: bool) -> None:
        """Bind what says where each row stands, given the rows' tiles (-1: none)."""
        reached = [product.name for product in self._products if product.kept == kept]
        members = [np.flatnonzero(tile_of == tile) for tile in range(len(tiles.ranks[reached[0]]))]
        counts = [len(rows) for rows in members]
        bare = tile_of < 0
        num_rows = max(counts)
        if bare.any() and sum(counts) == num_rows * len(counts):
            num_rows += 1
        rows = np.full((len(members), num_rows), np.argmax(bare), np.int32)
        filled_up = int(np.argmin(counts))
        back = np.full(len(tile_of), filled_up * num_rows + counts[filled_up], np.int32)
        for tile, own in enumerate(members):
            rows[tile, : len(own)] = own
            back[own] = tile * num_rows + np.arange(len(own))
        prefix = "lora_kept_" if kept else "lora_"
        self._bind(f"{prefix}rows", rows)
        self._bind(f"{prefix}back", back)
        masks: dict[tuple[int, tuple[bytes, ...]], np.ndarray] = {}  # products with the same ranks share one
        for name in reached:
            ranks = tiles.ranks[name]
            width = tiles.matrices[f"lora_a.{name}"].shape[2]
            key = width, tuple(own.tobytes() for own in ranks)
            if key not in masks:
                masks[key] = _tiled(mask, members, ranks, (num_rows, width))
            self._bind(f"lora_mask.{name}", masks[key])


def _tiled(
    mask: np.ndarray, members: Sequence[np.ndarray], ranks: Sequence[np.ndarray], shape: tuple[int, int]
) -> np.ndarray:
    """[tiles, *shape]: of each tile the mask of its rows and ranks."""
    out = np.zeros((len(members), *shape), mask.dtype)
    for tile, (rows, columns) in enumerate(zip(members, ranks, strict=True)):
        out[tile, : len(rows), : len(columns)] = mask[np.ix_(rows, columns)]
    return out
