"""Differences of low rank: nearest where it counts, exact where it can be, norms taken along."""

from __future__ import annotations

import numpy as np
import pytest

from blockzoo.build.low_rank import cut_down, factors, in_eight_bits, nearest, rank_bytes
from blockzoo.zoo.blocks import PROJECTIONS, AttnSpec, BlockSpec, FfnSpec, tensor_shapes
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.tensors import BlockTensor, from_f32

ATTN = AttnSpec(64, 4, 2, 16, 1e-5, RopeConfig("default", 1e4), 0, False, False, False)
FFN = FfnSpec(64, 96, 1e-5, False)
RNG = np.random.default_rng(0)


def block(spec: BlockSpec) -> dict[str, BlockTensor]:
    """Random values of a usual size."""
    shapes = tensor_shapes(spec)
    values = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    values["norm"] = 1 + np.float32(0.2) * values["norm"]
    return {name: from_f32(value, "bf16") for name, value in values.items()}


def test_it_is_nearest() -> None:
    difference = RNG.standard_normal((40, 64)).astype(np.float32)
    a, b = nearest(difference, 8)
    assert a.shape == (8, 64)
    assert b.shape == (40, 8)
    left = np.linalg.svd(difference, compute_uv=False)[8:]
    assert np.linalg.norm(difference - b @ a) == pytest.approx(np.linalg.norm(left), rel=1e-4)


def test_what_is_of_low_rank_is_kept_whole() -> None:
    a, b = RNG.standard_normal((5, 64)).astype(np.float32), RNG.standard_normal((40, 5)).astype(np.float32)
    found = nearest(b @ a, 5)
    np.testing.assert_allclose(found[1] @ found[0], b @ a, atol=1e-4)


@pytest.mark.parametrize("spec", [ATTN, FFN])
def test_the_norm_goes_into_the_matrices_behind_it(spec: BlockSpec) -> None:
    """In full rank the base's norm, its matrices and the differences give the block's own products."""
    base, tuned = block(spec), block(spec)
    found = factors(spec, tuned, base, 64)
    assert [*found] == [*PROJECTIONS[spec.kind]]
    for name, pair in found.items():
        x = RNG.standard_normal((7, tuned[name].shape[1])).astype(np.float32)
        before = x if name in ("o", "down") else x * base["norm"].to_f32()
        after = x if name in ("o", "down") else x * tuned["norm"].to_f32()
        product = before @ base[name].to_f32().T + before @ pair.a.to_f32().T @ pair.b.to_f32().T
        # the differences are of the size of the weights here, and in bf16
        np.testing.assert_allclose(product, after @ tuned[name].to_f32().T, atol=0.5, rtol=0.05)


def test_a_zero_in_a_norm_is_no_reason_to_fail() -> None:
    base, tuned = block(FFN), block(FFN)
    for tensors, at in ((base, 3), (tuned, 5)):
        tensors["norm"].data[at] = 0
    found = factors(FFN, tuned, base, 4)
    assert all(pair.a.is_finite() and pair.b.is_finite() for pair in found.values())


def test_a_smaller_rank_is_the_beginning_of_a_larger_one() -> None:
    base = block(ATTN)
    tuned = base | {"o": from_f32(base["o"].to_f32() + np.float32(0.1) * block(ATTN)["o"].to_f32(), "bf16")}
    found = factors(ATTN, tuned, base, 16)
    assert [*found] == ["o"]
    small, large = cut_down(found, 4), cut_down(found, 16)
    assert small is not None
    assert large is not None
    assert (small.spec.rank, large.spec.rank) == (4, 16)
    assert np.array_equal(small.tensors["o.a"].data, large.tensors["o.a"].data[:4])
    assert np.array_equal(small.tensors["o.b"].data, large.tensors["o.b"].data[:, :4])
    assert large.num_bytes == 16 * 2 * (64 + 64)
    assert cut_down(factors(ATTN, base, base, 16), 4) is None


def test_eight_bits_are_half_the_bytes() -> None:
    cut = cut_down(factors(FFN, block(FFN), block(FFN), 32), 32)
    assert cut is not None
    narrow = in_eight_bits(cut)
    assert narrow.spec == cut.spec
    assert narrow.dtype == "i8"
    assert narrow.num_bytes == pytest.approx((0.5 + 2 / 32) * cut.num_bytes)
    for name, tensor in cut.tensors.items():
        largest = np.abs(tensor.to_f32()).max()
        np.testing.assert_allclose(narrow.tensors[name].to_f32(), tensor.to_f32(), atol=largest / 254)


def test_bytes_of_a_rank() -> None:
    cut = cut_down(factors(FFN, block(FFN), block(FFN), 32), 32)
    assert cut is not None
    assert in_eight_bits(cut).num_bytes == 32 * rank_bytes(FFN)
