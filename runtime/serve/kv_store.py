"""KV of published documents on disk, so that the next start loads it instead of computing it.

    <folder>/<sha256 of the identity>.safetensors    K and V of one document in one run of layers

The identity of a file says what its KV was computed from: all blocks and adapters up to the last layer (block
ids stand for weights, operators and rotary settings), the tokens, the layout of the pages, and backend,
version, precision and target. Where any of it changes, another file is meant. It is a cache and no more: a
file that is missing, damaged or not what it says is computed anew and replaced, and where nothing can be
written nothing is kept, which is said once. The folder must be as well guarded as the weights: who can write
there decides what the models read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockzoo.engines.kv_pages import KVPrecision, grid_of
from blockzoo.zoo.tensors import BlockTensor, TensorFile, tensor_file_bytes, write_tensor_file
from blockzoo.zoo.writer import sync_directory

_FORMAT = 1
_SUFFIX, _TEMPORARY = ".safetensors", ".tmp-"
_STALE_S = 3600.0  # a temporary file that is older was left by a process that was killed
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KVPart:
    """KV that may be on disk: whole pages of tokens in layers [first_layer, end_layer) of a chain.

    Attributes:
        blocks_key: stands for all that computes in the chain up to the last layer.
        token_ids: int32 [32 * pages].
        page_shape: [kv_heads, 32, width].
        dtype: of the pages.
    """

    blocks_key: str
    first_layer: int
    end_layer: int
    token_ids: np.ndarray
    page_shape: tuple[int, ...]
    dtype: KVPrecision

    @property
    def shape(self) -> tuple[int, ...]:
        """Of K, and of V: [layers, pages, kv_heads, 32, width]."""
        pages = self.token_ids.size // self.page_shape[1]
        return (self.end_layer - self.first_layer, pages, *self.page_shape)

    def identity(self, engine_facts: Mapping[str, object]) -> str:
        """What the KV depends on, as JSON."""
        return json.dumps(
            {
                "format": _FORMAT,
                "blocks": self.blocks_key,
                "layers": [self.first_layer, self.end_layer],
                "tokens": hashlib.sha256(self.token_ids.astype("<i4").tobytes()).hexdigest(),
                "shape": self.shape,
                "dtype": self.dtype,
                "engine": {name: str(value) for name, value in engine_facts.items()},
            },
            sort_keys=True,
        )


class KVStore:
    """The files of one folder, within a budget; the least recently used go first.

    Args:
        folder: made where it does not exist.
        max_bytes: of all files. Those that this process uses are never removed for others.
        engine_facts: backend, version, precision, target.
    """

    def __init__(self, folder: Path, max_bytes: int, engine_facts: Mapping[str, object]) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._facts = dict(engine_facts)
        self._used: set[Path] = set()  # whole, as far as this process has seen
        self.num_loaded = 0
        self.num_rejected = 0
        self._told = False  # that something could not be kept
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for file in folder.glob(f"{_TEMPORARY}*"):
                if time.time() - file.stat().st_mtime > _STALE_S:
                    file.unlink(missing_ok=True)
        except OSError as error:
            self._tell(error)

    def load(self, part: KVPart) -> tuple[np.ndarray, np.ndarray] | None:
        """K and V of a part, read only, as pages hold them; None where the folder has no sound file of it."""
        identity = part.identity(self._facts)
        path = self._path(identity)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError("not a file")
            keys, values = _read(path, part, identity)
            with suppress(OSError):  # a folder that can only be read is of use too
                os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError) as error:
            self.num_rejected += 1
            _LOG.warning("%s: ignored, its KV is computed anew: %s", path, error)
            return None
        self._used.add(path)
        self.num_loaded += 1
        return keys, values

    def save(self, part: KVPart, keys: np.ndarray, values: np.ndarray) -> None:
        """Keep K and V, each of part.shape. Where that fails a warning says so, the first time."""
        identity = part.identity(self._facts)
        path = self._path(identity)
        if path in self._used:
            return
        pages = {"key": keys, "value": values}
        tensors = {name: _tensor(contents, part.dtype) for name, contents in pages.items()}
        metadata = {"identity": identity, "sha256": _checksum(pages)}
        temporary = self._folder / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            if not self._make_room(tensor_file_bytes(tensors, metadata)):
                return
            write_tensor_file(temporary, tensors, metadata)
            os.replace(temporary, path)
            sync_directory(self._folder)
            self._used.add(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            _LOG.warning(
                "kv_cache_dir %s: KV of published documents is not kept for the next start (%s); name a "
                "folder that can be written, on a disk with room",
                *(self._folder, error),
            )

    def _make_room(self, num_bytes: int) -> bool:
        """Remove the files used longest ago, but none of this process."""
        found = [(file.stat(), file) for file in self._folder.glob(f"*{_SUFFIX}")]
        others = sorted((info.st_mtime, info.st_size, file) for info, file in found if file not in self._used)
        total = sum(info.st_size for info, _ in found) + num_bytes
        if total - sum(size for _, size, _ in others) > self._max_bytes:
            _LOG.warning(
                "%s: %d bytes of KV are not kept for the next start: kv_cache_dir_bytes (%d) does not allow "
                "them beside those of the other published documents; raise it",
                *(self._folder, num_bytes, self._max_bytes),
            )
            return False
        for _, size, file in others:
            if total <= self._max_bytes:
                break
            file.unlink(missing_ok=True)
            total -= size
        return True

    def _path(self, identity: str) -> Path:
        return self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()}{_SUFFIX}"


def _read(path: Path, part: KVPart, identity: str) -> tuple[np.ndarray, np.ndarray]:
    """K and V of a file. Raises ValueError, KeyError, OSError where it is not what it should be."""
    file = TensorFile(path)
    if file.metadata.get("identity") != identity:
        raise ValueError(f"it says that it holds {file.metadata.get('identity')!r:.200}")
    if sorted(file.names) != ["key", "value"]:
        raise ValueError(f"it holds the tensors {file.names!r:.200}; expected key and value")
    pages = {name: _pages(file, name, part) for name in ("key", "value")}
    if _checksum(pages) != file.metadata.get("sha256"):
        raise ValueError("its contents have another checksum")
    if not all(_is_finite(contents, part.dtype) for contents in pages.values()):
        raise ValueError("it holds values that are not finite")
    return pages["key"], pages["value"]


def _tensor(pages: np.ndarray, dtype: KVPrecision) -> BlockTensor:
    """Pages as a file's tensor: those in 8 bits, which hold scales too, as so many bytes."""
    return BlockTensor("i8", pages.view(np.int8)) if dtype == "u8" else BlockTensor(dtype, pages)


def _pages(file: TensorFile, name: str, part: KVPart) -> np.ndarray:
    if part.dtype == "u8":
        dtype, pages = "u8", file.octets(name)
    else:
        tensor = file.tensor(name)
        dtype, pages = tensor.dtype, tensor.data
    if dtype != part.dtype or pages.shape != part.shape:
        raise ValueError(f"{name} is {dtype} {list(pages.shape)}; expected {part.dtype} {list(part.shape)}")
    return pages


def _is_finite(pages: np.ndarray, dtype: KVPrecision) -> bool:
    if dtype == "u8":
        return bool(np.isfinite(grid_of(pages)).all())
    return BlockTensor(dtype, pages).is_finite()


def _checksum(pages: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in ("key", "value"):
        digest.update(np.ascontiguousarray(pages[name]).data)
    return digest.hexdigest()
