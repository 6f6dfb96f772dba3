"""Quantized matrices: packed, stored, read back as they were; files that are off are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blockzoo.zoo.blocks import FfnSpec
from blockzoo.zoo.fingerprint import block_id
from blockzoo.zoo.packing import pack_i4, rotated, rotation, unpack_i4
from blockzoo.zoo.tensors import BlockTensor, TensorFile, from_f32, stacked, write_tensor_file

RNG = np.random.default_rng(0)


def quantized(
    dtype: str, rows: int = 6, columns: int = 64, groups: int = 2, offsets: bool = False
) -> BlockTensor:
    low, high = (-8, 8) if dtype == "i4" else (-127, 128)
    integers = RNG.integers(low, high, (rows, columns)).astype(np.int8)
    scales = RNG.standard_normal((rows, groups)).astype(np.float32)
    arrays = [pack_i4(integers) if dtype == "i4" else integers, scales]
    arrays += [RNG.standard_normal((rows, groups)).astype(np.float32)] if offsets else []
    return BlockTensor(dtype, *arrays)  # type: ignore[arg-type]


def test_a_rotation_is_its_own_inverse_and_spreads_what_is_large() -> None:
    values = RNG.standard_normal((5, 96)).astype(np.float32)
    np.testing.assert_allclose(rotated(rotated(values)), values, atol=1e-6)
    np.testing.assert_allclose(rotation() @ rotation().T, np.eye(32), atol=1e-6)
    spike = np.zeros((1, 96), np.float32)
    spike[0, 40] = 8
    np.testing.assert_allclose(np.abs(rotated(spike))[0, 32:64], 8 / 32**0.5, rtol=1e-6)
    assert not rotated(spike)[0, :32].any()


@pytest.mark.parametrize("dtype", ["i8", "i4"])
def test_rotated_matrices_are_stored_and_read(dtype: str, tmp_path: Path) -> None:
    plain = quantized(dtype)
    turned = replace(plain, rotated=True)
    np.testing.assert_allclose(turned.to_f32(), rotated(plain.to_f32()), rtol=1e-6)
    two = turned.rows(np.array([4, 1])).to_f32()
    np.testing.assert_allclose(two, turned.to_f32()[[4, 1]], rtol=1e-6, atol=1e-6 * np.abs(two).max())
    np.testing.assert_array_equal(stacked([turned, turned]).to_f32(), np.concatenate([turned.to_f32()] * 2))
    mixed = stacked([plain, turned])
    assert mixed.dtype == "f32"
    np.testing.assert_array_equal(mixed.to_f32(), np.concatenate([plain.to_f32(), turned.to_f32()]))
    spec = FfnSpec(64, 6, 1e-5, False)
    assert block_id(spec, {"gate": plain}, None) != block_id(spec, {"gate": turned}, None)
    write_tensor_file(tmp_path / "f", {"a": turned, "b": plain}, {})
    file = TensorFile(tmp_path / "f")
    assert (file.stored("a").rotated, file.stored("b").rotated) == (True, False)
    np.testing.assert_array_equal(file.stored("a").to_f32(), turned.to_f32())
    write_tensor_file(tmp_path / "odd", {"a": replace(quantized(dtype, columns=48), rotated=True)}, {})
    with pytest.raises(ValueError, match="a is rotated, but 48 columns are no multiple of 32"):
        TensorFile(tmp_path / "odd").stored("a")


def test_all_pairs_of_nibbles_come_back() -> None:
    both = np.array([[a, b] for a in range(-8, 8) for b in range(-8, 8)], np.int8).reshape(16, 32)
    packed = pack_i4(both)
    assert packed.shape == (16, 16)
    np.testing.assert_array_equal(unpack_i4(packed), both)
    assert packed[0, 1] == 0x98  # columns 2 and 3, -8 and -7: the even one in the low half


@pytest.mark.parametrize("dtype", ["i8", "i4"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_values_are_integers_times_their_groups_scale(dtype: str, groups: int) -> None:
    tensor = quantized(dtype, groups=groups)
    assert tensor.shape == (6, 64)
    values = tensor.to_f32()
    for row, column in ((0, 0), (3, 31), (5, 63)):
        assert tensor.scales is not None
        expected = tensor.integers[row, column] * tensor.scales[row, column * groups // 64]
        assert values[row, column] == expected
    np.testing.assert_array_equal(tensor.rows(np.array([5, 2])).to_f32(), values[[5, 2]])
    assert tensor.num_bytes == 6 * 64 // (2 if dtype == "i4" else 1) + 6 * groups * 4


def test_offsets_are_added_to_the_values_of_their_group() -> None:
    tensor = quantized("i4", offsets=True)
    assert tensor.scales is not None
    assert tensor.offsets is not None
    for row, column in ((0, 0), (3, 31), (5, 63)):
        at = row, column // 32
        expected = tensor.integers[row, column] * tensor.scales[at] + tensor.offsets[at]
        assert tensor.to_f32()[row, column] == expected
    np.testing.assert_array_equal(tensor.rows(slice(2, 4)).to_f32(), tensor.to_f32()[2:4])
    assert tensor.num_bytes == 6 * 64 // 2 + 2 * 6 * 2 * 4
    assert tensor.is_finite()
    tensor.offsets[1, 1] = np.inf
    assert not tensor.is_finite()


@pytest.mark.parametrize("dtype", ["i8", "i4"])
@pytest.mark.parametrize("offsets", [False, True])
def test_files_keep_them(dtype: str, offsets: bool, tmp_path: Path) -> None:
    pair = {name: quantized(dtype, offsets=offsets) for name in ("q", "k")}
    tensors = {"norm": from_f32(np.ones(5), "f32"), **pair}
    write_tensor_file(tmp_path / "a", tensors, {})
    file = TensorFile(tmp_path / "a")
    for name, tensor in tensors.items():
        found = file.stored(name)
        assert found.dtype == tensor.dtype
        np.testing.assert_array_equal(found.to_f32(), tensor.to_f32())
    with pytest.raises(ValueError, match="tensor q has dtype"):  # of a checkpoint, not of a zoo
        file.tensor("q")


@pytest.mark.parametrize("shape", [(5, 2), (6, 3), (6,), (6, 0)])
def test_scales_that_do_not_fit_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = quantized("i8")
    off = BlockTensor("i8", tensor.data, np.ones(shape, np.float32))
    write_tensor_file(tmp_path / "a", {"q": off}, {})
    with pytest.raises(ValueError, match="the scales of q are f32"):
        TensorFile(tmp_path / "a").stored("q")


@pytest.mark.parametrize("shape", [(5, 2), (6, 4), (6,)])
def test_offsets_that_do_not_fit_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = quantized("i8")
    off = BlockTensor("i8", tensor.data, tensor.scales, np.ones(shape, np.float32))
    write_tensor_file(tmp_path / "a", {"q": off}, {})
    with pytest.raises(ValueError, match="the offsets of q are f32"):
        TensorFile(tmp_path / "a").stored("q")


def test_missing_scales_are_refused(tmp_path: Path) -> None:
    write_tensor_file(tmp_path / "a", {"q": BlockTensor("i8", quantized("i8").data)}, {})
    with pytest.raises(KeyError):
        TensorFile(tmp_path / "a").stored("q")


def test_an_id_tells_integers_scales_offsets_and_groups_apart() -> None:
    tensor = quantized("i8", groups=2)
    assert tensor.scales is not None
    spec = FfnSpec(64, 6, 1e-5, False)
    others = [
        tensor,
        BlockTensor("i8", tensor.data, tensor.scales * 2),
        BlockTensor("i8", tensor.data, tensor.scales.reshape(-1, 1)[:6]),
        BlockTensor("i8", -tensor.data, tensor.scales),
        BlockTensor("i8", tensor.data, tensor.scales, tensor.scales),
        BlockTensor("i8", tensor.data, tensor.scales, -tensor.scales),
        from_f32(tensor.to_f32(), "f32"),
    ]
    assert len({block_id(spec, {"gate": other}) for other in others}) == len(others)


def test_stacked_ones_stay_quantized_where_they_are_alike() -> None:
    a, b = quantized("i4"), quantized("i4", rows=3)
    both = stacked([a, b])
    assert both.dtype == "i4"
    np.testing.assert_array_equal(both.to_f32(), np.concatenate([a.to_f32(), b.to_f32()]))
    c, d = quantized("i4", offsets=True), quantized("i4", rows=3, offsets=True)
    both = stacked([c, d])
    assert both.offsets is not None
    np.testing.assert_array_equal(both.to_f32(), np.concatenate([c.to_f32(), d.to_f32()]))
    assert stacked([a, c]).dtype == "f32"
    mixed = stacked([a, quantized("i8")])
    assert mixed.dtype == "f32"
    assert mixed.shape == (12, 64)
