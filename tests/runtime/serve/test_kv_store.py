"""KV on disk: what was saved comes back, anything else is ignored with a warning, nothing crashes."""

from __future__ import annotations

import json
import logging
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blockzoo.engines.kv_pages import pack_u8
from blockzoo.runtime.serve.kv_store import KVPart, KVStore
from blockzoo.zoo.tensors import BlockTensor, write_tensor_file

FACTS = {"backend": "openvino", "version": "1", "precision": "f32", "target": "cpu"}
PART = KVPart("key", 2, 5, np.arange(64, dtype=np.int32), (2, 32, 8), "f32")
RNG = np.random.default_rng(0)
KEYS, VALUES = (RNG.standard_normal(PART.shape).astype(np.float32) for _ in range(2))
PART_BYTES = 2 * KEYS.nbytes


def opened(folder: Path, max_bytes: int = 1 << 30, **facts: str) -> KVStore:
    return KVStore(folder, max_bytes, FACTS | facts)


def saved(folder: Path, part: KVPart = PART) -> Path:
    before = set(folder.glob("*"))
    opened(folder).save(part, KEYS, VALUES)
    (file,) = set(folder.glob("*")) - before
    return file


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    saved(tmp_path)
    store = opened(tmp_path)
    keys, values = store.load(PART)
    np.testing.assert_array_equal(keys, KEYS)
    np.testing.assert_array_equal(values, VALUES)
    assert (store.num_loaded, store.num_rejected) == (1, 0)
    bf16 = replace(PART, dtype="bf16")
    bits = (KEYS.view(np.uint32) >> 16).astype(np.uint16)
    store.save(bf16, bits, bits)
    assert opened(tmp_path).load(bf16)[0].dtype == np.uint16
    assert len(list(tmp_path.iterdir())) == 2  # nothing else is left
    packed = replace(PART, page_shape=(2, 32, 16), dtype="u8")
    store.save(packed, pack_u8(KEYS), pack_u8(VALUES))
    keys, values = opened(tmp_path).load(packed)
    np.testing.assert_array_equal(keys, pack_u8(KEYS))
    np.testing.assert_array_equal(values, pack_u8(VALUES))


@pytest.mark.parametrize(
    "other",
    [
        {"blocks_key": "another block id"},
        {"first_layer": 1, "end_layer": 4},
        {"token_ids": np.arange(1, 65, dtype=np.int32)},
        {"token_ids": np.arange(32, dtype=np.int32)},
        {"page_shape": (2, 16, 16)},
        {"dtype": "bf16"},
    ],
)
def test_other_kv_is_another_file(tmp_path: Path, other: dict[str, object]) -> None:
    saved(tmp_path)
    store = opened(tmp_path)
    assert store.load(replace(PART, **other)) is None
    assert store.num_rejected == 0


def test_another_engine_is_another_file(tmp_path: Path) -> None:
    saved(tmp_path)
    for name in FACTS:
        assert opened(tmp_path, **{name: "other"}).load(PART) is None


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def renamed_identity(data: bytes) -> bytes:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header["__metadata__"]["identity"] = "{}"
    return packed(header, data[8 + int.from_bytes(data[:8], "little") :])


def packed(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


HOSTILE = {
    "empty": lambda data: b"",
    "four bytes": lambda data: data[:4],
    "truncated in the header": lambda data: data[:40],
    "truncated in the data": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "a bit of K": lambda data: flipped(data, len(data) - 2 * KEYS.nbytes + 5),
    "the last bit": lambda data: flipped(data, len(data) - 1),
    "noise": lambda data: np.random.default_rng(1).bytes(len(data)),
    "zeros": lambda data: bytes(len(data)),
    "a header of 2^63 bytes": lambda data: (1 << 63).to_bytes(8, "little") + data[8:],
    "a header that is a list": lambda data: packed([1, 2]),
    "a header without tensors": lambda data: packed({}),
    "deep JSON": lambda data: (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "tensors that overlap": lambda data: packed(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("key", "value")}, b"0123"
    ),
    "a shape too large to be": lambda data: packed(
        {"key": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"0123"
    ),
    "of another identity": renamed_identity,
    "a text": lambda data: b"KV was here\n" * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_file_is_ignored_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = saved(tmp_path)
    file.write_bytes(HOSTILE[name](file.read_bytes()))
    store = opened(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert store.load(PART) is None
    assert store.num_rejected == 1
    assert str(file) in caplog.text
    store.save(PART, KEYS, VALUES)
    np.testing.assert_array_equal(opened(tmp_path).load(PART)[1], VALUES)


def hostile_tensors(folder: Path, **changes: BlockTensor) -> KVStore:
    """A well-formed file with the right name and identity, and a right checksum of other tensors."""
    from blockzoo.runtime.serve.kv_store import _checksum

    file = saved(folder)
    tensors = {"key": BlockTensor("f32", KEYS), "value": BlockTensor("f32", VALUES)} | changes
    metadata = {
        "identity": PART.identity(FACTS),
        "sha256": _checksum({n: t.data for n, t in tensors.items()}),
    }
    write_tensor_file(file, tensors, metadata)
    return opened(folder)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("expected f32 [3, 2, 2, 32, 8]", {"key": BlockTensor("f32", KEYS[:2])}),
        ("expected f32", {"value": BlockTensor("f16", VALUES.astype(np.float16))}),
        ("not finite", {"value": BlockTensor("f32", np.where(VALUES > 3, np.nan, VALUES))}),
        ("expected key and value", {"more": BlockTensor("f32", KEYS)}),
    ],
)
def test_a_sound_file_of_something_else_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: str, changes: dict[str, BlockTensor]
) -> None:
    assert VALUES.max() > 3
    store = hostile_tensors(tmp_path, **changes)
    with caplog.at_level(logging.WARNING):
        assert store.load(PART) is None
    assert reason in caplog.text


@pytest.mark.parametrize("fault", ["a scale of NaN", "another type"])
def test_a_sound_file_of_other_8_bit_pages_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    from blockzoo.runtime.serve.kv_store import _checksum

    part = replace(PART, page_shape=(2, 32, 16), dtype="u8")
    keys, values = pack_u8(KEYS), pack_u8(VALUES)
    opened(tmp_path).save(part, keys, values)
    (file,) = tmp_path.iterdir()
    keys[1, 0, 1, 3, :4] = 255
    pages = {"key": keys, "value": values}
    if fault == "another type":
        tensors = {name: BlockTensor("f32", kv.view(np.float32)) for name, kv in pages.items()}
    else:
        tensors = {name: BlockTensor("i8", kv.view(np.int8)) for name, kv in pages.items()}
    write_tensor_file(file, tensors, {"identity": part.identity(FACTS), "sha256": _checksum(pages)})
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path).load(part) is None
    assert ("not finite" if fault == "a scale of NaN" else "has dtype F32 (expected I8)") in caplog.text


def test_what_is_no_file_is_ignored(tmp_path: Path) -> None:
    for make in (os.mkdir, os.mkfifo):  # reading a fifo would wait for ever
        file = saved(tmp_path)
        file.unlink()
        make(file)
        store = opened(tmp_path)
        assert store.load(PART) is None
        assert store.num_rejected == 1
        store.save(PART, KEYS, VALUES)  # a folder stays in the way: a warning
        assert (opened(tmp_path).load(PART) is None) == file.is_dir()
        file.rmdir() if file.is_dir() else file.unlink()


def test_the_least_recently_used_files_make_room(tmp_path: Path) -> None:
    parts = [replace(PART, blocks_key=str(i)) for i in range(4)]
    for age, part in zip((400, 300, 200), parts, strict=False):
        then = time.time() - age
        os.utime(saved(tmp_path, part), (then, then))
    opened(tmp_path).load(parts[0])  # used now
    store = opened(tmp_path, max_bytes=4 * PART_BYTES - 1)
    store.save(parts[3], KEYS, VALUES)
    assert [opened(tmp_path).load(part) is not None for part in parts] == [True, False, True, True]


def test_files_in_use_are_kept_and_what_does_not_fit_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path, max_bytes=int(1.5 * PART_BYTES))
    store.save(PART, KEYS, VALUES)
    with caplog.at_level(logging.WARNING):
        store.save(replace(PART, blocks_key="more"), KEYS, VALUES)
    assert "kv_cache_dir_bytes" in caplog.text
    assert opened(tmp_path).load(PART) is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        store.save(PART, KEYS, VALUES)
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".tmp-1-old", tmp_path / ".tmp-2-new"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    opened(tmp_path)
    assert [file.exists() for file in (old, new)] == [False, True]


@pytest.mark.parametrize("folder", ["file", "file/folder", "/proc/blockzoo"])
def test_a_folder_that_cannot_be_used_keeps_nothing_and_says_so_once(
    folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = opened(tmp_path / folder)
    for _ in range(2):
        assert store.load(PART) is None
        store.save(PART, KEYS, VALUES)
    assert [record.getMessage() for record in caplog.records] == [caplog.records[0].getMessage()]
    assert f"kv_cache_dir {tmp_path / folder}: KV of published documents is not kept" in caplog.text
    assert store.num_rejected == 0


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may have more than a page: writing ends as it does on a full disk.

    Not for longer than the writing: pytest's own output may go to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_keeps_nothing_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path / "folder")
    large = replace(PART, token_ids=np.tile(PART.token_ids, 64))
    keys, values = (np.ones(large.shape, np.float32) for _ in range(2))
    with small_files():
        store.save(large, keys, values)
        store.save(large, keys, values)
    assert len(caplog.records) == 1
    assert "written); name a folder that can be written, on a disk with room" in caplog.text
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_folder_that_can_only_be_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened(tmp_path).save(PART, KEYS, VALUES)

    def refused(path: Path) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    store = opened(tmp_path)
    assert store.load(PART) is not None
    assert (store.num_loaded, store.num_rejected, caplog.text) == (1, 0, "")
