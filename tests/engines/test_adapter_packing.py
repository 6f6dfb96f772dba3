"""What the OpenVINO graphs are given of a bank of adapters computes what the whole bank does."""

from __future__ import annotations

import numpy as np
import pytest

from blockzoo.engines.base import SpanSpec
from blockzoo.engines.openvino.adapters import AdapterPacker
from blockzoo.engines.openvino.tiles import products
from blockzoo.zoo.blocks import AttnSpec, FfnSpec
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.tensors import f32_to_bf16

ATTN = AttnSpec(6, 1, 1, 5, 1e-5, RopeConfig("default", 1e4), 0, False, False, False)
FFN = FfnSpec(6, 5, 1e-5, False)
SPEC = SpanSpec((ATTN, FFN), drops_rows=True, lora=((0, ("q", "v")), (1, ("gate",))))
RANKS = {"0.q": [0, 1, 2, 6], "0.v": [0, 1, 2, 6], "1.gate": [3, 4, 5]}  # of 8: adapters 0-2, 3-5, 6, 7
OWN = [slice(0, 3), slice(3, 6), slice(6, 7)]


class Graph:
    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}
        self.bound: list[str] = []

    def __call__(self, name: str, array: np.ndarray) -> None:
        self.inputs[name] = array
        self.bound.append(name)

    def delta(self, x: np.ndarray, projection: str, kept: np.ndarray) -> np.ndarray:
        """As the graph computes it: of projections behind the drop for the kept rows alone."""
        product = next(product for product in products(SPEC) if projection in product.columns)
        found, which = self.inputs, "lora_kept_" if product.kept else "lora_"
        x = x[kept] if product.kept else x
        mask, a, b = (found[f"lora_{part}.{product.name}"] for part in ("mask", "a", "b"))
        delta = ((x[found[f"{which}rows"]] @ a) * mask) @ b
        begin = product.columns[projection]
        return np.asarray(delta.reshape(-1, product.width)[found[f"{which}back"], begin : begin + 5])


def bank(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for projection, ranks in RANKS.items():
        for which, features in (("a", 6), ("b", 5)):
            matrix = np.zeros((8, features), np.float32)
            matrix[ranks] = rng.standard_normal((len(ranks), features))
            arrays[f"lora_{which}.{projection}"] = matrix
    arrays["lora_versions"] = np.repeat([3, 4, 5, 6], [3, 3, 1, 1]) + 10 * seed
    return arrays


def mask_of(users: list[int | None]) -> np.ndarray:
    mask = np.zeros((len(users), 8), np.float32)
    for row, user in enumerate(users):
        if user is not None:
            mask[row, OWN[user]] = 1
    return mask


def give(
    packer: AdapterPacker, arrays: dict[str, np.ndarray], users: list[int | None], kept: list[int]
) -> None:
    rows = np.array(kept, np.int32)
    for name, array in (arrays | {"lora_mask": mask_of(users), "rows": rows}).items():
        packer.give(name, array)
    packer.pack()


def check(graph: Graph, given: dict[str, np.ndarray], users: list[int | None], kept: list[int]) -> None:
    x = np.random.default_rng(1).standard_normal((len(users), 6)).astype(np.float32)
    for projection in RANKS:
        a, b = given[f"lora_a.{projection}"], given[f"lora_b.{projection}"]
        expected = ((x @ a.T) * mask_of(users)) @ b
        if projection == "1.gate":
            expected = expected[kept]
        found = graph.delta(x, projection, np.array(kept))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


MIXES: list[tuple[list[int | None], list[int]]] = [
    ([None, 0, 0, None, 1, 2], [0, 2, 4]),
    ([0, 1, 2], [0, 1, 2]),
    ([None, None], [1]),
    ([2], [0]),
    ([1, None, None, None, 0], [1, 2]),
    ([0, 0, 1, 1, 2, 2], [5]),
]


@pytest.mark.parametrize("tile_ranks", [1, 4, 32])
def test_the_packed_inputs_compute_the_same(monkeypatch: pytest.MonkeyPatch, tile_ranks: int) -> None:
    monkeypatch.setattr("blockzoo.engines.openvino.tiles.TILE_RANKS", tile_ranks)
    graph = Graph()
    packer = AdapterPacker(SPEC, graph)
    given = bank(0)
    for users, kept in MIXES * 2:
        give(packer, given, users, kept)
        check(graph, given, users, kept)
    other = bank(1)
    give(packer, other, *MIXES[0])
    check(graph, other, *MIXES[0])


def test_rows_meet_the_ranks_of_their_own_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockzoo.engines.openvino.tiles.TILE_RANKS", 4)
    graph = Graph()
    give(AdapterPacker(SPEC, graph), bank(0), [0, 0, 1, 1, 2, None], [5])  # ranks 3, 3 and 1
    assert graph.inputs["lora_a.0.qkv"].shape == (2, 6, 8)  # adapters 0 and 2 on q and v; 1 leaves them alone
    assert graph.inputs["lora_b.0.qkv"].shape == (2, 8, 15)
    assert graph.inputs["lora_b.1.gate"].shape == (2, 3, 5)
    assert graph.inputs["lora_rows"].shape == (2, 3)
    assert graph.inputs["lora_kept_rows"].shape == (2, 1)


def test_only_what_changed_is_packed_again() -> None:
    graph = Graph()
    packer = AdapterPacker(SPEC, graph)
    given, none = bank(0), {name: array[:0] for name, array in bank(0).items()}
    give(packer, given, [0, 1], [0, 1])
    matrices = {
        name: array for name, array in graph.inputs.items() if name.startswith(("lora_a.", "lora_b."))
    }
    for name, array in list(packer._given.items()):
        packer.give(name, array)
    graph.bound.clear()
    packer.pack()
    assert graph.bound == []
    give(packer, given, [0, None], [0, 1])
    assert graph.bound
    assert not any(name in matrices for name in graph.bound)
    give(packer, none, [None], [0])  # no adapter is in use for a while
    assert all(graph.inputs[name].size == 0 for name in matrices)
    give(packer, given, [1], [0])
    assert all(graph.inputs[name] is matrix for name, matrix in matrices.items())


@pytest.mark.parametrize("tile_ranks", [4, 32])
def test_adapters_that_come_and_go_are_packed_as_anew(
    monkeypatch: pytest.MonkeyPatch, tile_ranks: int
) -> None:
    """Slots of a bank written over in place, between calls: exactly, as all numbers are small integers."""
    monkeypatch.setattr("blockzoo.engines.openvino.tiles.TILE_RANKS", tile_ranks)
    rng = np.random.default_rng(2)
    graph = Graph()
    packer = AdapterPacker(SPEC, graph)
    sizes = [1, 3, 2, 7, 1, 4, 2, 5, 3, 1, 6, 2]
    ends = np.cumsum([0, *sizes])
    given = {
        f"lora_{w}.{p}": np.zeros((ends[-1], 6 if w == "a" else 5), np.float32) for w in "ab" for p in RANKS
    }
    given["lora_versions"] = np.zeros(ends[-1], np.int64)
    widths = []
    for step in range(200):
        given = dict(given, lora_versions=given["lora_versions"].copy())
        for slot in rng.permutation(len(sizes))[: int(rng.integers(0, 4))].tolist() if step else range(12):
            own = slice(ends[slot], ends[slot + 1])
            for projection in RANKS:
                used = rng.random() < 0.7
                for which in "ab":
                    matrix = given[f"lora_{which}.{projection}"]
                    matrix[own] = rng.integers(1, 5, matrix[own].shape) if used else 0
            given["lora_versions"][own] = given["lora_versions"].max() + 1
        length = int(rng.integers(1, 13)) if step % 20 else 1
        slots = rng.permutation([*range(12), *[-1] * 4])[:length].tolist()
        mask = np.zeros((length, ends[-1]), np.float32)
        for row, slot in enumerate(slots):
            if slot >= 0:
                mask[row, ends[slot] : ends[slot + 1]] = 1
        kept = rng.permutation(length)[: int(rng.integers(1, length + 1))]
        fresh = Graph()
        for one, into in ((packer, graph), (AdapterPacker(SPEC, fresh), fresh)):
            for name, array in (given | {"lora_mask": mask, "rows": kept.astype(np.int32)}).items():
                one.give(name, array)
            one.pack()
            x = np.random.default_rng(step).integers(-3, 4, (length, 6)).astype(np.float32)
            for projection in RANKS:
                expected = ((x @ given[f"lora_a.{projection}"].T) * mask) @ given[f"lora_b.{projection}"]
                expected = expected[kept] if projection == "1.gate" else expected
                np.testing.assert_array_equal(into.delta(x, projection, kept), expected)
        widths.append([len(side.inputs["lora_a.0.qkv"]) for side in (graph, fresh)])
    found, anew = np.mean(widths, axis=0)
    assert found <= 3 * anew  # tiles of those that have left are given up


def test_one_that_joins_leaves_other_tiles_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockzoo.engines.openvino.tiles.TILE_RANKS", 3)
    graph = Graph()
    packer = AdapterPacker(SPEC, graph)
    given = bank(0)
    give(packer, given, [0, 1], [0, 1])
    for name in ("lora_a.0.q", "lora_b.0.q"):
        given[name][OWN[0]] = np.nan  # would be seen if it were packed again
    give(packer, given, [0, 1, 2], [0, 1])
    assert not np.isnan(graph.inputs["lora_a.0.qkv"]).any()
    assert len(graph.inputs["lora_a.0.qkv"]) == 3


def test_products_of_the_same_ranks_share_a_mask() -> None:
    graph = Graph()
    spec = SpanSpec((ATTN, FFN), drops_rows=False, lora=((1, ("gate", "up")),))
    packer = AdapterPacker(spec, graph)
    matrix = f32_to_bf16(np.ones((8, 5), np.float32))
    wide = f32_to_bf16(np.ones((8, 6), np.float32))
    for name in ("gate", "up"):
        packer.give(f"lora_a.1.{name}", wide)
        packer.give(f"lora_b.1.{name}", matrix)
    packer.give("lora_mask", f32_to_bf16(mask_of([0, 1])))
    packer.give("lora_versions", bank(0)["lora_versions"])
    packer.pack()
    assert graph.inputs["lora_mask.1.gate"] is graph.inputs["lora_mask.1.up"]
    assert graph.inputs["lora_mask.1.gate"].dtype == np.uint16
