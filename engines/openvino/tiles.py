"""Adapters dealt out to tiles of a few ranks each, and the matrices of all tiles.

A tile is what its rows are multiplied with; adapters come to it and leave it while the others stay as they
are packed, so that a new one costs no more than a tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from blockzoo.engines.base import SpanSpec
from blockzoo.zoo.blocks import AttnSpec, tensor_shapes

TILE_RANKS = 32
"""Adapters share a tile up to this many ranks: smaller tiles waste less, but each costs microseconds."""

_MAX_IDLE = 2  # adapters of more than this many times the ranks in use are not kept packed


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


@dataclass(slots=True, eq=False)
class _User:
    """An adapter in a tile: its ranks in the bank, and their versions when it was packed."""

    ranks: np.ndarray
    version: bytes
    tile: int = -1


class Tiles:
    """Adapters in tiles.

    Args:
        products: of the span.
        dtype: of activations.

    Attributes:
        ranks: by product and tile, the ranks of the bank in the order in which they lie there.
        matrices: the graph's inputs `lora_a.<product>` and `lora_b.<product>`. An array that stays the same
            may have new contents.
    """

    def __init__(self, products: Sequence[Product], dtype: np.dtype[Any]) -> None:
        self._products, self._dtype = products, dtype
        self._users: dict[bytes, _User] = {}  # by version
        self._members: list[list[_User]] = [[]]  # by tile; there is always one
        self._room: dict[str, np.ndarray] = {}  # the matrices, with room for tiles to come
        self.ranks: dict[str, list[np.ndarray]] = {}
        self.matrices: dict[str, np.ndarray] = {}
        none = np.zeros(0, np.int64)
        for product in products:
            self.ranks[product.name] = [none]
            self._resize(product, 1, 0)
        self._show()

    def tile_of(self, version: bytes) -> int:
        """The tile of an adapter that was brought in."""
        return self._users[version].tile

    def bring_in(
        self, wanted: Mapping[bytes, np.ndarray], versions: np.ndarray, bank: Mapping[str, np.ndarray]
    ) -> None:
        """Have the adapters that are wanted in tiles.

        Args:
            wanted: ranks by version, `versions[ranks]`.
            versions: int64 [Q], of the bank's ranks now.
            bank: the engine's inputs `lora_a.<projection>` and `lora_b.<projection>`.
        """
        gone = [user for user in self._users.values() if _version(versions, user.ranks) != user.version]
        dirty = self._drop(gone)
        in_use = sum(map(len, wanted.values()))
        known = sum(len(user.ranks) for user in self._users.values() if user.version not in wanted)
        if known > (_MAX_IDLE - 1) * in_use:
            dirty |= self._drop([user for user in self._users.values() if user.version not in wanted])
            if len(self._members) > _MAX_IDLE * max(1, -(-in_use // TILE_RANKS)):  # few in each: deal anew
                dirty |= self._drop(list(self._users.values()))
        new = [_User(ranks, key) for key, ranks in wanted.items() if key not in self._users]
        for user in sorted(new, key=lambda user: -len(user.ranks)):  # the largest first
            self._users[user.version] = user
            dirty |= self._deal(user)
        while len(self._members) > 1 and not self._members[-1]:
            self._members.pop()
        self._pack([tile for tile in sorted(dirty) if tile < len(self._members)], bank)

    def _drop(self, users: Sequence[_User]) -> set[int]:
        """Take adapters out; the tiles to pack."""
        for user in users:
            del self._users[user.version]
            self._members[user.tile].remove(user)
        return {user.tile for user in users}

    def _load(self, tile: int) -> int:
        return sum(len(user.ranks) for user in self._members[tile])

    def _deal(self, user: _User) -> set[int]:
        """Put an adapter where fewest ranks are; the tiles to pack."""
        emptiest = min(range(len(self._members)), key=self._load)
        if not self._members[emptiest] or self._load(emptiest) + len(user.ranks) <= TILE_RANKS:
            self._put(user, emptiest)
            return {emptiest}
        fullest = max(range(len(self._members)), key=self._load)
        added = len(self._members)
        self._members.append([])
        self._put(user, added)
        dirty = {added}
        while True:  # rows spread over both: share them
            moved = min(self._members[fullest], key=lambda other: len(other.ranks))
            if self._load(fullest) - self._load(added) <= len(moved.ranks):
                return dirty
            self._members[fullest].remove(moved)
            self._put(moved, added)
            dirty.add(fullest)

    def _put(self, user: _User, tile: int) -> None:
        self._members[tile].append(user)
        user.tile = tile

    def _pack(self, tiles: Sequence[int], bank: Mapping[str, np.ndarray]) -> None:
        none = np.zeros(0, np.int64)
        for product in self._products:
            ranks = self.ranks[product.name]
            ranks += [none] * (len(self._members) - len(ranks))
            del ranks[len(self._members) :]
            parts = {
                tile: _parts(
                    product, np.concatenate([none, *(user.ranks for user in self._members[tile])]), bank
                )
                for tile in tiles
            }
            for tile, part in parts.items():
                ranks[tile] = np.concatenate([none, *(own for _, _, own in part)])
            self._resize(product, len(ranks), max(map(len, ranks)))
            packed_a, packed_b = (self._room[f"lora_{which}.{product.name}"] for which in "ab")
            for tile, part in parts.items():
                packed_a[tile], packed_b[tile], end = 0, 0, 0
                for projection, column, own in part:
                    begin, end = end, end + len(own)
                    a, b = (bank[f"lora_{which}.{projection}"] for which in "ab")
                    packed_a[tile, :, begin:end] = a[own].T
                    packed_b[tile, begin:end, column : column + b.shape[1]] = b[own]
        self._show()

    def _resize(self, product: Product, tiles: int, width: int) -> None:
        """Have room for so many tiles of so many ranks; widths of a product never shrink."""
        names = f"lora_a.{product.name}", f"lora_b.{product.name}"
        old_a, old_b = (self._room.get(name) for name in names)
        if old_a is None or old_b is None:
            old_a = np.zeros((0, product.depth, 0), self._dtype)
            old_b = np.zeros((0, 0, product.width), self._dtype)
        room, old_width = len(old_a), old_a.shape[2]
        if tiles <= room and width <= old_width and self._room.get(names[0]) is not None:
            return
        width, room = max(width, old_width), room if tiles <= room else 1 << (tiles - 1).bit_length()
        a = np.zeros((room, product.depth, width), self._dtype)
        b = np.zeros((room, width, product.width), self._dtype)
        a[: len(old_a), :, :old_width], b[: len(old_b), :old_width] = old_a, old_b
        self._room[names[0]], self._room[names[1]] = a, b

    def _show(self) -> None:
        """`matrices`: those of the tiles in use; where nothing was resized they stay the same arrays."""
        for name, room in self._room.items():
            shown = self.matrices.get(name)
            if shown is None or shown.base is not room or len(shown) != len(self._members):
                self.matrices[name] = room[: len(self._members)]


def _version(versions: np.ndarray, ranks: np.ndarray) -> bytes | None:
    """Of ranks of the bank; None where it has fewer."""
    return versions[ranks].tobytes() if ranks[-1] < len(versions) else None


def _parts(
    product: Product, ranks: np.ndarray, bank: Mapping[str, np.ndarray]
) -> list[tuple[str, int, np.ndarray]]:
    """By projection of the product, where its outputs begin, and those of the ranks that change it."""
    found = []
    for projection, column in product.columns.items():
        a, b = (bank[f"lora_{which}.{projection}"][ranks] for which in "ab")
        found.append((projection, column, ranks[a.any(axis=1) & b.any(axis=1)]))
    return found
