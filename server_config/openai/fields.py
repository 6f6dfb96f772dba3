"""The fields of a JSON body, taken one by one; what nobody took is refused at the end, by name."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from blockzoo.runtime.api.request import shown
from blockzoo.server_config.openai.errors import ApiError, invalid

MAX_DEPTH = 64
T = TypeVar("T")
_NAMES: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    int: "a whole number",
}


def parse_json(data: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: it is none, it is nested deeper than 64 levels, or holds what is no JSON (NaN, lone
            surrogates) or no number of sane size.
    """
    try:
        text = data.decode("utf-8")
        body = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise invalid(None, f"The body is nested too deeply; expected at most {MAX_DEPTH} levels.") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise invalid(None, f"The body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(body, dict):
        raise invalid(None, f"The body is a JSON {type(body).__name__}; expected an object.")
    _check_values(body)
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check_values(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            below += [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if not below:
            return
        level = []
        for value in below:
            if isinstance(value, (dict, list)):
                level.append(value)
            elif isinstance(value, str):
                if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
                    raise invalid(None, "The body holds lone surrogates, which are no characters.")
            elif isinstance(value, float) and not math.isfinite(value):
                raise invalid(None, "The body holds a number that is too large.")
    if level:
        raise invalid(None, f"The body is nested too deeply; expected at most {MAX_DEPTH} levels.")


class Fields:
    """Takes fields out of an object. A field that is null counts as missing.

    Args:
        body: of the request, or an object in it.
        where: its path in the body, with a final dot; "" for the body itself. Also an attribute.
    """

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._rest = {name: value for name, value in body.items() if value is not None}
        self._all = self._rest.copy()
        self.where = where
        self._known: list[str] = []

    def take(self, name: str, kind: type[T], default: Any = None) -> Any:
        """A field of a type, `default` where it is missing. Raises ApiError."""
        value = self.any(name)
        if value is None:
            return default
        if type(value) is not kind:
            raise self.wrong(name, value, _NAMES[kind])
        return value

    def has(self, name: str) -> bool:
        """Whether a field is there; it is still to be taken."""
        return name in self._rest

    def any(self, name: str) -> Any:
        """A field as it is; None where it is missing."""
        self._known.append(name)
        return self._rest.pop(name, None)

    def one_of(self, name: str, choices: Collection[str], default: str | None = None) -> str | None:
        """A field that is one of some texts. Raises ApiError."""
        value = self.take(name, str, default)
        if value is not None and value not in choices:
            raise self.wrong(name, value, " or ".join(map(repr, choices)))
        return value

    def objects(self, name: str, limit: int) -> list[Fields] | None:
        """A field that is a list of objects. Raises ApiError."""
        values = self.take(name, list)
        if values is None:
            return None
        if len(values) > limit:
            raise invalid(self.where + name, f"{self.where}{name} has {len(values)} items; at most {limit}.")
        for index, value in enumerate(values):
            if not isinstance(value, dict):
                raise self.wrong(f"{name}[{index}]", value, "an object")
        return [Fields(value, f"{self.where}{name}[{index}].") for index, value in enumerate(values)]

    def ignore(self, names: Collection[str]) -> None:
        """Fields that change nothing here, whatever they say."""
        for name in names:
            self.any(name)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Fields that OpenAI's server knows and this one does not. Raises ApiError."""
        for name, reason in reasons.items():
            if self.any(name) is not None:
                raise invalid(
                    self.where + name,
                    f"{self.where}{name} is not supported: {reason}.",
                    "unsupported_parameter",
                )

    def end(self) -> None:
        """Refuse what nobody took. Raises ApiError."""
        for name in self._rest:
            close = get_close_matches(name[:100], self._known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            path = f"{self.where}{name:.100}"
            raise invalid(path, f"Unknown parameter: {path!r}.{hint}", "unknown_parameter")

    def wrong(self, name: str, value: Any, expected: str) -> ApiError:
        """A field whose value is not what it should be."""
        path = self.where + name
        return invalid(
            path, f"Invalid value for {path!r}: {shown(value)}; expected {expected}.", "invalid_value"
        )

    def missing(self, name: str) -> ApiError:
        """A field that must be there."""
        path = self.where + name
        return invalid(path, f"Missing required parameter: {path!r}.", "missing_required_parameter")

    def plain(self) -> dict[str, Any]:
        """The whole object, without what is null."""
        return self._all
