"""What the OpenVINO graphs are given of a bank of adapters computes what the whole bank does."""

from __future__ import annotations

import numpy as np
import pytest

from blockzoo.engines.base import SpanSpec
from blockzoo.engines.openvino.adapters import AdapterPacker, only_kept_rows
from blockzoo.zoo.blocks import AttnSpec, FfnSpec
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.tensors import f32_to_bf16

ATTN = AttnSpec(6, 1, 1, 5, 1e-5, RopeConfig("default", 1e4), 0, False, False, False)
FFN = FfnSpec(6, 5, 1e-5, False)
SPEC = SpanSpec((ATTN, FFN), drops_rows=True, lora=((0, ("q", "v")), (1, ("down",))))
RANKS = {"0.q": [0, 1, 2, 6], "0.v": [0, 1, 2, 6], "1.down": [3, 4, 5]}  # of 8: adapters 0-2, 3-5, 6, 7
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
        found, which = self.inputs, "lora_"
        if only_kept_rows(SPEC, int(projection[0]), projection[2:]):
            x, which = x[kept], "lora_kept_"
        mask, a, b = (found[f"lora_{part}.{projection}"] for part in ("mask", "a", "b"))
        delta = ((x[found[f"{which}rows"]] @ a) * mask) @ b
        return np.asarray(delta.reshape(-1, delta.shape[-1])[found[f"{which}back"]])


def bank(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for projection, ranks in RANKS.items():
        for which, features in (("a", 6), ("b", 5)):
            matrix = np.zeros((8, features), np.float32)
            matrix[ranks] = rng.standard_normal((len(ranks), features))
            arrays[f"lora_{which}.{projection}"] = matrix
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
        if projection == "1.down":
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
    monkeypatch.setattr("blockzoo.engines.openvino.adapters.TILE_RANKS", tile_ranks)
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
    monkeypatch.setattr("blockzoo.engines.openvino.adapters.TILE_RANKS", 4)
    graph = Graph()
    give(AdapterPacker(SPEC, graph), bank(0), [0, 0, 1, 1, 2, None], [5])  # ranks 3, 3 and 1
    assert graph.inputs["lora_a.0.q"].shape == (2, 6, 4)  # adapters 0 and 2; adapter 1 leaves q alone
    assert graph.inputs["lora_b.1.down"].shape == (2, 3, 5)
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


def test_projections_of_the_same_ranks_share_a_mask() -> None:
    graph = Graph()
    packer = AdapterPacker(SPEC, graph)
    full = {name: f32_to_bf16(np.ones_like(array)) for name, array in bank(0).items()}
    for name, array in (full | {"lora_mask": f32_to_bf16(mask_of([0, 1])), "rows": np.arange(2)}).items():
        packer.give(name, array)
    packer.pack()
    assert graph.inputs["lora_mask.0.q"] is graph.inputs["lora_mask.0.v"]
    assert graph.inputs["lora_mask.0.q"].dtype == np.uint16
