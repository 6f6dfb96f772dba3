"""PEFT LoRA folders: `adapter_config.json` and `adapter_model.safetensors` (LoRA: arXiv 2106.09685).

A setting that would change what the adapter computes and is not computed here is refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockzoo.zoo.checkpoint import (
    open_tensor_file,
    read_generation_config,
    read_json,
    read_tokenizer_files,
)
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError
from blockzoo.zoo.generation_defaults import generation_defaults
from blockzoo.zoo.model_config import eos_token_ids
from blockzoo.zoo.tensors import BlockTensor, TensorFile

_PREFIX = "base_model.model."
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_READ = {"base_model_name_or_path", "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
_READ |= {"use_rslora", "bias", "init_lora_weights"}
# settings of the training run, or of which tensors the adapter has (the file itself tells)
_NEUTRAL = {"task_type", "peft_version", "revision", "inference_mode", "lora_dropout", "auto_mapping"}
_NEUTRAL |= {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}
_NEUTRAL |= {"megatron_config", "megatron_core", "qalora_group_size", "eva_config", "lora_ga_config"}
_NEUTRAL |= {"runtime_config", "ensure_weight_tying", "corda_config"}
_OTHER_TOKENIZERS = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tiktoken.model",
    "tekken.json",
)
_BIASES = ("none", "all", "lora_only")  # which biases of the base were trained; the file holds their values
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """One LoRA: the weight it belongs to becomes weight + scale * b @ a."""

    a: BlockTensor
    """[rank, in]"""
    b: BlockTensor
    """[out, rank]"""
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """A PEFT folder that has been looked through."""

    path: Path
    base_name: str
    """base_model_name_or_path as it stands ("" when absent)."""
    pairs: dict[str, LoraPair]
    """HF name of the changed weight -> its LoRA."""
    replacements: dict[str, BlockTensor]
    """HF name -> the tensor that replaces it (modules_to_save, resized embeddings, trained biases)."""
    tokenizer_files: dict[str, bytes]
    """The folder's own, as they are given; without a tokenizer.json they speak of the base's tokenizer."""
    raw_config: dict[str, Any]
    """config.json as it stands, {} where there is none: AutoTokenizer takes the tokenizer's class from it."""
    eos_token_ids: tuple[int, ...] | None
    """Of the folder's own generation_config.json, if that names any."""
    generation_defaults: dict[str, float | int]
    """Of that file too."""


def is_adapter(path: Path) -> bool:
    """Whether the folder is a PEFT adapter."""
    return (path / "adapter_config.json").exists()


def open_adapter(path: Path) -> LoraAdapter:
    """Open a PEFT LoRA folder. Raises CheckpointError, UnsupportedModelError; both name the folder."""
    config = read_json(path / "adapter_config.json")
    try:
        _refuse_unsupported(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from None
    weights = path / "adapter_model.safetensors"
    if not weights.exists():
        raise CheckpointError(f"{path}: adapter_model.safetensors is missing; save it as safetensors")
    file = open_tensor_file(weights)
    pairs, replacements = _split(path, config, file)
    base_name = config.get("base_model_name_or_path") or ""
    raw_config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    generation = read_generation_config(path) or {}
    try:
        eos = eos_token_ids(generation, "generation_config.json")
        defaults = generation_defaults(generation)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    tokenizer = _tokenizer_files(path)
    return LoraAdapter(path, str(base_name), pairs, replacements, tokenizer, raw_config, eos, defaults)


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    files = read_tokenizer_files(path)
    others = [name for name in _OTHER_TOKENIZERS if (path / name).exists()]
    if others and "tokenizer.json" not in files:
        raise CheckpointError(
            f"{path}: {others[0]} is a tokenizer of the adapter's own, but tokenizer.json is missing: save "
            "the fast tokenizer into the folder (AutoTokenizer.from_pretrained(...).save_pretrained(...)), "
            "or take the tokenizer's files out of it to use the base's"
        )
    return files


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedModelError(f"PEFT type {config.get('peft_type')!r} is not supported (only 'LORA')")
    if config.get("use_dora"):
        raise UnsupportedModelError("DoRA (use_dora) is not supported: merge the adapter with PEFT first")
    if config.get("bias", "none") not in _BIASES:
        raise UnsupportedModelError(f"bias={config['bias']!r} is not supported (only {', '.join(_BIASES)})")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise UnsupportedModelError(
            f"init_lora_weights={init!r} changes the base's weights, which is not supported: "
            "convert the adapter to a plain LoRA, or merge it with PEFT first"
        )
    for key, value in config.items():
        if value and key not in _READ and key not in _NEUTRAL:
            raise UnsupportedModelError(f"adapter setting {key}={value!r:.60} is not supported")


def _split(
    path: Path, config: Mapping[str, Any], file: TensorFile
) -> tuple[dict[str, LoraPair], dict[str, BlockTensor]]:
    tensors: dict[str, BlockTensor] = {}
    for name in file.names:
        try:
            tensors[name] = file.tensor(name)
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {error}") from error
        if not tensors[name].is_finite():
            raise CheckpointError(f"{file.path}: tensor {name} holds NaN or infinite values")
    pairs: dict[str, LoraPair] = {}
    replacements: dict[str, BlockTensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(_PREFIX)
        module = plain.removesuffix(".lora_A.weight")
        if module != plain:
            pairs[f"{module}.weight"] = _pair(path, config, module, tensors)
        elif plain.endswith(".lora_B.weight"):
            if name.replace(".lora_B.", ".lora_A.") not in tensors:
                raise CheckpointError(f"{path}: {name} has no lora_A beside it")
        elif ".lora_" in plain:
            raise UnsupportedModelError(f"{path}: tensor {name} is no part of a plain LoRA")
        else:
            replacements[plain.replace(".base_layer.bias", ".bias")] = tensor  # as the base calls it
    if not tensors:
        raise CheckpointError(f"{file.path}: the adapter holds no tensors")
    return pairs, replacements


def _pair(path: Path, config: Mapping[str, Any], module: str, tensors: Mapping[str, BlockTensor]) -> LoraPair:
    if module.rpartition(".")[2] not in _TARGETS:
        raise UnsupportedModelError(
            f"{path}: a LoRA of {module} is not supported (supported: {', '.join(_TARGETS)})"
        )
    a = tensors[f"{_PREFIX}{module}.lora_A.weight"]
    b = tensors.get(f"{_PREFIX}{module}.lora_B.weight")
    if b is None:
        raise CheckpointError(f"{path}: {module} has lora_A, but no lora_B")
    rank = _pattern(config, "rank_pattern", module, config.get("r"))
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise CheckpointError(
            f"{path}: adapter_config.json gives r={rank!r} and lora_alpha={alpha!r} for {module}: "
            "expected a whole number and a number"
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{path}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
            f"expected [{rank}, in] and [out, {rank}] as adapter_config.json has r={rank}"
        )
    return LoraPair(a, b, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name, as PEFT matches them."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"adapter_config.json: {field} must be an object, seen {patterns!r:.60}")
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise CheckpointError(
                f"adapter_config.json: {field} {pattern!r} is no pattern ({error})"
            ) from error
        if matches:
            return value
    return default
