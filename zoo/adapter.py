"""PEFT LoRA folders: `adapter_config.json` and `adapter_model.safetensors` (LoRA: arXiv 2106.09685).

A setting that would change what the adapter computes and is not computed here is refused by name.
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockzoo.zoo.checkpoint import INDEX, SINGLE, open_tensor_file, read_tokenizer_files
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError
from blockzoo.zoo.folder import find_file, read_json
from blockzoo.zoo.model_config import eos_token_ids
from blockzoo.zoo.patterns import How, first_match
from blockzoo.zoo.tensors import BlockTensor, TensorFile

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")  # "default": PEFT's own name for an adapter
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_READ = {"base_model_name_or_path", "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
_READ |= {"use_rslora", "bias", "init_lora_weights", "target_modules", "exclude_modules", "modules_to_save"}
_READ |= {"layers_to_transform", "layers_pattern"}
# settings of the training run
_NEUTRAL = {"task_type", "peft_version", "revision", "inference_mode", "lora_dropout", "auto_mapping"}
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
_LARGEST_SCALE = 3.4e38
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
    modules_to_save: tuple[str, ...]
    """Ends of the names of modules that get a copy of their own, even where the base ties them to others."""
    tokenizer_files: dict[str, bytes]
    """The folder's own, as they are given; without a tokenizer.json they speak of the base's tokenizer."""
    raw_config: dict[str, Any]
    """config.json as it stands, {} where there is none: AutoTokenizer takes the tokenizer's class from it."""
    eos_token_ids: tuple[int, ...] | None
    """Of the folder's own generation_config.json, if that names any."""


def is_adapter(path: Path) -> bool:
    """Whether the folder is a PEFT adapter. Raises CheckpointError where it is a full checkpoint too."""
    if find_file(path, "adapter_config.json") is None:
        return False
    if find_file(path, "config.json") is not None and any(find_file(path, n) for n in (SINGLE, INDEX)):
        raise CheckpointError(
            f"{path} holds a full checkpoint and an adapter: put adapter_config.json and {_WEIGHTS} into a "
            "folder of their own and compile that as NAME=FOLDER@BASE"
        )
    return True


def open_adapter(path: Path) -> LoraAdapter:
    """Open a PEFT LoRA folder. Raises CheckpointError, UnsupportedModelError; both name the folder."""
    config = read_json(path, "adapter_config.json")
    weights = find_file(path, _WEIGHTS)
    try:
        _refuse_unsupported(config)
        if weights is None:
            raise CheckpointError(f"{_WEIGHTS} is missing; save it as safetensors")
        pairs, replacements = _split(config, _read_tensors(open_tensor_file(weights)))
        eos = _end_ids(path)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None
    base_name = str(config.get("base_model_name_or_path") or "")
    raw_config = read_json(path, "config.json") if find_file(path, "config.json") is not None else {}
    saved = _names(config, "modules_to_save")
    return LoraAdapter(path, base_name, pairs, replacements, saved, _tokenizer_files(path), raw_config, eos)


def _end_ids(path: Path) -> tuple[int, ...] | None:
    name = "generation_config.json"
    return None if find_file(path, name) is None else eos_token_ids(read_json(path, name), name)


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    files = read_tokenizer_files(path)
    others = [name for name in _OTHER_TOKENIZERS if find_file(path, name) is not None]
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


def _read_tensors(file: TensorFile) -> dict[str, BlockTensor]:
    """All of the file, by the names that the base's tensors and modules have.

    They stand behind PEFT's prefix or, as transformers' `load_adapter` takes them too, without.
    """
    tensors: dict[str, BlockTensor] = {}
    for saved in file.names:
        name = saved.removeprefix(_PREFIX)
        lora = _LORA.fullmatch(name)
        if lora is not None:
            name = f"{lora[1]}.lora_{lora[2]}"
        elif "lora_" in name:
            raise UnsupportedModelError(
                f"tensor {saved} is no part of a plain LoRA (expected names as "
                f"{_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight)"
            )
        if name in tensors:
            raise CheckpointError(f"{_WEIGHTS} holds {name} twice, under different names ({saved} is one)")
        try:
            tensors[name] = file.tensor(saved)
        except ValueError as error:
            raise CheckpointError(f"{_WEIGHTS}: {error}") from error
        if not tensors[name].is_finite():
            raise CheckpointError(f"{_WEIGHTS}: tensor {saved} holds NaN or infinite values")
    if not tensors:
        raise CheckpointError(f"{_WEIGHTS} holds no tensors")
    return tensors


def _split(
    config: Mapping[str, Any], tensors: Mapping[str, BlockTensor]
) -> tuple[dict[str, LoraPair], dict[str, BlockTensor]]:
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name})
    for module in modules:
        if module.rpartition(".")[2] not in _TARGETS:
            raise UnsupportedModelError(
                f"a LoRA of {module} is not supported (supported: {', '.join(_TARGETS)})"
            )
        for this, other in ("AB", "BA"):
            if f"{module}.lora_{this}" not in tensors:
                raise CheckpointError(f"{module} has lora_{other}, but no lora_{this}")
    others = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    owners = {name: name.rpartition(".")[0].removesuffix(".base_layer") for name in others}
    candidates = sorted({*modules, *(m for m in owners.values() if m.rpartition(".")[2] in _TARGETS)})
    targeted = _targeted(config, candidates)
    strays = sorted(set(modules) - targeted)
    if strays:
        raise CheckpointError(
            f"{_WEIGHTS} has a LoRA of {strays[0]}, which adapter_config.json leaves out (target_modules, "
            "layers_to_transform or exclude_modules) and PEFT would not load: correct one of the two"
        )
    replacements: dict[str, BlockTensor] = {}
    for name, tensor in others.items():
        bare = name.replace(".base_layer.", ".")
        if (bare != name) != (owners[name] in targeted):
            where = "under .base_layer" if owners[name] in targeted else "without .base_layer"
            raise CheckpointError(f"tensor {name} would not be loaded by PEFT, which expects it {where}")
        replacements[bare] = tensor
    rank = _by_pattern(config, "rank_pattern", modules, config.get("r", 8))
    alpha = _by_pattern(config, "alpha_pattern", modules, config.get("lora_alpha", 8))
    pairs = {
        f"{module}.weight": _pair(
            module,
            (tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]),
            rank[module],
            alpha[module],
            bool(config.get("use_rslora")),
        )
        for module in modules
    }
    return pairs, replacements


def _pair(
    module: str, matrices: tuple[BlockTensor, BlockTensor], rank: object, alpha: object, rslora: bool
) -> LoraPair:
    a, b = matrices
    if (
        type(rank) is not int
        or rank < 1
        or not isinstance(alpha, (int, float))
        or isinstance(alpha, bool)
        or not abs(alpha) <= sys.float_info.max  # JSON has NaN, Infinity, and whole numbers beyond floats
    ):
        raise CheckpointError(
            f"adapter_config.json gives r={rank!r:.40} and lora_alpha={alpha!r:.40} for {module}: "
            "expected a whole number and a number"
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
            f"expected [{rank}, in] and [out, {rank}] as adapter_config.json has r={rank}"
        )
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    if not abs(scale) <= _LARGEST_SCALE:
        raise CheckpointError(f"{module} has lora_alpha / r = {scale:.3g}, which is beyond float32")
    return LoraPair(a, b, scale)


def _by_pattern(config: Mapping[str, Any], field: str, modules: list[str], default: Any) -> dict[str, Any]:
    """Module -> the value of the first pattern that matches its name, as PEFT matches them."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"adapter_config.json: {field} must be an object, seen {patterns!r:.60}")
    found = _match(field, [rf"(.*\.)?({pattern})$" for pattern in patterns], "match", modules)
    values = list(patterns.values())
    return {m: default if i is None else values[i] for m, i in zip(modules, found, strict=True)}


def _targeted(config: Mapping[str, Any], modules: list[str]) -> set[str]:
    """Which modules PEFT puts a LoRA on, of those that a LoRA may be on."""
    targets = config.get("target_modules")
    if targets is None:
        targets = ["q_proj", "v_proj"]  # PEFT's choice for all of the architectures
    found = set(modules)
    if targets != "all-linear":
        found = _selected({**config, "target_modules": targets}, "target_modules", modules)
    if config.get("exclude_modules"):
        found -= _selected(config, "exclude_modules", modules)
    for name in _names(config, "modules_to_save"):
        found = {module for module in found if f".{name}." not in f".{module}."}
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return found
    if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise UnsupportedModelError(f"layers_pattern={config['layers_pattern']!r:.60} is not supported")
    wanted = {str(layer) for layer in (layers if isinstance(layers, list) else [layers])}
    return {module for module in found if module.split(".")[2:3] and module.split(".")[2] in wanted}


def _selected(config: Mapping[str, Any], field: str, modules: list[str]) -> set[str]:
    """Those that a setting names: a list of names or ends of names, or one pattern for whole names."""
    value = config[field]
    if isinstance(value, str):
        found = _match(field, [value], "fullmatch", modules)
        return {module for module, i in zip(modules, found, strict=True) if i is not None}
    names = _names(config, field)
    return {m for m in modules if any(m == name or m.endswith(f".{name}") for name in names)}


def _names(config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    names = config.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"adapter_config.json: {field} must be a list of names, seen {names!r:.60}")
    return tuple(names)


def _match(field: str, patterns: list[str], how: How, names: list[str]) -> list[int | None]:
    try:
        return first_match(patterns, how, names)
    except CheckpointError as error:
        raise CheckpointError(f"adapter_config.json: {field}: {error}") from None
