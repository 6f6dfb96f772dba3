"""Activations in 8 bits, as nodes of the graph and by the CPU plugin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blockzoo.build.rounding import rounded
from blockzoo.engines.openvino.engine import OpenVINOEngines, RoundedActivations, multiplies_int8
from blockzoo.zoo.blocks import Block, BlockTensor, HeadSpec
from blockzoo.zoo.packing import rotated

WIDTH, VOCAB, EPS = 256, 48, 1e-5


def head(group: int | None) -> Block:
    """A head with a matrix as given, or in 8 bits in groups of so many columns."""
    rng = np.random.default_rng(5)
    matrix = rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)
    weight = BlockTensor("f32", matrix) if group is None else rounded(matrix, "i8", group)
    norm = BlockTensor("f32", rng.uniform(0.5, 2, WIDTH).astype(np.float32))
    return Block("id", HeadSpec(WIDTH, VOCAB, EPS, tied=False), {"norm": norm, "weight": weight})


def by_hand(block: Block, x: np.ndarray, group: int) -> np.ndarray:
    """Its logits with what the matrix takes rotated and rounded in groups of so many; 0: not rounded."""
    normed = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + EPS) * block.tensors["norm"].to_f32()
    if group:
        groups = rotated(normed).reshape(len(x), -1, group)
        scale = np.abs(groups).max(axis=2, keepdims=True) / 127
        normed = rotated((np.rint(groups / scale) * scale).reshape(x.shape))
    return normed @ block.tensors["weight"].to_f32().T


def run(maker: OpenVINOEngines, block: Block, x: np.ndarray) -> np.ndarray:
    engine, logits = maker.span([block]), np.empty((len(x), VOCAB), np.float32)
    engine.bind("hidden", x)
    engine.bind("logits", logits)
    engine.run()
    return logits


X = np.random.default_rng(6).standard_normal((9, WIDTH)).astype(np.float32)
X[:, 7] *= 30  # what makes its group coarse


GROUPS = [(32, 32), (64, 64), (128, 128), (WIDTH, 128)]
"""Columns that share a scale in weights, and in activations beside them."""


@pytest.mark.parametrize(("columns", "group"), GROUPS)
def test_they_are_rounded_in_the_groups_of_the_weights(columns: int, group: int) -> None:
    """In smaller ones, where a whole row of weights has one scale."""
    block = head(columns)
    found = run(RoundedActivations(1), block, X)
    np.testing.assert_allclose(found, by_hand(block, X, group), rtol=0, atol=2e-3)
    assert np.abs(found - by_hand(block, X, 0)).max() > 0.01


def test_what_is_large_costs_less_for_being_rotated() -> None:
    """Its neighbours are rounded in steps of its size where it is not."""
    block, plain = head(128), head(128)
    weight = block.tensors["weight"]
    assert weight.rotated
    plain.tensors["weight"] = replace(weight, rotated=False)  # other values, of the same size
    exact, rounding = OpenVINOEngines("f32", 1), RoundedActivations(1)
    lost = [np.square(run(rounding, each, X) - run(exact, each, X)).mean() for each in (block, plain)]
    assert lost[0] < 0.3 * lost[1]


def test_they_are_rounded_beside_weights_as_given_where_that_is_asked_for() -> None:
    block = head(None)
    exact, found = (run(maker, block, X) for maker in (RoundedActivations(1), RoundedActivations(1, 64)))
    np.testing.assert_allclose(exact, by_hand(block, X, 0), rtol=0, atol=1e-3)
    np.testing.assert_allclose(found, by_hand(block, X, 64), rtol=0, atol=2e-3)


@pytest.mark.skipif(not multiplies_int8(), reason="this CPU has no VNNI")
@pytest.mark.parametrize(("columns", "group"), GROUPS)
def test_the_plugin_rounds_so_too(columns: int, group: int) -> None:
    """Or not at all, as it does with some shapes; values between two integers may go either way."""
    block = head(columns)
    found = run(OpenVINOEngines(num_threads=1, int8_activations=True), block, X)
    by_groups, exact = by_hand(block, X, group), by_hand(block, X, 0)
    lost = np.abs(by_groups - exact).mean()
    assert min(np.abs(found - by_groups).mean(), np.abs(found - exact).mean()) < 0.3 * lost
