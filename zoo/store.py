"""The zoo on disk, for readers: content-addressed blocks and tokenizers, one manifest.

my-zoo/manifest.json   blocks/<id>.safetensors   tokenizers/<sha256>/   plans/tensorrt/<key>
"""

import hashlib
import os
import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from blockzoo.zoo.blocks import Adapter, AdapterSpec, Block, BlockSpec, BlockTensor, tensor_shapes
from blockzoo.zoo.errors import StoreError
from blockzoo.zoo.fingerprint import block_id as compute_block_id
from blockzoo.zoo.fingerprint import files_id
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.tensors import TensorFile


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

    def without(self, models: Collection[str]) -> "Zoo":
        """The zoo as if it did not have some of its models; what is verified in one counts for the other."""
        left = {name: record for name, record in self.manifest.models.items() if name not in models}
        zoo = Zoo(self.path, replace(self.manifest, models=left))
        zoo._verified, zoo._lock = self._verified, self._lock
        return zoo

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
        """Folder of the model's tokenizer files. Raises StoreError when it is missing or corrupt."""
        tokenizer = self.manifest.models[model].tokenizer
        folder = self.path / "tokenizers" / tokenizer
        advice = f"remove the folder and compile model {model} again"
        if not (folder / "tokenizer.json").is_file():
            raise StoreError(f"{folder}: tokenizer.json of model {model} is missing; {advice}")
        with self._lock:
            known = tokenizer in self._verified
        if not known:
            odd = [path.name for path in folder.rglob("*") if not (path.is_file() or path.is_dir())]
            if odd:
                raise StoreError(f"{folder}: {odd[0]!r} is no regular file; {advice}")
            try:
                seen = files_id(_contents(folder))
            except OSError as error:
                raise StoreError(f"{folder}: cannot be read ({error.strerror})") from error
            if seen != tokenizer:
                raise StoreError(
                    f"{folder}: the tokenizer files are not what was compiled (their id is {seen}); {advice}"
                )
            with self._lock:
                self._verified.add(tokenizer)
        return folder

    def read_tokenizer(self, model: str) -> dict[str, bytes]:
        """Contents of the model's tokenizer files by their names in its folder. Raises StoreError."""
        return _contents(self.tokenizer_dir(model))

    def _read_tensors(
        self, block_id: str, spec: BlockSpec | AdapterSpec, tied_to: str | None
    ) -> tuple[dict[str, BlockTensor], TensorFile]:
        path = block_path(self.path, block_id)
        advice = "remove the file and compile its models again"
        try:
            if path.exists() and not path.is_file():  # a fifo would never open
                raise ValueError("no regular file")
            file = TensorFile(path)
            tensors = {name: file.stored(name) for name in tensor_shapes(spec)}
        except FileNotFoundError:
            raise StoreError(f"{path}: missing; compile the models that use it again") from None
        except (ValueError, KeyError) as error:
            raise StoreError(f"{path}: corrupt ({error}); {advice}") from error
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
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


def _contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
