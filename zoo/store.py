"""The zoo on disk: content-addressed blocks and tokenizers, one manifest; readers and the one writer.

    my-zoo/manifest.json   blocks/<id>.safetensors   tokenizers/<sha256>/   plans/tensorrt/<key>   .lock

A file appears under its final name only when it is whole (temporary name, fsync, rename), and the manifest
is written last: a writer killed at any moment leaves the zoo as it was, plus files that nothing refers to.
The next writer reuses those it needs and collects the rest.
"""

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from blockzoo.zoo.blocks import Adapter, AdapterSpec, Block, BlockSpec, BlockTensor, tensor_shapes
from blockzoo.zoo.errors import StoreError
from blockzoo.zoo.fingerprint import block_id as compute_block_id
from blockzoo.zoo.fingerprint import files_id
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.tensors import TensorFile, tensor_file_bytes, write_tensor_file

_TEMPORARY = ".tmp-"  # prefix of files that are not whole yet


class Zoo:
    """A zoo, open for reading. Thread-safe; checksums are verified once per block and process."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Zoo":
        """Open the zoo directory `path`. Raises StoreError where there is none, ManifestError."""
        root = Path(path)
        try:
            manifest = Manifest.load(root / "manifest.json")
        except (FileNotFoundError, NotADirectoryError):
            seen = "has no manifest.json" if root.is_dir() else "is not a directory"
            raise StoreError(f"{root} {seen}: expected a zoo, written by zoo-compile -o {root}") from None
        return cls(root, manifest)

    def read_block(self, block_id: str) -> Block:
        """Map a block's weights; a tied head gets `weight` from its embed block.

        Raises StoreError when a file is missing or corrupt, KeyError for an id that is not in the manifest.
        """
        record = self.manifest.blocks[block_id]
        tensors, file = self._read_tensors(block_id, record.spec, record.tied_to)
        if record.tied_to is None:
            return Block(block_id, record.spec, tensors, (file,))
        embed = self.read_block(record.tied_to)
        tensors["weight"] = embed.tensors["weight"]
        return Block(block_id, record.spec, tensors, (file, *embed.files))

    def read_tensorrt_plan(self, key: str) -> bytes:
        """A serialized plan. Raises StoreError when it is missing or corrupt."""
        path = tensorrt_plan_path(self.path, key)
        advice = "run zoo-compile --backend tensorrt on the zoo again"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"{path}: missing; {advice}") from None
        if hashlib.sha256(content).hexdigest() != self.manifest.tensorrt_plans[key].sha256:
            raise StoreError(f"{path}: corrupt (checksum); remove the file and {advice}")
        return content

    def read_adapter(self, adapter_id: str) -> Adapter:
        """Map an adapter's matrices; raises as `read_block`."""
        spec = self.manifest.adapters[adapter_id].spec
        tensors, file = self._read_tensors(adapter_id, spec, None)
        return Adapter(adapter_id, spec, tensors, (file,))

    def tokenizer_dir(self, model: str) -> Path:
        """Folder of the model's tokenizer files. Raises StoreError when it is missing."""
        folder = self.path / "tokenizers" / self.manifest.models[model].tokenizer
        if not (folder / "tokenizer.json").is_file():
            raise StoreError(f"{folder}: tokenizer.json of model {model} is missing; compile the model again")
        return folder

    def read_tokenizer(self, model: str) -> dict[str, bytes]:
        """Contents of the model's tokenizer files by their names in its folder. Raises StoreError."""
        folder = self.tokenizer_dir(model)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def check_tokenizer(self, model: str) -> None:
        """Verify the checksum of a model's tokenizer files. Raises StoreError."""
        folder = self.tokenizer_dir(model)
        seen = files_id(self.read_tokenizer(model))
        if seen != folder.name:
            raise StoreError(f"{folder}: the tokenizer files are not what was compiled (checksum {seen})")

    def _read_tensors(
        self, block_id: str, spec: BlockSpec | AdapterSpec, tied_to: str | None
    ) -> tuple[dict[str, BlockTensor], TensorFile]:
        path = block_path(self.path, block_id)
        advice = "remove the file and compile its models again"
        try:
            file = TensorFile(path)
            tensors = {name: file.tensor(name) for name in tensor_shapes(spec)}
        except FileNotFoundError:
            raise StoreError(f"{path}: missing; compile the models that use it again") from None
        except (ValueError, KeyError) as error:
            raise StoreError(f"{path}: corrupt ({error}); {advice}") from error
        for name, shape in tensor_shapes(spec).items():
            if tensors[name].shape != shape:
                raise StoreError(
                    f"{path}: {name} has shape {tensors[name].shape}, expected {shape}; {advice}"
                )
        with self._lock:
            known = block_id in self._verified
        if not known:
            seen = compute_block_id(spec, tensors, tied_to)
            if seen != block_id:
                raise StoreError(f"{path}: corrupt (its content has the id {seen}); {advice}")
            with self._lock:
                self._verified.add(block_id)
        return tensors, file


def manifest_stamp(zoo: Path) -> tuple[int, int] | None:
    """Changes whenever the zoo's manifest is written; None while there is no zoo."""
    try:
        found = (zoo / "manifest.json").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def block_path(zoo: Path, block_id: str) -> Path:
    """Where a zoo keeps a block."""
    return zoo / "blocks" / f"{block_id}.safetensors"


def tensorrt_plan_path(zoo: Path, key: str) -> Path:
    """Where a serialized TensorRT plan lies."""
    return zoo / "plans" / "tensorrt" / key


def timing_cache_name(library: str, version: str, target: str) -> str:
    """The file, beside the plans, of the timings that a library measured on a target."""
    return f"timing-{library}-{version}-{target}"


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
            _sync_directory(written)
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
                _sync_directory(self.path / name)
        temporary = self.path / f"{_TEMPORARY}manifest.json"
        _write_synced(temporary, manifest.to_text().encode())
        temporary.rename(self.path / "manifest.json")
        _sync_directory(self.path)
        self._new.clear()
        self.manifest = manifest
        return self._collect_garbage()

    def _collect_garbage(self) -> int:
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
                    freed += _remove(path)
        return freed


_FOLDERS = ("blocks", "tokenizers", "plans/tensorrt")
_OWN_NAMES = {".lock", "blocks", "tokenizers", "plans"}


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
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
