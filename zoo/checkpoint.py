"""HF checkpoint folders: config, safetensors (one file or shards with an index), tokenizer files. Nothing is
copied: tensors are views of the mapped files.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from blockzoo.zoo.chat_files import MORE_TEMPLATES, TEMPLATE
from blockzoo.zoo.errors import CheckpointError
from blockzoo.zoo.folder import find_file, read_json
from blockzoo.zoo.generation_defaults import generation_defaults
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.tensors import BlockTensor, Dtype, TensorFile

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    TEMPLATE,
)
_SAVE_TOKENIZER = (
    "save the fast tokenizer into the folder (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
)


class NamedTensors(Protocol):
    """A file of tensors under HF names."""

    path: Path

    def tensor(self, name: str) -> BlockTensor:
        """The tensor. Raises ValueError for a dtype that is not read."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An HF folder, or a GGUF file read as one, that has been looked through: all is there and whole."""

    path: Path
    config: ModelConfig
    raw_config: dict[str, Any]
    """config.json as it stands, or as a GGUF file's metadata say it."""
    dtype: Dtype
    """The dtype of most weights."""
    tokenizer_files: dict[str, bytes]
    """As they are given, by name."""
    files: Mapping[str, NamedTensors]
    """Tensor name -> the file that holds it."""
    generation_defaults: dict[str, float | int] = field(default_factory=dict)
    """Of generation_config.json."""

    def tensor(self, name: str) -> BlockTensor:
        """A tensor by its HF name, zero-copy unless it was quantized.

        Raises CheckpointError (missing, or of another dtype).
        """
        if name not in self.files:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        try:
            return self.files[name].tensor(name)
        except ValueError as error:
            raise CheckpointError(f"{self.files[name].path}: {error}") from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an HF folder. Raises CheckpointError, UnsupportedModelError; both name the folder."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: expected a local HF checkpoint or PEFT adapter")
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs and find_file(path, "config.json") is None:
        raise CheckpointError(f"{path}: config.json is missing (found {ggufs[0]}: give that file's own path)")
    raw_config = read_json(path, "config.json")
    generation = read_generation_config(path)
    try:
        config = ModelConfig.from_hf(raw_config, generation)
        defaults = generation_defaults(generation or {})
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None
    files = open_tensor_files(path)
    tokenizer = read_tokenizer_files(path)
    if "tokenizer.json" not in tokenizer:
        raise CheckpointError(f"{path}: tokenizer.json is missing; {_SAVE_TOKENIZER}")
    return Checkpoint(path, config, raw_config, _common_dtype(path, files), tokenizer, files, defaults)


def open_tensor_files(path: Path) -> dict[str, TensorFile]:
    """Tensor name -> file, of the folder's `model.safetensors` or else of its shards. Raises CheckpointError.

    As transformers reads them: an index beside the single file is a stale one, and every tensor of a shard
    that the index names is one of the model.
    """
    single = find_file(path, SINGLE)
    if single is not None:
        file = open_tensor_file(single)
        return dict.fromkeys(file.names, file)
    if find_file(path, INDEX) is None:
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        advice = "save the model with safe_serialization=True"
        if others and others[0].endswith(".gguf"):
            advice = "give that file's own path"
        said = f" (found {others[0]}: {advice})" if others else ""
        raise CheckpointError(f"{path}: expected {SINGLE} or {INDEX}{said}")
    weight_map = read_json(path, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            f"{path / INDEX}: expected an object 'weight_map' of tensor names to file names"
        )
    files: dict[str, TensorFile] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{path / INDEX}: {shard!r} is not the name of a file in this folder")
        found = find_file(path, shard)
        if found is None:
            raise CheckpointError(f"{path}: {shard} is missing, which {INDEX} lists")
        file = open_tensor_file(found)
        for name in file.names:
            if name in files:
                raise CheckpointError(f"{path}: {files[name].path.name} and {shard} both hold {name}")
            files[name] = file
    for name, shard in weight_map.items():
        if name not in files or files[name].path.name != shard:
            raise CheckpointError(f"{path}: {shard} does not hold {name}, contrary to {INDEX}")
    return files


def open_tensor_file(path: Path) -> TensorFile:
    """Map a safetensors file. Raises CheckpointError when it is truncated or corrupt."""
    try:
        return TensorFile(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {error}; copy or download it again") from error


def read_generation_config(path: Path) -> dict[str, Any] | None:
    """generation_config.json of a folder, if it has one. Raises CheckpointError."""
    name = "generation_config.json"
    return None if find_file(path, name) is None else read_json(path, name)


def read_tokenizer_files(path: Path) -> dict[str, bytes]:
    """Contents of the folder's tokenizer files by name, chat templates among them.

    Raises CheckpointError for a tokenizer.json that is no JSON.
    """
    if find_file(path, "tokenizer.json") is not None:
        read_json(path, "tokenizer.json")
    more = sorted(f"{MORE_TEMPLATES}/{file.name}" for file in (path / MORE_TEMPLATES).glob("*.jinja"))
    found = {name: find_file(path, name) for name in (*_TOKENIZER_FILES, *more)}
    return {name: file.read_bytes() for name, file in found.items() if file is not None}


def _common_dtype(path: Path, files: dict[str, TensorFile]) -> Dtype:
    sizes: Counter[Dtype] = Counter()
    for name, file in files.items():
        try:
            tensor = file.tensor(name)
        except ValueError:
            continue  # told when the tensor is asked for: it may be one that no block needs
        sizes[tensor.given_dtype] += tensor.data.size
    if not sizes:
        raise CheckpointError(f"{path}: no bf16, f16 or f32 tensors in the safetensors files")
    return sizes.most_common(1)[0][0]
