"""GGUF containers: against the gguf package's reader, and files that are cut off or lie."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError
from blockzoo.zoo.gguf_file import GgufFile

HEADER = b"GGUF" + struct.pack("<I", 3)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A sound file with metadata of every type."""
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_float32("eps", 1e-5)
    writer.add_float64("wide", 1e-5)
    writer.add_bool("yes", True)
    writer.add_int8("less", -3)
    writer.add_uint64("more", 1 << 40)
    writer.add_array("words", ["a", "été", ""])
    writer.add_array("numbers", [1, 2, 3])
    rng = np.random.default_rng(0)
    values = rng.standard_normal((6, 64)).astype(np.float32)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "whole.gguf"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def place(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(path: Path, pairs: list[bytes], places: list[bytes], data: int = 256) -> Path:
    header = HEADER + struct.pack("<QQ", len(places), len(pairs)) + b"".join([*pairs, *places])
    path.write_bytes(header + b"\0" * (-len(header) % 32 + data))
    return path


def test_tensors_and_metadata_are_those_of_the_package(whole: Path) -> None:
    ours, theirs = GgufFile(whole), gguf.GGUFReader(whole)
    assert ours.names == tuple(tensor.name for tensor in theirs.tensors)
    rows = np.array([5, 0, 3, 1, 2, 4])
    for tensor in theirs.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(6, 64)
        assert ours.shape(tensor.name) == (6, 64)
        np.testing.assert_array_equal(ours.tensor(tensor.name).to_f32(), values)
        np.testing.assert_array_equal(ours.tensor(tensor.name, rows).to_f32(), values[rows])
    assert {name: ours.tensor(name).dtype for name in ours.names} == {
        "F32": "f32",
        "F16": "f16",
        "BF16": "bf16",
        "Q8_0": "f32",
        "Q4_0": "f32",
    }
    for key in ("general.architecture", "yes", "less", "more", "words", "wide"):
        assert ours.metadata[key] == theirs.fields[key].contents()
    assert ours.metadata["numbers"] == (1, 2, 3)
    assert ours.metadata["eps"] == 1e-5  # as it was written, not as f32 widened


def test_rows_are_dequantized_part_by_part(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = GgufFile(whole).tensor("Q4_0").data
    monkeypatch.setattr("blockzoo.zoo.gguf_file._CHUNK", 100)
    rows = np.array([5, 0, 3, 1, 2, 4])
    np.testing.assert_array_equal(GgufFile(whole).tensor("Q4_0").data, expected)
    np.testing.assert_array_equal(GgufFile(whole).tensor("Q4_0", rows).data, expected[rows])


def test_a_large_tensor_is_in_memory_once(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "large.gguf", "llama")
    blocks = np.zeros((16384, 1024 // 32 * 34), np.uint8)
    writer.add_tensor("large", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "large.gguf")
    file.tensor("large", np.arange(16384)[::-1])  # what the library makes once
    tracemalloc.start()
    values = file.tensor("large", np.arange(16384)[::-1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.data.nbytes == 64 << 20
    assert peak < 2 * values.data.nbytes


def test_a_file_cut_off_anywhere_is_refused(whole: Path) -> None:
    content = whole.read_bytes()
    begin = len(content) - 6 * 64 * 4
    for end in [*range(0, begin, 7), len(content) - 100]:
        whole.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=r"whole\.gguf"):
            GgufFile(whole)


def test_a_damaged_file_is_read_or_refused(whole: Path) -> None:
    content = bytearray(whole.read_bytes())
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        damaged = content.copy()
        for position in rng.integers(0, 700, 3):
            damaged[position] = rng.integers(0, 256)
        whole.write_bytes(damaged)
        try:
            file = GgufFile(whole)
            for name in file.names:
                file.tensor(name)
        except CheckpointError:
            refused += 1
    assert 100 < refused < 400


LONG = struct.pack("<Q", 1 << 40)
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "not readable"),
    "magic": (lambda p: p.write_bytes(b"GGML" + bytes(100)), "is no GGUF file"),
    "tensors without end": (
        lambda p: p.write_bytes(HEADER + struct.pack("<QQ", 1 << 60, 0)),
        "1152921504606846976 tensors",
    ),
    "keys without end": (lambda p: p.write_bytes(HEADER + struct.pack("<QQ", 0, 1 << 60)), "at most 65536"),
    "key of a terabyte": (lambda p: file_of(p, [LONG], []), "a metadata key has 1099511627776 bytes"),
    "text of a terabyte": (lambda p: file_of(p, [pair("k", 8, LONG)], []), "metadata k has 1099511627776 b"),
    "text beyond the end": (
        lambda p: file_of(p, [pair("k", 8, struct.pack("<Q", 1 << 20))], []),
        "ends inside its header",
    ),
    "array without end": (
        lambda p: file_of(p, [pair("k", 9, struct.pack("<IQ", 0, 1 << 60))], []),
        "1152921504606846976 elements",
    ),
    "array beyond the end": (
        lambda p: file_of(p, [pair("k", 9, struct.pack("<IQ", 12, 1 << 20))], []),
        "ends inside its header",
    ),
    "array of arrays": (
        lambda p: file_of(p, [pair("k", 9, struct.pack("<IQ", 9, 1) * 1000)], []),
        "an array of type 9",
    ),
    "unknown type": (lambda p: file_of(p, [pair("k", 77, b"")], []), "metadata k is of type 77"),
    "no text": (lambda p: file_of(p, [pair("k", 8, struct.pack("<Q", 1) + b"\xff")], []), "no UTF-8"),
    "key twice": (lambda p: file_of(p, [pair("k", 7, b"\1")] * 2, []), "two metadata keys 'k'"),
    "tensor twice": (
        lambda p: file_of(p, [], [place("t", (4,), 0, 0), place("t", (4,), 0, 32)]),
        "two tensors 't'",
    ),
    "overlap": (
        lambda p: file_of(p, [], [place("t", (16,), 0, 0), place("u", (16,), 0, 32)]),
        "'u' begins at byte .* inside another",
    ),
    "beyond the end": (lambda p: file_of(p, [], [place("t", (4,), 0, 1 << 62)]), "truncated"),
    "larger than the file": (lambda p: file_of(p, [], [place("t", (1 << 62,) * 4, 0, 0)]), "truncated"),
    "no border": (lambda p: file_of(p, [], [place("t", (4,), 0, 3)]), "a border of 32 bytes"),
    "nothing in it": (lambda p: file_of(p, [], [place("t", (0, 4), 0, 0)]), "is empty"),
    "many dimensions": (lambda p: file_of(p, [], [place("t", (1,) * 9, 0, 0)]), "9 dimensions"),
    "half a block": (lambda p: file_of(p, [], [place("t", (33,), 8, 0)]), "rows of 33 values"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_before_anything_is_allocated(case: str, tmp_path: Path) -> None:
    make, said = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    make(path)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=said) as caught:
            GgufFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "hostile.gguf" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
    ],
)
def test_other_versions_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content + bytes(16))
    with pytest.raises(UnsupportedModelError, match=said):
        GgufFile(tmp_path / "a.gguf")


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'t' is of type IQ2_XXS, .*supported: F32, F16, Q4_0"):
        GgufFile(file_of(tmp_path / "a.gguf", [], [place("t", (256,), 16, 0)]))
    with pytest.raises(UnsupportedModelError, match="'t' is of type 4711"):
        GgufFile(file_of(tmp_path / "a.gguf", [], [place("t", (256,), 4711, 0)]))
    version = pair("general.quantization_version", 4, struct.pack("<I", 1))
    with pytest.raises(UnsupportedModelError, match="quantization_version 1"):
        GgufFile(file_of(tmp_path / "a.gguf", [version], [place("t", (32,), 8, 0)]))


def test_without_the_package_it_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'blockzoo\[gguf\]'"):
        GgufFile(whole)
