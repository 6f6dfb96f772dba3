"""How a model's maker would have its tokens chosen: the settings of generation_config.json."""

import math
from collections.abc import Mapping
from typing import Any

from blockzoo.zoo.errors import CheckpointError

_BOUNDS: dict[str, tuple[float, float]] = {  # as of a request's own settings
    "temperature": (0.0, 100.0),
    "top_p": (1e-9, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "max_new_tokens": (1, math.inf),
}
_WHOLE = ("top_k", "max_new_tokens")
_MAX_TOKENS = 1_000_000  # of a request


def generation_defaults(
    config: Mapping[str, Any], file: str = "generation_config.json"
) -> dict[str, float | int]:
    """Those of temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens that `config` sets.

    An explicit `do_sample: false` is temperature 0 in place of the first four. Raises CheckpointError for
    values out of range.
    """
    found: dict[str, float | int] = {}
    for name, (low, high) in _BOUNDS.items():
        value = config.get(name)
        if value is None:
            continue
        fits = type(value) in (int, float) and low <= value <= high and math.isfinite(value)
        if not fits or (name in _WHOLE and value != int(value)):
            kind = "whole number" if name in _WHOLE else "number"
            bounds = f"from {low:g} to {high:g}" if high < math.inf else f"from {low:g} on"
            raise CheckpointError(
                f"{file}: {name} is {value!r:.60}; expected a {kind} {bounds}: mend it, or take it out"
            )
        found[name] = int(value) if name in _WHOLE else float(value)
    if config.get("do_sample") is False:
        kept = ("repetition_penalty", "max_new_tokens")
        found = {name: value for name, value in found.items() if name in kept}
        found["temperature"] = 0.0
    return found


def sampling_defaults(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The same as fields of `SamplingParams`; {} where there is nothing."""
    given: dict[str, Any] = dict(generation_defaults(config or {}))
    if "max_new_tokens" in given:
        given["max_tokens"] = min(int(given.pop("max_new_tokens")), _MAX_TOKENS)
    return given
