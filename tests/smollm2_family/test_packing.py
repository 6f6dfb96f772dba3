"""Tensors in four bits, and what comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.smollm2_family.packing import load_packed, pack, save_packed, unpack


@pytest.mark.parametrize("shape", [(6, 64), (5, 16), (4, 8), (1, 96)])
def test_values_come_back_within_a_step_of_their_group(shape: tuple[int, int]) -> None:
    tensor = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = unpack(pack({"w": tensor}))["w"]
    assert found.dtype == np.float32
    groups = tensor.reshape(shape[0], -1, min(32, shape[1]))
    error = np.square(found.reshape(groups.shape) - groups).mean(-1)
    assert (error <= np.square(np.abs(groups).max(-1) / 8)).all()  # a step of the plainest scale
    assert error.mean() < 0.02


def test_values_on_the_grid_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    scale = np.float32(2.0) ** rng.integers(-8, 3, (7, 2, 1))
    integers = rng.integers(-8, 8, (7, 2, 32))
    integers[..., 0] = -8
    tensor = (scale * integers).reshape(7, 64).astype(np.float32)
    assert np.array_equal(unpack(pack({"w": tensor}))["w"], tensor)


def test_nothing_but_zeros_comes_back_as_zeros() -> None:
    assert not unpack(pack({"w": np.zeros((2, 32), np.float32)}))["w"].any()


def test_a_file_holds_half_a_byte_a_value_and_its_facts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"b": rng.standard_normal((64, 320)).astype(np.float32), "a": np.ones(5, np.float32)}
    path = tmp_path / "x.planes"
    save_packed(path, tensors, {"lora": "r"})
    assert path.stat().st_size < 64 * 320 * (0.5 + 2 / 32) + 500
    found, facts = load_packed(path)
    assert facts == {"lora": "r"}
    assert list(found) == ["a", "b"]
    assert np.array_equal(found["a"], tensors["a"])
    assert np.corrcoef(found["b"].ravel(), tensors["b"].ravel())[0, 1] > 0.99
    written = path.read_bytes()
    save_packed(path, tensors, {"lora": "r"})
    assert path.read_bytes() == written


@pytest.mark.parametrize("columns", [48, 7])
def test_columns_that_make_no_groups_are_refused(columns: int) -> None:
    with pytest.raises(ValueError, match=f"w has {columns} columns; expected a multiple of 32"):
        pack({"w": np.ones((2, columns), np.float32)})
