"""The one writer of a zoo.

A file appears under its final name only when it is whole (temporary name, fsync, rename), and the manifest
is written last: a writer killed at any moment leaves the zoo as it was, plus files that nothing refers to.
The next writer reuses those it needs and collects the rest. Beside what readers know there are `.lock`, and
`.reserve`, disk space for a manifest.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

from blockzoo.zoo.blocks import BlockTensor
from blockzoo.zoo.errors import StoreError
from blockzoo.zoo.fingerprint import files_id
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.store import block_path, tensorrt_plan_path, timing_cache_name
from blockzoo.zoo.tensors import tensor_file_bytes, write_tensor_file

_TEMPORARY = ".tmp-"  # prefix of files that are not whole yet
_FOLDERS = ("blocks", "tokenizers", "plans/tensorrt")
_RESERVE = ".reserve"
_LEAST_RESERVE = 1 << 18  # bytes
_OWN_NAMES = {".lock", _RESERVE, "blocks", "tokenizers", "plans"}


class ZooWriter:
    """The one writer of a zoo, a context manager: leaving it without `commit` removes what was written.

    Raises StoreError when another writer is at work or the directory holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._new: list[Path] = []
        self._created = False
        self._lock_file = -1
        self.manifest = Manifest()

    def __enter__(self) -> "ZooWriter":
        self._check_directory()
        self._created = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            if (self.path / "manifest.json").exists():
                self.manifest = Manifest.load(self.path / "manifest.json")
        except BaseException:
            os.close(self._lock_file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # an interrupted run keeps its whole files: the next one starts from them
            for path in reversed(self._new) if kind is not KeyboardInterrupt else ():
                _remove(path)
            if not (self.path / "manifest.json").exists():
                self._remove_empty_zoo()
        finally:
            os.close(self._lock_file)  # releases the lock

    def _check_directory(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path} is a file; -o expects a zoo directory or a new path")
        if self.path.is_dir() and not (self.path / "manifest.json").exists():
            foreign = sorted(p.name for p in self.path.iterdir() if p.name not in _OWN_NAMES)
            foreign = [name for name in foreign if not name.startswith(_TEMPORARY)]
            if foreign:
                raise StoreError(
                    f"{self.path} is neither a zoo nor empty (it holds {foreign[0]!r}): choose another -o"
                )

    def _take_lock(self) -> None:
        lock = self.path / ".lock"
        while True:
            self._lock_file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._lock_file).st_ino == os.stat(lock).st_ino:
                    return
                os.close(self._lock_file)  # the file was removed with a zoo that came to nothing: once more
            except FileNotFoundError:
                os.close(self._lock_file)
                self.path.mkdir(parents=True, exist_ok=True)
            except BlockingIOError:
                os.close(self._lock_file)
                raise StoreError(
                    f"{self.path}: another zoo-compile is writing to this zoo; try again when it is done"
                ) from None

    def _remove_empty_zoo(self) -> None:
        for name in ("blocks", "tokenizers", "plans/tensorrt", "plans"):
            if (self.path / name).is_dir() and not any((self.path / name).iterdir()):
                (self.path / name).rmdir()
        if {p.name for p in self.path.iterdir()} == {".lock"}:
            (self.path / ".lock").unlink()
            if self._created:
                self.path.rmdir()

    def add_block(
        self, block_id: str, tensors: Mapping[str, BlockTensor], metadata: Mapping[str, str]
    ) -> bool:
        """Store a block's or adapter's tensors unless a whole file is there already; True when written."""
        path = block_path(self.path, block_id)
        if path.exists() and path.stat().st_size == tensor_file_bytes(tensors, metadata):
            return False
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(_TEMPORARY + path.name)
        self._new += [temporary, path]
        write_tensor_file(temporary, tensors, metadata)
        temporary.rename(path)
        return True

    def add_tokenizer(self, files: Mapping[str, bytes]) -> str:
        """Store tokenizer files by name; returns their id, the name of their folder."""
        tokenizer = files_id(files)
        folder = self.path / "tokenizers" / tokenizer
        if folder.is_dir():
            return tokenizer
        folder.parent.mkdir(exist_ok=True)
        temporary = folder.with_name(_TEMPORARY + tokenizer)
        self._new += [temporary, folder]
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            _write_synced(temporary / name, content)
        for written in {temporary, *((temporary / name).parent for name in files)}:
            sync_directory(written)
        temporary.rename(folder)
        return tokenizer

    def add_tensorrt_plan(self, key: str, content: bytes) -> None:
        """Store a serialized plan, or a timing cache, under its key."""
        path = tensorrt_plan_path(self.path, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(_TEMPORARY + key)
        self._new += [temporary, path]
        _write_synced(temporary, content)
        temporary.rename(path)

    def commit(self, manifest: Manifest) -> int:
        """Make `manifest` the zoo's; then drop what it does not refer to. Returns the bytes freed."""
        manifest.check("manifest.json")
        for name in _FOLDERS:
            if (self.path / name).is_dir():
                sync_directory(self.path / name)
        temporary = self.path / f"{_TEMPORARY}manifest.json"
        content = manifest.to_text().encode()
        self._new.append(temporary)
        try:
            _write_synced(temporary, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            (self.path / _RESERVE).unlink(missing_ok=True)
            _write_synced(temporary, content)
        temporary.rename(self.path / "manifest.json")
        sync_directory(self.path)
        passing = set(self._new)  # written on the way to what is kept
        self._new.clear()
        self.manifest = manifest
        freed = self._collect_garbage(passing)
        self._keep_reserve(len(content))
        return freed

    def _keep_reserve(self, manifest_bytes: int) -> None:
        """Keep room for the next manifest: without it, nothing could be removed from a zoo on a full disk."""
        size = max(_LEAST_RESERVE, 1 << (2 * manifest_bytes).bit_length())
        reserve = self.path / _RESERVE
        if reserve.exists() and reserve.stat().st_size == size:
            return
        reserve.unlink(missing_ok=True)
        try:
            with open(reserve, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError:  # the disk is full still
            reserve.unlink(missing_ok=True)

    def _collect_garbage(self, passing: Collection[Path]) -> int:
        """Remove what is not used; the bytes, those of files that this writer wrote not counted."""
        used = {f"{key}.safetensors" for key in (*self.manifest.blocks, *self.manifest.adapters)}
        used |= {model.tokenizer for model in self.manifest.models.values()}
        used |= self.manifest.tensorrt_plans.keys()
        used |= {
            timing_cache_name(plan.library, plan.library_version, plan.target)
            for plan in self.manifest.tensorrt_plans.values()
        }
        freed = 0
        for name in _FOLDERS:
            folder = self.path / name
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.name not in used:
                    size = _remove(path)
                    freed += 0 if path in passing else size
        return freed


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Have the names in a directory reach the disk."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _remove(path: Path) -> int:
    """Remove a file or folder if it is there; the bytes of its files."""
    if path.is_dir():
        freed = sum(_remove(child) for child in path.iterdir())
        path.rmdir()
        return freed
    if not path.exists():
        return 0
    freed = path.stat().st_size
    path.unlink()
    return freed
