"""Adapters as OpenVINO graphs take them: only the rows and the ranks that do something.

An engine is given one bank for all rows and all projections (`engines.base.Engine`). Where tenants mix, most
of the products of all rows with all ranks would be masked away, so the adapters in use are dealt out to
*tiles* of a few ranks each: a row meets only those of its own tile. The graph has inputs of its own, made
from what is bound whenever that changes (not every step), with S tiles, each of R rows and of Q' ranks:

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
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from blockzoo.engines.base import SpanSpec
from blockzoo.zoo.blocks import AttnSpec, tensor_shapes

TILE_RANKS = 32
"""Adapters share a tile up to this many ranks: smaller tiles waste less, but each costs microseconds."""


class Product(NamedTuple):
    """One pair of products of a block with adapters.

    Attributes:
        name: `<block>.<product>`, as in the graph's inputs.
        columns: by projection that it covers, `<block>.<projection>`, where its outputs begin.
        depth, width: inputs and outputs.
        kept: whether only the kept rows reach it.
    """

    name: str
    columns: dict[str, int]
    depth: int
    width: int
    kept: bool


def products(spec: SpanSpec) -> list[Product]:
    """What the adapters of a span take."""
    found = []
    last = max((i for i, block in enumerate(spec.specs) if isinstance(block, AttnSpec)), default=-1)
    for index, names in spec.lora:
        block = spec.specs[index]
        if isinstance(block, AttnSpec):
            q, kv = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
            starts = {"q": 0, "k": q, "v": q + kv}
            columns = {f"{index}.{name}": start for name, start in starts.items() if name in names}
            if columns:
                found.append(Product(f"{index}.qkv", columns, block.hidden_size, q + 2 * kv, False))
        for name in names:
            if name in "qkv":
                continue
            # behind the last attention, the rows that nobody needs have left
            kept = spec.drops_rows and (index > last or (index == last and name == "o"))
            width, depth = tensor_shapes(block)[name]
            found.append(Product(f"{index}.{name}", {f"{index}.{name}": 0}, depth, width, kept))
    return found


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Adapters dealt out to tiles.

    Attributes:
        tile_of: by adapter.
        ranks: by product and tile, the ranks of the bank that have a part in it.
        matrices: the graph's inputs that hold them.
    """

    tile_of: np.ndarray
    ranks: dict[str, list[np.ndarray]]
    matrices: dict[str, np.ndarray]


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
        self._bank: list[np.ndarray] = []  # whose adapters are in tiles
        self._users: dict[bytes, int] = {}  # those adapters: row of the mask -> number
        self._tiles: _Tiles | None = None
        self._nothing: _Tiles | None = None
        self._bound: _Tiles | None = None

    def takes(self, name: str) -> bool:
        """Whether an input of an engine is one of its adapters'."""
        return name.startswith("lora_")

    def give(self, name: str, array: np.ndarray) -> None:
        """Note an input (or `rows`) as it is bound to the engine; its contents stay until another one is."""
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
            tiles = self._tiles_for(mask)
        else:
            tiles = self._nothing = self._nothing or self._dealt([])
        if tiles is not self._bound:
            self._bound = tiles
            for name, matrix in tiles.matrices.items():
                self._bind(name, matrix)
        users = [self._users[row.tobytes()] if row.any() else -1 for row in mask]
        tile_of = np.append(tiles.tile_of, -1)[users]
        for kept in sorted({product.kept for product in self._products}):
            rows = self._given["rows"] if kept else np.arange(len(mask))
            self._place(tiles, tile_of[rows], mask[rows], kept)
        self._changed = False

    def _tiles_for(self, mask: np.ndarray) -> _Tiles:
        """Those of the adapters that the mask knows, and that others knew since the bank changed."""
        bank = [
            array for name, array in sorted(self._given.items()) if name.startswith(("lora_a.", "lora_b."))
        ]
        if any(array is not known for array, known in zip_longest(bank, self._bank)):
            self._bank, self._tiles = bank, None
            self._users.clear()
        known = len(self._users)
        for row in mask:
            if row.any():
                self._users.setdefault(row.tobytes(), len(self._users))
        if self._tiles is None or len(self._users) > known:
            self._tiles = self._dealt([np.flatnonzero(np.frombuffer(key, mask.dtype)) for key in self._users])
        return self._tiles

    def _dealt(self, users: Sequence[np.ndarray]) -> _Tiles:
        """Adapters (their ranks in the bank) in tiles: the largest first, each where fewest ranks are."""
        count = max(1, -(-sum(map(len, users)) // TILE_RANKS))
        tiles: list[list[np.ndarray]] = [[] for _ in range(min(count, max(1, len(users))))]
        tile_of = np.zeros(len(users), np.int64)
        for user in sorted(range(len(users)), key=lambda user: -len(users[user])):
            tile_of[user] = min(range(len(tiles)), key=lambda tile: sum(map(len, tiles[tile])))
            tiles[tile_of[user]].append(users[user])
        none = np.zeros(0, np.int64)
        return self._packed(tile_of, [np.concatenate([none, *tile]) for tile in tiles])

    def _packed(self, tile_of: np.ndarray, tiles: Sequence[np.ndarray]) -> _Tiles:
        found: dict[str, list[np.ndarray]] = {}
        matrices = {}
        for product in self._products:
            parts = [self._parts(product, ranks) for ranks in tiles]
            found[product.name] = [np.concatenate([ranks for _, _, ranks in part]) for part in parts]
            most = max(map(len, found[product.name]))
            dtype = self._given["lora_mask"].dtype
            packed_a = np.zeros((len(tiles), product.depth, most), dtype)
            packed_b = np.zeros((len(tiles), most, product.width), dtype)
            for tile, part in enumerate(parts):
                end = 0
                for projection, column, ranks in part:
                    begin, end = end, end + len(ranks)
                    a, b = (self._given[f"lora_{which}.{projection}"] for which in "ab")
                    packed_a[tile, :, begin:end] = a[ranks].T
                    packed_b[tile, begin:end, column : column + b.shape[1]] = b[ranks]
            matrices[f"lora_a.{product.name}"], matrices[f"lora_b.{product.name}"] = packed_a, packed_b
        return _Tiles(tile_of, found, matrices)

    def _parts(self, product: Product, ranks: np.ndarray) -> list[tuple[str, int, np.ndarray]]:
        """By projection of the product, where its outputs begin, and those of the ranks that change it."""
        found = []
        for projection, column in product.columns.items():
            a, b = (self._given[f"lora_{which}.{projection}"][ranks] for which in "ab")
            found.append((projection, column, ranks[a.any(axis=1) & b.any(axis=1)]))
        return found

    def _place(self, tiles: _Tiles, tile_of: np.ndarray, mask: np.ndarray, kept: bool) -> None:
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
        masks: dict[tuple[bytes, ...], np.ndarray] = {}  # products with the same ranks share one
        for name in reached:
            ranks = tiles.ranks[name]
            key = tuple(own.tobytes() for own in ranks)
            if key not in masks:
                masks[key] = _tiled(mask, members, ranks, num_rows)
            self._bind(f"lora_mask.{name}", masks[key])


def _tiled(
    mask: np.ndarray, members: Sequence[np.ndarray], ranks: Sequence[np.ndarray], num_rows: int
) -> np.ndarray:
    """[tiles, num_rows, most ranks]: of each tile the mask of its rows and ranks."""
    out = np.zeros((len(members), num_rows, max(map(len, ranks))), mask.dtype)
    for tile, (rows, columns) in enumerate(zip(members, ranks, strict=True)):
        out[tile, : len(rows), : len(columns)] = mask[np.ix_(rows, columns)]
    return out
