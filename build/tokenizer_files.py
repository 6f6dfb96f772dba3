"""What the tokenizer files of a folder say, put together as `from_pretrained` of transformers 5 does."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken

from blockzoo.zoo.chat_files import read_object
from blockzoo.zoo.errors import CheckpointError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_settings(files: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[int, AddedToken]]:
    """What the class is made with, and the tokens added by id, as `from_pretrained` puts them together."""
    settings = read_object(files, "tokenizer_config.json")
    for name in ("add_bos_token", "add_eos_token"):  # beside a tokenizer.json its post-processor decides
        settings.pop(name, None)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    own = {
        name: settings.pop(name)
        for name in list(settings)
        if name.endswith("_token") and name not in NAMED and isinstance(settings[name], str)
    }
    own |= _taken_dict(settings)
    if own or "model_specific_special_tokens" not in settings:
        settings["model_specific_special_tokens"] = own
    given: list[tuple[int, AddedToken]] = []
    if "added_tokens_decoder" in settings:
        for index, token in settings.pop("added_tokens_decoder").items():
            given.append((int(index), _token(token)))
    else:
        _merge_special_tokens_map(settings, read_object(files, "special_tokens_map.json"))
        specials = {str(settings[name]) for name in NAMED if settings.get(name)}
        specials |= {str(token) for token in settings.get("extra_special_tokens") or []}
        for content, index in read_object(files, "added_tokens.json").items():
            special = content in specials
            given.append((index, AddedToken(content, normalized=not special, special=special)))
        for token in read_object(files, "tokenizer.json").get("added_tokens", []):
            given.append((token["id"], _token(token)))
    settings = {name: _as_added_tokens(value) for name, value in settings.items()}
    by_content = {str(token): token for _, token in given}  # those too whose id another one takes
    for name in NAMED:
        if settings.get(name) is not None:
            settings[name] = by_content.get(str(settings[name]), settings[name])
    return settings, dict(given)


def special_tokens_of(settings: Mapping[str, Any]) -> tuple[dict[str, str | AddedToken], list[Any]]:
    """The special tokens that have names, and the others."""
    extra = settings.get("extra_special_tokens", settings.get("additional_special_tokens"))
    own = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and name not in NAMED and isinstance(value, (str, AddedToken))
    }
    named = {name: settings[name] for name in NAMED if settings.get(name) is not None}
    named |= own | settings["model_specific_special_tokens"]
    for name, token in named.items():
        if not isinstance(token, (str, AddedToken)):
            raise CheckpointError(f"{name} is {token!r:.60}; expected the text of a token, or its fields")
    if not isinstance(extra, (list, type(None))):
        raise CheckpointError(f"extra_special_tokens is {extra!r:.60}; expected a list of tokens")
    return named, extra or []


def _taken_dict(settings: dict[str, Any]) -> dict[str, Any]:
    """`extra_special_tokens`, taken out, where it is an object of named tokens; else {}."""
    extra = settings.get("extra_special_tokens")
    if not isinstance(extra, dict):
        return {}
    del settings["extra_special_tokens"]
    return extra


def _merge_special_tokens_map(settings: dict[str, Any], special_tokens: dict[str, Any]) -> None:
    for name, value in special_tokens.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            merged = list(settings.get(name) or [])
            for item in value:
                token = _token(item, special=True) if isinstance(item, dict) else item
                if token not in merged:
                    merged.append(token)
            settings[name] = merged
        elif isinstance(value, dict) and name != "extra_special_tokens":
            settings[name] = _token(value, special=True)
        else:
            settings[name] = value
    settings["model_specific_special_tokens"] |= _taken_dict(settings)


def _as_added_tokens(value: Any) -> Any:
    """JSON in which objects that say so have become tokens."""
    if isinstance(value, list):
        return [_as_added_tokens(item) for item in value]
    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return _token(value)
        return {name: _as_added_tokens(item) for name, item in value.items()}
    return value


def _token(fields: Any, **changed: bool) -> AddedToken:
    """A token from its JSON, without fields that the library does not know, which it would tell on stdout."""
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise CheckpointError(f"{fields!r:.60} is no token: expected an object with its text as 'content'")
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{name: fields[name] for name in known if name in fields} | changed)
