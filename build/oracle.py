"""An independent forward of a checkpoint: numpy float32, straight from the HF tensors and config.json.

It shares no code with what it checks: its own reading of the configuration, its own RoPE (in float64), its
own LoRA arithmetic and rounding; dense causal attention, one tensor in memory at a time. Slow and simple.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NAME = "numpy float32"


@dataclass(frozen=True, slots=True)
class Oracle:
    """A model as the oracle sees it."""

    config: Mapping[str, Any]
    """config.json"""
    weight: Callable[[str], np.ndarray | None]
    """HF name -> float32 values, None where the model has no such tensor."""
    dtype: Callable[[str], str]
    """HF name -> the dtype in which the tensor was saved."""
    on_input: Callable[[str, np.ndarray], None] = lambda name, x: None
    """Hears what each layer's matrices are multiplied with: HF name, float32 [tokens, in]."""

    @np.errstate(over="ignore", invalid="ignore")
    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        last: int,
        on_layer: Callable[[int], None] = lambda layer: None,
    ) -> list[np.ndarray]:
        """Teacher-forced: of each token sequence the logits of its last positions, f32 [last, vocab]; not
        finite where the weights are too large for f32."""
        hidden = self.embedded(sequences)
        for layer in range(self.config["num_hidden_layers"]):
            on_layer(layer)
            hidden = self._layer(layer, hidden)
        norm = self._need("model.norm.weight")
        tied = self.config.get("tie_word_embeddings")
        head = self._need("model.embed_tokens.weight" if tied else "lm_head.weight")
        return [self._rms(states[-last:], norm) @ head.T for states in hidden]

    def embedded(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Of each token sequence what enters the first layer, f32 [tokens, hidden]."""
        embed = self._need("model.embed_tokens.weight")
        return [embed[np.asarray(tokens)] for tokens in sequences]

    def _need(self, name: str) -> np.ndarray:
        weight = self.weight(name)
        if weight is None:
            raise KeyError(name)
        return weight

    def _rms(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        eps = np.float32(self.config.get("rms_norm_eps", 1e-6))
        return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        self.on_input(f"{name}.weight", x)
        y = x @ self._need(f"{name}.weight").T
        bias = self.weight(f"{name}.bias")
        return y if bias is None else y + bias

    def _layer(self, layer: int, hidden: list[np.ndarray]) -> list[np.ndarray]:
        return self.feed_forward(layer, self.attention(layer, hidden))

    def attention(self, layer: int, hidden: list[np.ndarray]) -> list[np.ndarray]:
        """Of each sequence, f32 [tokens, hidden]: a layer's first half with its residual."""
        prefix = f"model.layers.{layer}."
        lengths = [len(states) for states in hidden]
        x = np.concatenate(hidden)
        normed = self._rms(x, self._need(prefix + "input_layernorm.weight"))
        q, k, v = (self._linear(normed, f"{prefix}self_attn.{name}_proj") for name in "qkv")
        mixed, begin = [], 0
        q_norm, k_norm = (self.weight(f"{prefix}self_attn.{name}_norm.weight") for name in "qk")
        for length in lengths:
            rows = slice(begin, begin + length)
            mixed.append(
                self._mixed(q[rows], k[rows], v[rows], (q_norm, k_norm), _window(self.config, layer))
            )
            begin += length
        x = x + self._linear(np.concatenate(mixed), prefix + "self_attn.o_proj")
        return np.split(x, np.cumsum(lengths)[:-1])

    def feed_forward(self, layer: int, hidden: list[np.ndarray]) -> list[np.ndarray]:
        """Of each sequence, f32 [tokens, hidden]: a layer's second half with its residual."""
        prefix = f"model.layers.{layer}."
        x = np.concatenate(hidden)
        normed = self._rms(x, self._need(prefix + "post_attention_layernorm.weight"))
        gate = self._linear(normed, prefix + "mlp.gate_proj")
        gate = gate / (1 + np.exp(-np.clip(gate, -80, None)))
        x = x + self._linear(gate * self._linear(normed, prefix + "mlp.up_proj"), prefix + "mlp.down_proj")
        return np.split(x, np.cumsum([len(states) for states in hidden])[:-1])

    def _mixed(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        norms: tuple[np.ndarray | None, np.ndarray | None],
        window: int | None,
    ) -> np.ndarray:
        length, heads = len(q), self.config["num_attention_heads"]
        dim = q.shape[1] // heads
        q, k, v = (part.reshape(length, -1, dim) for part in (q, k, v))
        if norms[0] is not None and norms[1] is not None:
            q, k = self._rms(q, norms[0]), self._rms(k, norms[1])
        angles = np.outer(np.arange(length), _frequencies(self.config, dim))[:, None, :]
        factor = _attention_factor(self.config)
        q, k = _rotated(q, angles, factor), _rotated(k, angles, factor)
        position = np.arange(length)
        seen = position[None, :] <= position[:, None]
        if window is not None:
            seen &= position[None, :] > position[:, None] - window
        out = np.empty((length, heads, dim), np.float32)
        group = heads // k.shape[1]
        for head in range(heads):
            scores = q[:, head] @ k[:, head // group].T / np.float32(math.sqrt(dim))
            scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // group]
        return out.reshape(length, heads * dim)


def _window(config: Mapping[str, Any], layer: int) -> int | None:
    model_type = config["architectures"][0]
    if model_type == "LlamaForCausalLM":
        return None
    window = config.get("sliding_window", 4096)
    if model_type == "MistralForCausalLM" or window is None:
        return window
    if not config.get("use_sliding_window"):
        return None
    types = config.get("layer_types")
    slides = types[layer] == "sliding_attention" if types else layer >= config.get("max_window_layers", 28)
    return window if slides else None


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], str, float]:
    settings = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = settings.get("rope_type") or settings.get("type") or "default"
    return settings, kind, settings.get("rope_theta") or config.get("rope_theta") or 10000.0


def _trained_positions(config: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    field = "original_max_position_embeddings"
    return int(config.get(field) or settings.get(field) or config["max_position_embeddings"])


def _frequencies(config: Mapping[str, Any], dim: int) -> np.ndarray:
    """[dim / 2] float64, radians per position."""
    settings, kind, theta = _rope(config)
    plain = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    if kind == "default":
        return plain
    scale = settings.get("factor")
    if kind == "linear":
        return plain / scale
    trained = _trained_positions(config, settings)
    turns = trained * plain / (2 * math.pi)  # full turns of each pair over the trained context
    if kind == "llama3":
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return plain * (keep + (1 - keep) / scale)
    scale = scale or config["max_position_embeddings"] / trained
    edges = [
        dim * math.log(trained / (2 * math.pi * (settings.get(name) or default))) / (2 * math.log(theta))
        for name, default in (("beta_fast", 32), ("beta_slow", 1))
    ]
    if settings.get("truncate", True):
        edges = [math.floor(edges[0]), math.ceil(edges[1])]
    low, high = max(edges[0], 0), min(edges[1], dim - 1)
    slowed = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain * (1 - slowed) + plain / scale * slowed


def _attention_factor(config: Mapping[str, Any]) -> float:
    settings, kind, _ = _rope(config)
    if kind != "yarn":
        return 1.0
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    scale = settings.get("factor") or (
        config["max_position_embeddings"] / _trained_positions(config, settings)
    )
    log = 0.1 * math.log(scale) if scale > 1 else 0.0
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return (settings["mscale"] * log + 1) / (settings["mscale_all_dim"] * log + 1)
    return log + 1


def _rotated(x: np.ndarray, angles: np.ndarray, factor: float) -> np.ndarray:
    """x [tokens, heads, dim]: the pair (i, i + dim / 2) turned by angles [tokens, 1, dim / 2]."""
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(np.float32)
