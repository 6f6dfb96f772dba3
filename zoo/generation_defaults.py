"""How a model's maker would have its tokens chosen: the sampling settings of generation_config.json."""

from collections.abc import Mapping
from typing import Any

from blockzoo.zoo.errors import CheckpointError

_BOUNDS: dict[str, tuple[float, float]] = {  # as of a request's own settings
    "temperature": (0.0, 100.0),
    "top_p": (1e-9, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


def generation_defaults(
    config: Mapping[str, Any], file: str = "generation_config.json"
) -> dict[str, float | int]:
    """Those of temperature, top_p, top_k, min_p and repetition_penalty that `config` sets.

    An explicit `do_sample: false` is temperature 0 alone. Raises CheckpointError for values out of range.
    """
    found: dict[str, float | int] = {}
    for name, (low, high) in _BOUNDS.items():
        value = config.get(name)
        if value is None:
            continue
        fits = type(value) in (int, float) and low <= value <= high
        if not fits or (name == "top_k" and value != int(value)):
            kind = "whole number" if name == "top_k" else "number"
            raise CheckpointError(
                f"{file}: {name} is {value!r:.60}; expected a {kind} from {low:g} to {high:g}: mend it, or "
                "take it out"
            )
        found[name] = int(value) if name == "top_k" else float(value)
    if config.get("do_sample") is False:
        found = {name: value for name, value in found.items() if name == "repetition_penalty"}
        found["temperature"] = 0.0
    return found
