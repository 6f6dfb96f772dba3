"""Folders that others made: pipes, devices, sockets and links in the place of files."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockzoo.zoo.adapter import open_adapter
from blockzoo.zoo.checkpoint import open_checkpoint
from blockzoo.zoo.errors import CheckpointError
from blockzoo.zoo.folder import find_file, read_json


def bind(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    folder = os.open(path.parent, os.O_RDONLY)  # the whole path is longer than a socket's may be
    listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    listener.close()
    os.close(folder)


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "no regular file"),
    "socket": (bind, "no regular file"),
    "folder": (os.mkdir, "no regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "leads out of its folder"),
    "file elsewhere": (lambda path: path.symlink_to("/etc/passwd"), "leads out of its folder"),
    "beside": (lambda path: path.symlink_to("../secret"), "leads out of its folder"),
    "process": (lambda path: path.symlink_to("/proc/self/environ"), "leads out of its folder"),
    "nothing": (lambda path: path.symlink_to("nowhere"), "which does not exist"),
    "itself": (lambda path: path.symlink_to(path.name), "not readable"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_what_is_no_file_of_the_folder_is_refused(odd: str, name: str, tmp_path: Path) -> None:
    make, said = ODD[odd]
    (tmp_path / "secret").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder / name)
    with pytest.raises(CheckpointError, match=said):
        find_file(folder, name)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder) if name == "config.json" else open_adapter(folder)


def test_links_within_the_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    (tmp_path / "model/real").mkdir(parents=True)
    (tmp_path / "model/real/x.json").write_text('{"a": 1}')
    (tmp_path / "model/x.json").symlink_to("real/x.json")
    (tmp_path / "link").symlink_to("model")
    assert read_json(tmp_path / "link", "x.json") == {"a": 1}
    assert find_file(tmp_path / "link", "y.json") is None
    assert find_file(tmp_path / "link/x.json", "y.json") is None
    assert find_file(tmp_path / "nowhere", "y.json") is None


def test_only_the_blobs_of_the_same_repository_belong_to_a_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    for place in ("models--a--b/blobs", "models--a--c/blobs", "models--a--b/refs"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "f").write_text("{}")
    for name, target in (
        ("own", "../../blobs/f"),
        ("refs", "../../refs/f"),
        ("other", "../../../models--a--c/blobs/f"),
    ):
        (snapshot / name).symlink_to(target)
    assert find_file(snapshot, "own") == snapshot / "own"
    for name in ("refs", "other"):
        with pytest.raises(CheckpointError, match="leads out"):
            find_file(snapshot, name)


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "x" * 300])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        find_file(tmp_path, name)
