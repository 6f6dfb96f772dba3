"""Tensors in planes: whatever was written comes back bit by bit, small; files that are off are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockzoo.zoo.demo.assemble import WEIGHTS
from blockzoo.zoo.demo.compact import read_compact, write_compact
from blockzoo.zoo.tensors import f32_to_bf16

SHAPES: dict[str, tuple[int, ...]] = {"b": (3, 5), "a.10": (7,), "a.9": (0, 4), "scalar": (), "c": (2, 3, 33)}
DTYPES = ("<u2", "<f4", "<f2", "u1")


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bits at all: NaN of all payloads, infinities and subnormals among them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return data.view(dtype).reshape(shape)


def same(found: dict[str, np.ndarray], written: dict[str, np.ndarray]) -> None:
    assert list(found) == list(written)
    for name, tensor in written.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name


def test_any_bits_of_all_dtypes_come_back_in_their_order(tmp_path: Path) -> None:
    written = {
        f"{name}/{dtype}": random_bits(dtype, shape, seed)
        for seed, (name, shape) in enumerate(SHAPES.items())
        for dtype in DTYPES
    }
    written["transposed"] = random_bits("<f4", (4, 6), 99).T
    write_compact(tmp_path / "x.planes", written, {"r": "é"})
    found, facts = read_compact(tmp_path / "x.planes")
    same(found, written)
    assert facts == {"r": "é"}


@pytest.mark.parametrize("names", [[], ["a.9"]])
def test_nothing_at_all_comes_back(tmp_path: Path, names: list[str]) -> None:
    written = {name: random_bits("<u2", SHAPES[name], 0) for name in names}
    write_compact(tmp_path / "x.planes", written)
    same(read_compact(tmp_path / "x.planes")[0], written)


def test_every_bf16_comes_back_by_its_distance_from_every_kind_of_value(tmp_path: Path) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    values = [0, 1, 0x3F80, 0x7F80, 0x7FC0, 0x7FFF, 0x8000, 0x8001, 0xBF80, 0xFF80, 0xFFFF]
    reference = {f"{value:x}": np.full(1 << 16, value, np.uint16) for value in values}
    written = dict.fromkeys(reference, every)
    write_compact(tmp_path / "x.planes", written, reference=reference)
    same(read_compact(tmp_path / "x.planes", reference)[0], written)


def test_only_bf16_of_the_references_shape_needs_it(tmp_path: Path) -> None:
    reference = {"b": random_bits("<u2", (3, 5), 0), "f": random_bits("<f4", (3, 5), 1)}
    reference["other"] = random_bits("<u2", (5, 3), 2)
    written = {"b": random_bits("<u2", (3, 5), 3), "f": random_bits("<f4", (3, 5), 4)}
    written |= {"other": random_bits("<u2", (3, 5), 5), "new": random_bits("<u2", (3,), 6)}
    write_compact(tmp_path / "x.planes", written, reference=reference)
    same(read_compact(tmp_path / "x.planes", {"b": reference["b"]})[0], written)


def test_what_tells_nothing_takes_its_bytes_and_what_tells_much_a_few(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = rng.standard_normal((256, 512)).astype(np.float32)
    after = before + 0.001 * rng.standard_normal(before.shape).astype(np.float32)
    base, tuned = {"w": f32_to_bf16(before)}, {"w": f32_to_bf16(after)}
    path, size = tmp_path / "x.planes", {}
    write_compact(path, base)
    size["base"] = path.stat().st_size
    write_compact(path, tuned, reference=base)
    size["tuned"] = path.stat().st_size
    write_compact(path, {"w": random_bits("u1", before.shape, 0)})
    size["noise"] = path.stat().st_size
    assert size["base"] / before.size < 8 + 2.7  # bits: 8 of sign and mantissa, those of a normal's exponent
    assert size["base"] < 1.35 * before.size
    assert size["tuned"] < 0.5 * before.size
    assert size["noise"] < before.size + 500


def test_another_reference_is_refused(tmp_path: Path) -> None:
    reference = {"w": random_bits("<u2", (3, 5), 0)}
    path = tmp_path / "x.planes"
    write_compact(path, {"w": random_bits("<u2", (3, 5), 1)}, reference=reference)
    for other in (None, {"v": reference["w"]}, {"w": reference["w"].T}):
        with pytest.raises(ValueError, match=r"x\.planes holds w \[3, 5\] by its distance from a reference"):
            read_compact(path, other)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="w is int8; expected one of"):
        write_compact(tmp_path / "x.planes", {"w": np.zeros(3, np.int8)})


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "planes"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.planes"
    write_compact(path, {"w": random_bits("<u2", (30, 50), 1)})
    data = bytearray(path.read_bytes())
    data[{"header": 40}.get(damage, -1)] ^= 1
    cut = {"empty": 0, "cut": len(data) - 5}.get(damage, len(data))
    path.write_bytes(data[:cut])
    with pytest.raises(ValueError, match=r"x\.planes is (damaged|no file of tensors in planes)"):
        read_compact(path)


def test_shipped_tensors_are_written_again_as_they_are(tmp_path: Path) -> None:
    base, _ = read_compact(WEIGHTS / "base.planes")
    solver, _ = read_compact(WEIGHTS / "solver.planes", base)
    write_compact(tmp_path / "x.planes", solver, reference=base)
    assert abs((tmp_path / "x.planes").stat().st_size / (WEIGHTS / "solver.planes").stat().st_size - 1) < 0.01
    same(read_compact(tmp_path / "x.planes", base)[0], solver)
