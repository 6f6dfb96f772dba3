"""Rounding: errors within what the grid allows, and error compensation that pays on what was not seen."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf_files import packed

from blockzoo.build.rounding import corrected, on_its_grid, rounded
from blockzoo.zoo.packing import LIMITS, rotated

RNG = np.random.default_rng(1)
WEIGHT = RNG.standard_normal((40, 256)).astype(np.float32)


def rows(count: int) -> np.ndarray:
    """With directions that go together, as in a model, and a few large ones."""
    mixing = np.random.default_rng(2).standard_normal((24, 256)) * np.geomspace(10, 0.1, 24)[:, None]
    return (RNG.standard_normal((count, 24)) @ mixing + 0.1 * RNG.standard_normal((count, 256))).astype("f4")


@pytest.mark.parametrize("group", [256, 64])
def test_eight_bits_round_to_the_nearest(group: int) -> None:
    found = rounded(WEIGHT, "i8", group)
    assert found.scales is not None
    assert found.scales.shape == (40, 256 // group)
    error = np.abs(rotated(found.to_f32()) - rotated(WEIGHT)).reshape(40, -1, group)
    assert (error <= found.scales[:, :, None] * 0.50001).all()


@pytest.mark.parametrize("dtype", ["i8", "i4"])
@pytest.mark.parametrize("with_gram", [False, True])
def test_integers_stay_within_their_limits(dtype: str, with_gram: bool) -> None:
    x = rows(500)
    weight = WEIGHT.copy()
    weight[3] = 0
    weight[4, :64] = 0
    weight[5, 0] = 1e4
    found = rounded(weight, dtype, 64, x.T @ x if with_gram else None)  # type: ignore[arg-type]
    low, high = LIMITS[dtype]  # type: ignore[index]
    assert low <= found.integers.min() <= found.integers.max() <= high
    assert np.isfinite(found.to_f32()).all()
    assert not found.to_f32()[3].any()


@pytest.mark.parametrize("dtype", ["i8", "i4"])
def test_compensated_errors_are_smaller_on_rows_that_were_not_seen(dtype: str) -> None:
    seen, unseen = rows(4000), rows(400)

    def error(gram: np.ndarray | None) -> float:
        found = rounded(WEIGHT, dtype, 64, gram).to_f32()  # type: ignore[arg-type]
        return float(np.square(unseen @ (found - WEIGHT).T).sum())

    assert error(seen.T @ seen / len(seen)) < 0.3 * error(None)


@pytest.mark.parametrize("dtype", ["i8", "i4"])
def test_one_direction_may_be_much_longer_than_all_others(dtype: str) -> None:
    """As where a model's first token has a few huge activations."""
    width = 1536
    x = 0.05 * np.random.default_rng(5).standard_normal((2048, width), np.float32)
    x[0, [7, 900, 901]] = 1e5, -3e5, 2e5
    weight = np.random.default_rng(6).standard_normal((8, width), np.float32)
    found = rounded(weight, dtype, 32, x.T @ x / np.float32(len(x))).to_f32()  # type: ignore[arg-type]
    unseen = x[1024:]
    assert np.square(unseen @ (found - weight).T).sum() < 0.05 * np.square(unseen @ weight.T).sum()


def test_scales_of_four_bits_beat_those_of_the_largest_value() -> None:
    found = rounded(WEIGHT, "i4", 64)
    groups = WEIGHT.reshape(40, -1, 64)
    scale = np.abs(groups).max(axis=2, keepdims=True) / 7
    plain = (np.rint(groups / scale) * scale).reshape(WEIGHT.shape)
    assert np.square(found.to_f32() - WEIGHT).sum() < 0.85 * np.square(plain - WEIGHT).sum()


def test_inputs_that_never_come_do_no_harm() -> None:
    x = rows(300)
    x[:, ::2] = 0
    found = rounded(WEIGHT, "i4", 128, x.T @ x)
    assert np.square(found.to_f32() - WEIGHT).mean() < 0.1


@pytest.mark.parametrize(
    ("kind", "dtype", "kept"),
    [
        ("Q8_0", "i8", True),
        ("Q4_0", "i4", True),
        ("Q4_0", "i8", True),
        ("Q8_0", "i4", False),
        ("Q4_1", "i8", False),
        ("Q5_1", "i4", False),
    ],
)
def test_grids_of_gguf_files_are_kept(kind: str, dtype: str, kept: bool) -> None:
    weight = WEIGHT.copy()
    weight[2, :32] = 0
    kind_id = gguf.GGMLQuantizationType[kind]
    values = gguf.quants.dequantize(gguf.quants.quantize(weight, kind_id), kind_id).astype(np.float32)
    found = on_its_grid(values, dtype)  # type: ignore[arg-type]
    assert (found is not None) == kept
    if found is not None:
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.to_f32(), values)
    assert on_its_grid(weight, dtype) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
def test_grids_with_offsets_are_kept(kind: str) -> None:
    weight = WEIGHT.copy()
    weight[2, :32] = 0.25
    weight[3, :32] = np.linspace(0.1, 0.1 + 1e-3, 32)
    kind_id = gguf.GGMLQuantizationType[kind]
    values = gguf.quants.dequantize(packed(weight, kind), kind_id).astype(np.float32)
    found = on_its_grid(values, "i4")
    assert found is not None
    assert found.offsets is not None
    groups, apart = values.reshape(40, -1, 32), found.to_f32().reshape(40, -1, 32)
    assert (np.abs(apart - groups).max(axis=2) <= 5e-7 * np.abs(groups).max(axis=2)).all()
    values[39, 255] *= 1.0001
    assert on_its_grid(values, "i4") is None


def test_what_inputs_lost_is_made_up_for() -> None:
    """On rows that were not seen, as far as what is left of the inputs tells it; noise is left alone."""
    mixing = np.eye(256, dtype=np.float32) + 0.02 * RNG.standard_normal((256, 256)).astype(np.float32)

    def error(noise: float, seen: int) -> float:
        before = rows(seen + 400)
        after = before @ mixing + noise * RNG.standard_normal(before.shape).astype(np.float32)
        x, y = before[:seen], after[:seen]
        found = corrected(WEIGHT, y.T @ y / seen, (x - y).T @ y / seen)
        x, y = before[seen:], after[seen:]
        return float(np.square(y @ found.T - x @ WEIGHT.T).sum() / np.square((y - x) @ WEIGHT.T).sum())

    assert error(0.0, 4000) < 0.3
    assert error(0.1, 300) < 1.0


def test_eight_bits_find_the_grid_of_four_bits_with_an_offset() -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    values = gguf.quants.dequantize(gguf.quants.quantize(WEIGHT, kind), kind).astype(np.float32)
    groups = values.reshape(40, -1, 32)
    scale = np.abs(groups).max(axis=2, keepdims=True) / 127
    plain = (np.rint(groups / scale) * scale).reshape(values.shape)
    found = rounded(values, "i8", 32).to_f32()
    assert np.square(found - values).sum() < 0.6 * np.square(plain - values).sum()
