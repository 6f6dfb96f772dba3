"""What the OpenVINO graphs are given of a bank of adapters computes what the whole bank does."""

from __future__ import annotations

import numpy as np
import pytest

from blockzoo.engines.openvino.adapters import AdapterPacker
from blockzoo.zoo.tensors import f32_to_bf16

LORA = ((0, ("q", "v")), (1, ("down",)))
RANKS = {"0.q": [0, 1, 2, 6], "0.v": [0, 1, 2, 6], "1.down": [3, 4, 5]}  # of 8: adapters 0-2, 3-5, 6, 7
OWN = [slice(0, 3), slice(3, 6), slice(6, 7)]


class Graph:
    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}
        self.bound: list[str] = []

    def __call__(self, name: str, array: np.ndarray) -> None:
        self.inputs[name] = array
        self.bound.append(name)

    def delta(self, x: np.ndarray, projection: str) -> np.ndarray:
        found = self.inputs
        mask, a, b = (found[f"lora_{which}.{projection}"] for which in ("mask", "a", "b"))
        delta = ((x[found["lora_rows"]] @ a.T) * mask) @ b
        return np.asarray(delta[found["lora_back"]])


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


@pytest.mark.parametrize(
    "users", [[None, 0, 0, None, 1, 2], [0, 1, 2], [None, None], [2], [1, None, None, None, 0]]
)
def test_the_packed_inputs_compute_the_same(users: list[int | None]) -> None:
    graph = Graph()
    packer = AdapterPacker(LORA, graph)
    given, mask = bank(0), mask_of(users)
    for name, array in (given | {"lora_mask": mask}).items():
        packer.give(name, array)
    packer.pack()
    x = np.random.default_rng(1).standard_normal((len(users), 6)).astype(np.float32)
    for projection, ranks in RANKS.items():
        a, b = given[f"lora_a.{projection}"], given[f"lora_b.{projection}"]
        np.testing.assert_allclose(graph.delta(x, projection), ((x @ a.T) * mask) @ b, rtol=1e-5, atol=1e-6)
        assert len(graph.inputs[f"lora_a.{projection}"]) == len(ranks)
    bare = any(user is None for user in users)
    assert len(graph.inputs["lora_rows"]) == sum(user is not None for user in users) + bare


def test_only_what_changed_is_packed_again() -> None:
    graph = Graph()
    packer = AdapterPacker(LORA, graph)
    for name, array in (bank(0) | {"lora_mask": mask_of([0, 1])}).items():
        packer.give(name, array)
    packer.pack()
    graph.bound.clear()
    packer.give("lora_mask", packer._given["lora_mask"])
    packer.pack()
    assert graph.bound == []
    packer.give("lora_mask", mask_of([0, None]))
    packer.pack()
    assert graph.bound
    assert not any(name.startswith(("lora_a.", "lora_b.")) for name in graph.bound)


def test_projections_of_the_same_ranks_share_a_mask_and_a_full_bank_is_not_copied() -> None:
    graph = Graph()
    packer = AdapterPacker(LORA, graph)
    full = {name: f32_to_bf16(np.ones_like(array)) for name, array in bank(0).items()}
    for name, array in (full | {"lora_mask": f32_to_bf16(mask_of([0, 1]))}).items():
        packer.give(name, array)
    packer.pack()
    assert graph.inputs["lora_a.0.q"] is full["lora_a.0.q"]
    assert graph.inputs["lora_mask.0.q"] is graph.inputs["lora_mask.1.down"]
    assert graph.inputs["lora_mask.0.q"].dtype == np.uint16
