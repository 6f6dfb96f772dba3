"""Strict JSON <-> frozen dataclasses: an unknown or missing field or a wrong type is an error naming it.

A field of metadata {"added": True} came later: files from before lack it, and have its default.
Dataclasses with a class attribute `kind` carry it in their JSON; a union of such classes is told apart by it.
"""

import dataclasses
import functools
import math
import types
import typing
from typing import Any, TypeVar, Union

from blockzoo.zoo.errors import ManifestError

T = TypeVar("T")


def encode(value: Any) -> Any:
    """The JSON form of dataclasses, tuples, dicts and plain values (nested)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = _kind(type(value))
        return fields if kind is None else {"kind": kind, **fields}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    return value


def _kind(cls: type) -> str | None:
    kind = getattr(cls, "kind", None)  # a property of that name is no class attribute
    return kind if isinstance(kind, str) else None


def decode(cls: type[T], value: Any, where: str) -> T:
    """Read `value` (parsed JSON) as `cls`; `where` names the place in the file for messages.

    Raises ManifestError.
    """
    return typing.cast(T, _decode(cls, value, where))


def _decode(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, value, where)
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _decode_union(typing.get_args(hint), value, where)
    if origin is tuple:
        item_hint = typing.get_args(hint)[0]
        items = _expect(list, value, where)
        return tuple(_decode(item_hint, item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        key_hint, item_hint = typing.get_args(hint)
        return {
            _decode_key(key_hint, key, where): _decode(item_hint, item, f"{where}.{key}")
            for key, item in _expect(dict, value, where).items()
        }
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ManifestError(
                f"{where}: {value!r} is not one of {', '.join(map(repr, typing.get_args(hint)))}"
            )
        return value
    return _expect(hint, value, where)


def _decode_key(hint: Any, key: str, where: str) -> Any:
    if hint is int:
        if not key.isdecimal():
            raise ManifestError(f"{where}: the key {key!r} is not a whole number")
        return int(key)
    return key


def _decode_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in members:
        return None
    rest = [member for member in members if member is not types.NoneType]
    if len(rest) == 1:
        return _decode(rest[0], value, where)
    kinds = {member.kind: member for member in rest}
    kind = _expect(dict, value, where).get("kind")
    if kind not in kinds:
        raise ManifestError(f"{where}.kind: {kind!r} is not one of {', '.join(map(repr, kinds))}")
    return _decode(kinds[kind], value, where)


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _later(cls: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(cls) if field.metadata.get("added"))


def _decode_dataclass(cls: Any, value: Any, where: str) -> Any:
    fields, given = _fields(cls), dict(_expect(dict, value, where))
    kind = _kind(cls)
    if kind is not None and given.pop("kind", None) != kind:
        raise ManifestError(f"{where}.kind: expected {kind!r}, seen {value.get('kind')!r}")
    unknown, missing = given.keys() - fields.keys(), fields.keys() - given.keys() - _later(cls)
    if unknown or missing:
        said = [f"unknown field {name!r}" for name in sorted(unknown)]
        said += [f"missing field {name!r}" for name in sorted(missing)]
        raise ManifestError(f"{where}: {', '.join(said)}")
    return cls(**{name: _decode(fields[name], item, f"{where}.{name}") for name, item in given.items()})


def _expect(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # exact: JSON true must not pass as the int 1
        raise ManifestError(f"{where}: expected {kind.__name__}, seen {type(value).__name__} {value!r:.60}")
    if kind is float and not math.isfinite(value):
        raise ManifestError(f"{where}: {value!r} is not a finite number")
    return value
