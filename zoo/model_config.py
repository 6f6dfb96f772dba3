"""HF `config.json` -> ModelConfig: everything about a model except its weights.

Defaults of absent fields are those of the `transformers` configuration class of the same architecture. What
blockzoo does not compute is refused by name, never ignored.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError
from blockzoo.zoo.rope import RopeConfig
from blockzoo.zoo.strict_json import decode, encode

__all__ = ["SUPPORTED_ARCHITECTURES", "ModelConfig", "RopeConfig"]

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_LARGEST = sys.float_info.max  # whole numbers in JSON may be larger
_MOST = 2**31 - 1
_MOST_LAYERS = 4096  # a typing error must not become a table of a billion layers


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only model: RMSNorm, GQA with RoPE, gated SiLU feed-forward, pre-norm residual layers."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    rope: RopeConfig
    layer_windows: tuple[int, ...]
    """Per layer: 0 for full attention, else how many tokens (its own included) a token sees."""
    max_position_embeddings: int
    """As config.json has them; with linear scaling those before it, where it has both. See `max_length`."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Of generation_config.json, else of config.json. Where a model ends: `ModelRecord.end_ids`."""

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Read a parsed `config.json` (and `generation_config.json` for the end-of-text ids).

        Where the latter is there and names none, transformers would never end: those of `config.json` hold.
        Raises UnsupportedModelError for what cannot be served, CheckpointError for missing or wrong fields.
        """
        architecture = _architecture(config)
        generation = eos_token_ids(generation_config or {}, "generation_config.json")
        _refuse_unsupported(config)
        reader = _Reader(config)
        hidden_size, num_heads = reader.count("hidden_size"), reader.count("num_attention_heads")
        num_layers = reader.count("num_hidden_layers")
        if num_layers > _MOST_LAYERS:
            raise CheckpointError(
                f"config.json: num_hidden_layers is {num_layers}, at most {_MOST_LAYERS} are read"
            )
        absent = num_heads if "num_key_value_heads" in config else _default_kv_heads(architecture, num_heads)
        num_kv_heads = reader.count("num_key_value_heads", absent)
        head_dim = reader.count(
            "head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads
        )
        if num_heads % num_kv_heads or head_dim % 2:
            raise CheckpointError(
                f"config.json: num_attention_heads {num_heads} must be a multiple of num_key_value_heads "
                f"{num_kv_heads}, and head_dim {head_dim} must be even"
            )
        has_bias_setting = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
        attention_bias = reader.flag("attention_bias") and has_bias_setting
        return cls(
            architecture=architecture,
            hidden_size=hidden_size,
            intermediate_size=reader.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=reader.count("vocab_size"),
            rms_norm_eps=_as_float32(reader.positive("rms_norm_eps", 1e-6)),
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            o_bias=attention_bias,
            mlp_bias=reader.flag("mlp_bias") and architecture == "LlamaForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            rope=RopeConfig.from_hf(config),
            layer_windows=_layer_windows(architecture, reader, num_layers),
            max_position_embeddings=_max_positions(reader),
            bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
            eos_token_ids=(eos_token_ids(config) or ()) if generation is None else generation,
        )

    @property
    def max_length(self) -> int:
        """Tokens of a sequence: with linear and yarn scaling the positions before it times the factor.

        As vLLM counts them, but never less than config.json says; llama3 configurations say the whole length.
        """
        scaled = 0.0
        if self.rope.rope_type == "linear":
            scaled = self.max_position_embeddings * self.rope.factor
        elif self.rope.rope_type == "yarn":
            scaled = self.rope.original_max_position_embeddings * self.rope.factor
        return max(self.max_position_embeddings, round(min(scaled, _MOST)))

    def to_json(self) -> dict[str, Any]:
        """The JSON form that `from_json` reads."""
        return dict(encode(self))

    @classmethod
    def from_json(cls, value: Any) -> "ModelConfig":
        """Read what `to_json` wrote, strictly. Raises ManifestError."""
        return decode(cls, value, "config")


def _max_positions(reader: "_Reader") -> int:
    positions = reader.count("max_position_embeddings")
    rope = reader.config.get("rope_scaling") or reader.config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) != "linear":
        return positions
    field = "original_max_position_embeddings"
    return min(positions, _Reader(rope).count(field, reader.count(field, positions)))


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise CheckpointError(f"config.json: expected one entry in 'architectures', seen {architectures!r}")
    architecture = str(architectures[0])
    if architecture not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        raise UnsupportedModelError(f"architecture {architecture} is not supported (supported: {supported})")
    expected = architecture.removesuffix("ForCausalLM").lower()
    if (
        config.get("model_type", expected) != expected
    ):  # which of the two transformers goes by, and vLLM the other
        raise CheckpointError(
            f"config.json: model_type {config['model_type']!r} contradicts architectures {architecture!r} "
            f"(expected {expected!r}): which one is meant?"
        )
    return architecture


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        )
        raise UnsupportedModelError(
            f"quantized checkpoint (quant_method {method!r}) is not supported: use the bf16, f16 or f32 one"
        )
    for field in ("text_config", "transformers_weights"):  # a nested model; another file than the usual one
        if config.get(field) is not None:
            raise UnsupportedModelError(f"{field} in config.json is not supported")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act {activation!r} is not supported (expected 'silu')")


def _default_kv_heads(architecture: str, num_heads: int) -> int:
    return {"LlamaForCausalLM": num_heads, "MistralForCausalLM": 8}.get(architecture, 32)


def _as_float32(value: float) -> float:
    """The shortest decimal of a number's float32, in which it is computed with: what transformers makes of a
    GGUF file says 9.999999747378752e-06 for 1e-05, and shares its base's blocks only as the same number."""
    return float(str(np.float32(value))) if 1e-30 < value < 1e30 else value


def _layer_windows(architecture: str, reader: "_Reader", num_layers: int) -> tuple[int, ...]:
    if architecture == "LlamaForCausalLM":
        return (0,) * num_layers
    types = _layer_types(reader.config.get("layer_types"), num_layers)
    size = 0 if reader.config.get("sliding_window", 4096) is None else reader.count("sliding_window", 4096)
    if architecture == "MistralForCausalLM":
        if types is not None and len(set(types)) > 1:
            raise UnsupportedModelError("MistralForCausalLM with mixed layer_types is not supported")
        return (size,) * num_layers
    slides = reader.flag("use_sliding_window") and size > 0
    if types is None:
        first = reader.whole("max_window_layers", 28)
        return tuple(size if slides and layer >= first else 0 for layer in range(num_layers))
    if "sliding_attention" in types and not slides:
        raise CheckpointError(
            "config.json: layer_types has sliding_attention, but use_sliding_window or sliding_window is off"
        )
    return tuple(size if kind == "sliding_attention" else 0 for kind in types)


def _layer_types(types: Any, num_layers: int) -> list[str] | None:
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers:
        raise CheckpointError(f"config.json: layer_types must list {num_layers} layers, seen {types!r:.80}")
    unknown = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(f"layer_types {', '.join(unknown)} are not supported")
    return types


def eos_token_ids(config: Mapping[str, Any], file: str = "config.json") -> tuple[int, ...] | None:
    """The end-of-text ids that a config.json or generation_config.json names; None: it names none.

    Raises CheckpointError.
    """
    return None if config.get("eos_token_id") is None else _Reader(config, file).token_ids("eos_token_id")


class _Reader:
    """Typed fields out of `config.json`; messages name the field, the value seen and what was expected."""

    def __init__(self, config: Mapping[str, Any], file: str = "config.json") -> None:
        self.config, self.file = config, file

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
            raise CheckpointError(f"config.json: {name} must be a whole number, seen {value!r}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.whole(name, default)
        if value == 0:
            raise CheckpointError(f"config.json: {name} must be at least 1, seen 0")
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
            raise CheckpointError(f"config.json: {name} must be a positive number, seen {value!r:.60}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.config.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} must be true or false, seen {value!r}")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.config.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise CheckpointError(f"{self.file}: {name} must be a token id or a list of them, seen {value!r}")
        return tuple(ids)
