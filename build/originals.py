"""The oracle of a model to compile, from its original files and those of its adapters.

They are read in a way of its own: nothing but safetensors files and `Source` is shared with what it checks.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from blockzoo.build.oracle import Oracle
from blockzoo.build.sources import Adapted, Source
from blockzoo.zoo.checkpoint import Checkpoint, NamedTensors
from blockzoo.zoo.tensors import TensorFile


def oracle_for(source: Source, rounded: bool, dtype: str | None) -> Oracle:
    """The oracle of a model to compile.

    `rounded`: as served, with every tensor of full checkpoints rounded to `dtype` where that is given, and
    those that an adapter replaces to the dtype of what they replace; LoRAs are exact in any case.
    """
    origin = source.origin
    if isinstance(origin, Adapted):
        return _adapted_oracle(origin.adapter.path, oracle_for(origin.base, rounded, dtype), rounded)
    to_dtype = dtype if rounded else None
    if isinstance(origin, Checkpoint):
        config, (weight, saved_in) = origin.raw_config, _reader(origin.files)
    else:
        config, weight, saved_in = _hf_config(source), _zoo_weight(source), lambda n: source.read(n).dtype
    if to_dtype is None:
        exact = Oracle(config, weight, saved_in)
    else:
        exact = Oracle(config, _rounded(weight, to_dtype), lambda name: to_dtype)
    return _with_pairs(exact, source) if source.pairs else exact


def _rounded(weight: Callable[[str], np.ndarray | None], dtype: str) -> Callable[[str], np.ndarray | None]:
    def rounded(name: str) -> np.ndarray | None:
        values = weight(name)
        return None if values is None else _round(values, dtype)

    return rounded


def _zoo_weight(source: Source) -> Callable[[str], np.ndarray | None]:
    def weight(name: str) -> np.ndarray | None:
        try:
            return source.read(name).to_f32()
        except KeyError:
            return None

    return weight


def _with_pairs(base: Oracle, source: Source) -> Oracle:
    """A model of the zoo with its adapters."""

    def weight(name: str) -> np.ndarray | None:
        values = base.weight(name)
        for pair in source.pairs.get(name, ()) if values is not None else ():
            values = values + np.float32(pair.scale) * (pair.b.to_f32() @ pair.a.to_f32())
        return values

    return Oracle(base.config, weight, base.dtype)


def _reader(
    files: Mapping[str, NamedTensors],
) -> tuple[Callable[[str], np.ndarray | None], Callable[[str], str]]:
    def weight(name: str) -> np.ndarray | None:
        return files[name].tensor(name).to_f32() if name in files else None

    return weight, lambda name: files[name].tensor(name).dtype


def _hf_config(source: Source) -> dict[str, Any]:
    """A config.json of a model of which only the zoo's record is left."""
    config, rope = source.config, asdict(source.config.rope)
    return {
        "architectures": [config.architecture],
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": {**rope, "rope_theta": rope["theta"]},
        "sliding_window": max(config.layer_windows) or None,
        "use_sliding_window": any(config.layer_windows),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in config.layer_windows],
    }


def _adapted_oracle(folder: Path, base: Oracle, rounded: bool) -> Oracle:
    settings = json.loads((folder / "adapter_config.json").read_text())
    file = TensorFile(folder / "adapter_model.safetensors")
    lora = {_plain_name(saved): file.tensor(saved).to_f32() for saved in file.names}
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    was_tied = bool(base.config.get("tie_word_embeddings"))
    ends = [(name, name.removesuffix(".weight")) for name in (embed, head) if name in lora]
    own = [name for name, module in ends if any(map(module.endswith, settings.get("modules_to_save") or []))]
    parted = was_tied and bool(own or len(ends) == 2)
    if was_tied and len(ends) == 1 and not own:  # loaded into the one tensor that both share
        lora[embed] = lora[head] = lora[ends[0][0]]

    def setting(field: str, patterns: str, module: str) -> float:
        for pattern, value in (settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(settings.get(field, 8))

    def weight(name: str) -> np.ndarray | None:
        saved = base.weight(embed if parted and name == head else name)
        module = name.removesuffix(".weight")
        if name in lora:
            saved = lora[name]
            if rounded:
                saved = _round(saved, base.dtype(embed if name == head and was_tied else name))
        if f"{module}.lora_A.weight" in lora and saved is not None:
            rank = setting("r", "rank_pattern", module)
            scale = setting("lora_alpha", "alpha_pattern", module)
            scale /= math.sqrt(rank) if settings.get("use_rslora") else rank
            product = lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
            saved = saved + np.float32(scale) * product
        return saved

    return Oracle({**base.config, "tie_word_embeddings": was_tied and not parted}, weight, base.dtype)


def _plain_name(saved: str) -> str:
    """As the base calls the tensor, or .lora_A.weight and .lora_B.weight behind the module's name."""
    name = saved.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight", name)


def _round(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float32)
    if dtype in ("f32", "i8", "i4"):  # what replaces a quantized matrix is not rounded
        return values
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * np.float32(256)) / np.float32(256), exponent)
