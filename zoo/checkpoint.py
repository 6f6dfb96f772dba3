"""HF checkpoint folders: config, safetensors (one file or shards with an index), tokenizer files. Nothing is
copied: tensors are views of the mapped files.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockzoo.zoo.chat_files import MORE_TEMPLATES, TEMPLATE
from blockzoo.zoo.errors import CheckpointError
from blockzoo.zoo.generation_defaults import generation_defaults
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.tensors import BlockTensor, Dtype, TensorFile

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    TEMPLATE,
)
_SAVE_TOKENIZER = (
    "save the fast tokenizer into the folder (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An HF folder that has been looked through: every file is there and every tensor file is whole."""

    path: Path
    config: ModelConfig
    raw_config: dict[str, Any]
    """config.json as it stands."""
    dtype: Dtype
    """The dtype of most weights."""
    tokenizer_files: dict[str, bytes]
    """As they are given, by name."""
    files: dict[str, TensorFile]
    """Tensor name -> the file that holds it."""
    generation_defaults: dict[str, float | int] = field(default_factory=dict)
    """Of generation_config.json."""

    def tensor(self, name: str) -> BlockTensor:
        """A tensor by its HF name, zero-copy. Raises CheckpointError (missing, or of another dtype)."""
        if name not in self.files:
            raise CheckpointError(f"{self.path}: tensor {name} is missing from the safetensors files")
        try:
            return self.files[name].tensor(name)
        except ValueError as error:
            raise CheckpointError(f"{self.files[name].path}: {error}") from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an HF folder. Raises CheckpointError, UnsupportedModelError; both name the folder."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: expected a local HF checkpoint or PEFT adapter")
    raw_config = read_json(path / "config.json")
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
    """Tensor name -> file, of the folder's `model.safetensors` or of its shards. Raises CheckpointError."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        single = path / "model.safetensors"
        if not single.exists():
            others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            said = f" (found {others[0]}: save the model with safe_serialization=True)" if others else ""
            raise CheckpointError(f"{path}: expected model.safetensors or model.safetensors.index.json{said}")
        file = open_tensor_file(single)
        return dict.fromkeys(file.names, file)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: expected an object 'weight_map' of tensor names to file names")
    opened: dict[str, TensorFile] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: {shard!r} is not the name of a file in this folder")
        if not (path / shard).exists():
            raise CheckpointError(f"{path}: {shard} is missing, which {index.name} lists")
        opened[shard] = open_tensor_file(path / shard)
    for name, shard in weight_map.items():
        if name not in opened[shard].names:
            raise CheckpointError(f"{path}: {shard} does not hold {name}, contrary to {index.name}")
    return {name: opened[shard] for name, shard in weight_map.items()}


def open_tensor_file(path: Path) -> TensorFile:
    """Map a safetensors file. Raises CheckpointError when it is truncated or corrupt."""
    try:
        return TensorFile(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {error}; copy or download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises CheckpointError when it is missing or something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, seen {type(value).__name__}")
    return value


def read_generation_config(path: Path) -> dict[str, Any] | None:
    """generation_config.json of a folder, if it has one. Raises CheckpointError."""
    file = path / "generation_config.json"
    return read_json(file) if file.exists() else None


def read_tokenizer_files(path: Path) -> dict[str, bytes]:
    """Contents of the folder's tokenizer files by name, chat templates among them.

    Raises CheckpointError for a tokenizer.json that is no JSON.
    """
    if (path / "tokenizer.json").is_file():
        read_json(path / "tokenizer.json")
    more = sorted(f"{MORE_TEMPLATES}/{file.name}" for file in (path / MORE_TEMPLATES).glob("*.jinja"))
    return {
        name: (path / name).read_bytes() for name in (*_TOKENIZER_FILES, *more) if (path / name).is_file()
    }


def _common_dtype(path: Path, files: dict[str, TensorFile]) -> Dtype:
    sizes: Counter[Dtype] = Counter()
    for name, file in files.items():
        try:
            tensor = file.tensor(name)
        except ValueError:
            continue  # told when the tensor is asked for: it may be one that no block needs
        sizes[tensor.dtype] += tensor.data.size
    if not sizes:
        raise CheckpointError(f"{path}: no bf16, f16 or f32 tensors in the safetensors files")
    return sizes.most_common(1)[0][0]
