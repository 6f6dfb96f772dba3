"""The metadata of a GGUF file as the `config.json` of the checkpoint of which it was made.

Metadata of the architecture that would change what the model computes, and is not read, is refused by name.
"""

from pathlib import Path
from typing import Any

import numpy as np

from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError
from blockzoo.zoo.gguf_file import GgufFile
from blockzoo.zoo.rope import RopeConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""As GGUF has them (Mistral models are llama there) -> as HF has them."""
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor [head_dim / 2] by which llama3 scaling divides the frequencies."""
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_READ = {"block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"}
_READ |= {f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length")}
_READ |= {"attention.layer_norm_rms_epsilon", "attention.causal"}
_READ |= {"rope.dimension_count", "rope.freq_base", "rope.scale_linear"}
_SCALING = ("type", "factor", "original_context_length", "attn_factor", "yarn_ext_factor")
_READ |= {
    f"rope.scaling.{name}" for name in (*_SCALING, "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")
}
# how it was made; an epsilon of the norm that these architectures do not have
_NEUTRAL = {"rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon"}
_LLAMA3 = (1.0, 4.0, 8192)  # low and high frequency factor, trained context: of all Llama 3 releases
_FACTOR_TOLERANCE = 1e-5  # relative; the tensor is rounded to f32


class Metadata:
    """Typed values out of a file's metadata; messages name the key, the value seen and what was expected."""

    def __init__(self, path: Path, values: dict[str, Any], architecture: str = "") -> None:
        self.path, self.values, self._prefix = path, values, architecture

    def get(self, name: str) -> Any:
        """A value of the architecture; None where it is absent."""
        return self.values.get(f"{self._prefix}.{name}")

    def whole(self, key: str) -> int | None:
        """A whole number by its full key; None where it is absent."""
        value = self.values.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < 2**31):
            raise self._unfit(key, value, "a whole number")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A positive whole number of the architecture."""
        value = self.whole(f"{self._prefix}.{name}")
        value = default if value is None else value
        if value is None or value < 1:
            raise self._unfit(f"{self._prefix}.{name}", value, "a whole number from 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number of the architecture."""
        value = self.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or value is None or not 0 < value < float("inf"):
            raise self._unfit(f"{self._prefix}.{name}", value, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool | None:
        """True or false by its full key; None where it is absent."""
        return self._typed(key, bool, "true or false")

    def text(self, key: str) -> str | None:
        """A text by its full key; None where it is absent."""
        return self._typed(key, str, "a text")

    def texts(self, key: str) -> list[str] | None:
        """A list of texts by its full key; None where it is absent."""
        return self._typed(key, list, "a list of texts")

    def numbers(self, key: str) -> tuple[Any, ...] | None:
        """A list of numbers by its full key; None where it is absent."""
        return self._typed(key, tuple, "a list of numbers")

    def _typed(self, key: str, kind: type, expected: str) -> Any:
        value = self.values.get(key)
        if value is not None and type(value) is not kind:
            raise self._unfit(key, value, expected)
        return value

    def _unfit(self, key: str, value: object, expected: str) -> CheckpointError:
        seen = "it is missing" if value is None else f"seen {value!r:.60}"
        return CheckpointError(f"{self.path}: metadata {key}: {seen}, expected {expected}")


def hf_config(file: GgufFile) -> dict[str, Any]:
    """What config.json and generation_config.json would say of the model.

    Raises CheckpointError, UnsupportedModelError; both name the file.
    """
    metadata, path = file.metadata, file.path
    _refuse_other_files(path, metadata)
    name = Metadata(path, metadata).text("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(
            f"{path}: architecture {name!r:.60} is not supported (supported: {known})"
        )
    reader = Metadata(path, metadata, name)
    _refuse_unknown(path, metadata, name)
    heads, hidden = reader.count("attention.head_count"), reader.count("embedding_length")
    head_dim = reader.count("attention.key_length", reader.count("rope.dimension_count", hidden // heads))
    for other in ("attention.value_length", "rope.dimension_count"):
        if reader.count(other, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{path}: {name}.{other} is {reader.count(other)} and the heads have {head_dim}: that is not "
                "supported"
            )
    tokens = reader.texts("tokenizer.ggml.tokens")
    positions = reader.count("context_length")
    trained = reader.count("rope.scaling.original_context_length", positions)
    rope = _rope(file, reader, trained, head_dim)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[name]],
        "hidden_size": hidden,
        "intermediate_size": reader.count("feed_forward_length"),
        "num_hidden_layers": reader.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": reader.count("vocab_size", len(tokens or ()) or None),
        "max_position_embeddings": positions,
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in file.names,
        "attention_bias": "blk.0.attn_q.bias" in file.names,
        "mlp_bias": "blk.0.ffn_up.bias" in file.names,
    }
    if rope["rope_type"] == "linear":
        config["original_max_position_embeddings"] = trained
    ends = [reader.whole(f"tokenizer.ggml.{end}") for end in _END_TOKENS]
    config["eos_token_id"] = list(dict.fromkeys(end for end in ends if end is not None))
    bos = reader.whole("tokenizer.ggml.bos_token_id")
    return config if bos is None else {**config, "bos_token_id": bos}


def _refuse_other_files(path: Path, metadata: dict[str, Any]) -> None:
    parts = metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise UnsupportedModelError(
            f"{path} is one of {parts!r:.20} parts of a split model, which is not supported: merge them with "
            "llama-gguf-split --merge"
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(f"{path}: general.type {kind!r:.40} is not supported (expected 'model')")


def _refuse_unknown(path: Path, metadata: dict[str, Any], architecture: str) -> None:
    for key, value in metadata.items():
        prefix, _, name = key.partition(".")
        if prefix != architecture or name in _READ | _NEUTRAL:
            continue
        if value:
            raise UnsupportedModelError(f"{path}: metadata {key}={value!r:.60} is not supported")
    if metadata.get(f"{architecture}.attention.causal", True) is not True:
        raise UnsupportedModelError(f"{path}: {architecture}.attention.causal false is not supported")


def _rope(file: GgufFile, reader: Metadata, trained: int, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    theta = reader.number("rope.freq_base", 10000.0)
    old = reader.number("rope.scale_linear", 1.0)  # of the first files with linear scaling
    kind = reader.get("rope.scaling.type")
    factor = reader.number("rope.scaling.factor", old) if reader.get("rope.scaling.factor") != 0 else 1.0
    kind = ("linear" if factor != 1 else "none") if kind is None else kind
    scaled = kind != "none" and factor != 1
    if ROPE_FACTORS in file.names:
        if scaled:
            raise UnsupportedModelError(
                f"{file.path}: {ROPE_FACTORS} beside {kind!r:.40} scaling is not supported"
            )
        return _llama3(file, theta, head_dim)
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{file.path}: RoPE scaling {kind!r:.40} is not supported (supported: linear, yarn and the "
            f"tensor {ROPE_FACTORS})"
        )
    attention = reader.number("rope.scaling.attn_factor", 1.0)
    if not scaled or kind == "linear":
        if attention != 1:
            raise UnsupportedModelError(
                f"{file.path}: rope.scaling.attn_factor without yarn is not supported"
            )
        plain = {"rope_type": "default", "rope_theta": theta}
        return {**plain, "rope_type": "linear", "factor": factor} if scaled else plain
    if reader.number("rope.scaling.yarn_ext_factor", 1.0) != 1:
        raise UnsupportedModelError(
            f"{file.path}: rope.scaling.yarn_ext_factor other than 1 is not supported"
        )
    attention *= reader.number("rope.scaling.yarn_attn_factor", 1.0)
    found = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": trained,
        "beta_fast": reader.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": reader.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if attention != 1:
        found["attention_factor"] = attention * (0.1 * float(np.log(factor)) + 1.0)
    return found


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """llama3 scaling from the factors that it was written as. Raises UnsupportedModelError for others."""
    given = file.tensor(ROPE_FACTORS).to_f32().astype(np.float64)
    if given.shape != (head_dim // 2,) or not np.all((given >= 1) & np.isfinite(given)):
        raise CheckpointError(
            f"{file.path}: tensor {ROPE_FACTORS} has shape {list(given.shape)} or values below 1, expected "
            f"[{head_dim // 2}] divisors of the frequencies"
        )
    factor = float(given.max())
    if factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    plain = RopeConfig("default", theta).inverse_frequencies(head_dim)
    candidates = [_LLAMA3]
    between = (given > 1 + _FACTOR_TOLERANCE) & (given < factor * (1 - _FACTOR_TOLERANCE))
    if between.sum() > 1:
        # there 1 / divisor = (1 - s) / factor + s, s = (trained / wavelength - low) / (high - low): a line.
        # Low, high and trained times the same number are the same line: low is 1.
        s = (1 / given[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(plain[between].astype(np.float64) / (2 * np.pi), s, 1)
        if slope > 0 > offset:
            high = round(1 - 1 / offset, 3)
            candidates.append((1.0, high, round(slope * (high - 1))))
    for low, high, trained in candidates:
        made = RopeConfig("llama3", theta, factor, trained, low_freq_factor=low, high_freq_factor=high)
        if trained > 0 and np.allclose(
            plain / made.inverse_frequencies(head_dim), given, rtol=_FACTOR_TOLERANCE
        ):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained,
            }
    raise UnsupportedModelError(
        f"{file.path}: tensor {ROPE_FACTORS} is no llama3 scaling, others are not supported"
    )
