"""Rotary position embedding: the settings as they stand in `config.json`, and the cos/sin tables.

Sources: RoFormer (arXiv 2104.09864); linear scaling (kaiokendev, arXiv 2306.15595); YaRN (arXiv 2309.00071);
the llama3 frequency bands (Llama 3.1 release). The arithmetic follows `transformers` step by step in float32,
because the angles' float32 rounding at large positions is part of what a model was trained with.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError

RopeType = Literal["default", "linear", "llama3", "yarn"]
_LARGEST = sys.float_info.max  # whole numbers in JSON may be larger
_READ_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One RoPE; fields that its type does not use are 0, so that equal RoPEs compare (and hash) equal."""

    rope_type: RopeType
    theta: float
    factor: float = 0.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    attention_factor: float = 0.0
    """yarn: what cos and sin are multiplied with (`mscale` settings are already resolved into it)."""
    truncate: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Read `rope_theta` and `rope_scaling` or (transformers 5) `rope_parameters`; the former come first,
        as there.

        Raises UnsupportedModelError for a RoPE that is not computed here, CheckpointError for bad values.
        """
        scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(scaling, Mapping):
            raise CheckpointError(f"config.json: the RoPE settings must be an object, seen {scaling!r:.80}")
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if not isinstance(rope_type, str) or rope_type not in _READ_KEYS:
            nested = any(isinstance(value, Mapping) for value in scaling.values())
            named = "one RoPE per layer type" if nested else f"RoPE type {rope_type!r}"
            raise UnsupportedModelError(f"{named} is not supported (supported: {', '.join(_READ_KEYS)})")
        allowed = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_READ_KEYS[rope_type]}
        if rope_type == "default":
            allowed |= {"factor"}  # written by some exporters beside "default", where it has no meaning
        unknown = sorted(set(scaling) - allowed)
        if any(isinstance(scaling[key], Mapping) for key in unknown):
            raise UnsupportedModelError("one RoPE per layer type is not supported")
        if unknown:
            raise UnsupportedModelError(
                f"RoPE type {rope_type!r} with unknown settings: {', '.join(unknown)}"
            )
        partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise UnsupportedModelError(f"partial_rotary_factor {partial!r} is not supported (expected 1.0)")
        reader = _Numbers(rope_type, scaling)
        theta = reader.number(
            "rope_theta", None if "rope_theta" in scaling else config.get("rope_theta", 1e4)
        )
        if rope_type == "default":
            return cls("default", theta)
        if rope_type == "linear":
            return cls("linear", theta, factor=reader.number("factor"))
        window = config.get("original_max_position_embeddings") or scaling.get(
            "original_max_position_embeddings", config.get("max_position_embeddings")
        )
        if type(window) is not int or window < 1:
            raise CheckpointError(
                f"config.json: original_max_position_embeddings must be a count, seen {window!r}"
            )
        if rope_type == "llama3":
            return cls._llama3(reader, theta, window)
        return cls._yarn(reader, theta, window, config.get("max_position_embeddings"))

    @classmethod
    def _llama3(cls, reader: "_Numbers", theta: float, window: int) -> "RopeConfig":
        low, high = reader.number("low_freq_factor"), reader.number("high_freq_factor")
        if high <= low:
            raise CheckpointError(f"config.json: high_freq_factor {high} must be above low_freq_factor {low}")
        return cls(
            "llama3", theta, reader.number("factor"), window, low_freq_factor=low, high_freq_factor=high
        )

    @classmethod
    def _yarn(cls, reader: "_Numbers", theta: float, window: int, max_positions: object) -> "RopeConfig":
        default = max_positions / window if isinstance(max_positions, int) else None
        factor = reader.number("factor", default)
        if theta <= 1:
            raise CheckpointError(f"config.json: RoPE type 'yarn' needs rope_theta above 1, seen {theta}")
        attention = _mscale(factor, 1.0)
        if reader.scaling.get("mscale") and reader.scaling.get("mscale_all_dim"):
            attention = _mscale(factor, reader.number("mscale"))
            attention /= _mscale(factor, reader.number("mscale_all_dim"))
        return cls(
            "yarn",
            theta,
            factor,
            window,
            beta_fast=reader.number("beta_fast", 32.0),
            beta_slow=reader.number("beta_slow", 1.0),
            attention_factor=reader.number("attention_factor", attention),
            truncate=bool(reader.scaling.get("truncate", True)),
        )

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """[head_dim / 2] float32, radians per position."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = (self.theta ** exponents.astype(np.float64)).astype(np.float32)
        inverse = np.float32(1.0) / frequencies
        if self.rope_type == "linear":
            return inverse / np.float32(self.factor)
        if self.rope_type == "llama3":
            return self._llama3_bands(inverse)
        if self.rope_type == "yarn":
            return self._yarn_ramp(frequencies, head_dim)
        return inverse

    def _llama3_bands(self, inverse: np.ndarray) -> np.ndarray:
        window = self.original_max_position_embeddings
        wavelength = np.float32(2 * math.pi) / inverse
        slowed = np.where(
            wavelength > window / self.low_freq_factor, inverse / np.float32(self.factor), inverse
        )
        band = np.float32(self.high_freq_factor - self.low_freq_factor)
        smooth = (np.float32(window) / wavelength - np.float32(self.low_freq_factor)) / band
        between = (wavelength >= window / self.high_freq_factor) & (
            wavelength <= window / self.low_freq_factor
        )
        blended = (np.float32(1.0) - smooth) * slowed / np.float32(self.factor) + smooth * slowed
        return np.where(between, blended, slowed).astype(np.float32)

    def _yarn_ramp(self, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
        def dimension(rotations: float) -> float:
            turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        steps = np.arange(head_dim // 2, dtype=np.float32)
        ramp = np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
        extrapolated = np.float32(1.0) / frequencies
        interpolated = np.float32(1.0) / (np.float32(self.factor) * frequencies)
        keep = np.float32(1.0) - ramp
        return interpolated * (np.float32(1.0) - keep) + extrapolated * keep

    def tables(self, head_dim: int, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
        """cos, sin: float32 [num_positions, head_dim], halves duplicated as in HF, yarn's factor applied."""
        positions = np.arange(num_positions, dtype=np.float32)
        half = np.outer(positions, self.inverse_frequencies(head_dim)).astype(np.float64)
        scale = np.float32(self.attention_factor if self.rope_type == "yarn" else 1.0)
        cos, sin = np.cos(half).astype(np.float32) * scale, np.sin(half).astype(np.float32) * scale
        return np.concatenate([cos, cos], axis=1), np.concatenate([sin, sin], axis=1)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class _Numbers:
    """Positive numbers out of the RoPE settings, with messages that name the field."""

    def __init__(self, rope_type: str, scaling: Mapping[str, Any]) -> None:
        self.rope_type, self.scaling = rope_type, scaling

    def number(self, name: str, default: float | None = None) -> float:
        value = self.scaling.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
            raise CheckpointError(
                f"config.json: RoPE type {self.rope_type!r} needs {name} as a positive number, "
                f"seen {value!r:.60}"
            )
        return float(value)
