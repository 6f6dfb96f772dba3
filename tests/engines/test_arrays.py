"""What arrays compute by themselves, in numpy and in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockzoo.engines.arrays import Arrays, HostArrays
from blockzoo.engines.base import Precision
from blockzoo.engines.kv_pages import pack_u8, unpack_u8
from blockzoo.engines.reference.arrays import TorchArrays
from blockzoo.runtime.exec.kv_tensors import KVTensors, rotation_by
from blockzoo.zoo.tensors import bf16_to_f32

RNG = np.random.default_rng(0)
ANGLES = np.arange(200)[:, None] / 10000 ** (np.arange(8) / 8)
COS, SIN = (np.tile(f(ANGLES), 2).astype(np.float32) for f in (np.cos, np.sin))


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("kind", ["host", "torch"])
@pytest.mark.parametrize("shift", [0, 1, -1, 37, -90])
def test_a_rotated_key_is_that_of_its_new_position(kind: str, precision: Precision, shift: int) -> None:
    arrays: Arrays = HostArrays(precision) if kind == "host" else TorchArrays(torch.device("cpu"), precision)
    raw = RNG.normal(size=(5, 2, 16)).astype(np.float32)
    turns = np.exp(1j * ANGLES)[:, None]

    def at(positions: np.ndarray) -> np.ndarray:
        turned = (raw[..., :8] + 1j * raw[..., 8:]) * turns[positions]
        return np.concatenate([turned.real, turned.imag], -1).astype(np.float32)

    old = np.arange(100, 105)
    rows = arrays.activations(at(old))
    found = arrays.to_host(arrays.rotated(rows, *rotation_by(np.full(5, shift), COS, SIN)))
    if precision == "bf16":
        found = bf16_to_f32(found)
    np.testing.assert_allclose(found, at(old + shift), atol=1e-5 if precision == "f32" else 0.03)
    again = arrays.to_host(rows)
    np.testing.assert_array_equal(again, arrays.to_host(arrays.activations(at(old))), "rows are left alone")


def pool_of_four(arrays: Arrays) -> KVTensors:
    """Pages of two heads of 16."""
    pool = {name: arrays.pages(4, 2, 16) for name in ("key_cache", "value_cache")}
    return KVTensors(pool, 4, {0: (COS, SIN)}, arrays)


def turned_by_nine(arrays: Arrays, page: np.ndarray) -> np.ndarray:
    """The keys of a page [heads, 32, width] nine positions on: [tokens, heads, width]."""
    rows = arrays.mirror(np.ascontiguousarray(page.swapaxes(0, 1)))
    return arrays.to_host(arrays.rotated(rows, *rotation_by(np.full(32, 9), COS, SIN)))


def expected_by_nine(values: np.ndarray) -> np.ndarray:
    """The same of float32 values, by complex numbers."""
    rows = values.swapaxes(0, 1)
    turned = (rows[..., :8] + 1j * rows[..., 8:]) * np.exp(1j * ANGLES[9])
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize("kind", ["host", "torch"])
def test_pages_in_8_bits_are_read_written_and_turned(kind: str) -> None:
    cpu = torch.device("cpu")
    arrays: Arrays = (
        HostArrays("bf16", 1, "u8") if kind == "host" else TorchArrays(cpu, "bf16", kv_precision="u8")
    )
    kv = pool_of_four(arrays)
    assert kv.page_shape == (2, 32, 24)
    values = RNG.standard_normal((2, 2, 32, 16)).astype(np.float32)
    keys = pack_u8(values)
    keys.flags.writeable = False  # as from a mapped file
    kv.write(np.array([3, 1]), keys, keys[::-1])
    found = kv.read(np.array([3, 1, 0]))
    np.testing.assert_array_equal(found[0][:2], keys)
    np.testing.assert_array_equal(found[1][:2], keys[::-1])
    assert not found[0][2].any()
    np.testing.assert_array_equal(kv.values(np.array([1, 3]), np.array([33])), unpack_u8(keys[1, None, :, 1]))
    turned, expected = unpack_u8(turned_by_nine(arrays, keys[0])), expected_by_nine(unpack_u8(keys[0]))
    step = (expected.max(-1) - expected.min(-1)) / 255
    assert (np.abs(turned - expected).max(-1) <= 0.501 * step + 1e-6).all()


@pytest.mark.parametrize("kind", ["host", "torch"])
def test_pages_in_f16_are_read_written_and_turned(kind: str) -> None:
    cpu = torch.device("cpu")
    arrays: Arrays = (
        HostArrays("f32", 1, "f16") if kind == "host" else TorchArrays(cpu, "f32", kv_precision="f16")
    )
    kv = pool_of_four(arrays)
    keys = RNG.standard_normal((2, 2, 32, 16)).astype(np.float16)
    keys.flags.writeable = False  # as from a mapped file
    kv.write(np.array([3, 1]), keys, keys[::-1])
    for found, given in zip(kv.read(np.array([3, 1])), (keys, keys[::-1]), strict=True):
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, given)
    np.testing.assert_array_equal(
        kv.values(np.array([1, 3]), np.array([33])), keys[1, None, :, 1].astype(np.float32)
    )
    turned, expected = turned_by_nine(arrays, keys[0]), expected_by_nine(keys[0].astype(np.float32))
    np.testing.assert_allclose(turned.astype(np.float32), expected, atol=2e-3)


def test_memory_of_rows_is_given_back() -> None:
    """What the kernel has been told of reads as zeros; rows beside it are as they were."""
    arrays = HostArrays("f32")
    array = arrays.zeros((64, 4096), "f32")  # 16 KiB a row: whole pages of memory, but for the edges
    array[...] = 1
    arrays.discard(array, np.array([9, 3, 4, 5, 60]))
    gone = [3, 4, 5, 9, 60]
    kept = sorted(set(range(64)) - set(gone))
    assert (array[kept] == 1).all()
    assert all((array[row] == 0).sum() >= 2048 for row in gone)
    arrays.discard(array, np.zeros(0, np.int64))
    array[gone] = 2
    assert (array[gone] == 2).all()
