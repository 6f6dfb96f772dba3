"""Chat templates among the tokenizer files of a folder, by the precedence of transformers 5.

`chat_template.jinja` and `additional_chat_templates/*.jinja` go before `chat_template` of
tokenizer_config.json, which is a text or a list of named ones.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockzoo.zoo.errors import CheckpointError

TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
SPECIAL_TOKENS = "chat_special_tokens.json"
"""Our own: the named special tokens of a resolved tokenizer, as variables of its templates."""
MAX_TEMPLATE_BYTES = 1 << 20
_CONFIG = "tokenizer_config.json"


def is_template_file(name: str) -> bool:
    """Whether a file of a tokenizer, by its name in the folder, is a chat template alone."""
    return name == TEMPLATE or name.startswith(f"{MORE_TEMPLATES}/")


def templates(folder: Path | Mapping[str, bytes]) -> dict[str, str]:
    """Templates by name, that without one as "default"; {} without any. Raises CheckpointError."""
    files = _contents(folder)
    found = {}
    for name, content in files.items():
        if is_template_file(name):
            found["default" if name == TEMPLATE else Path(name).stem] = _text(name, content)
    if found:
        return found
    given = read_object(files, _CONFIG).get("chat_template")
    if given is None:
        return {}
    where = f"chat_template of {_CONFIG}"
    if isinstance(given, str):
        given = {"default": given}
    elif isinstance(given, list):
        if not all(isinstance(item, dict) and item.keys() >= {"name", "template"} for item in given):
            raise CheckpointError(f"{where}: expected a text, or a list of objects with name and template")
        given = {item["name"]: item["template"] for item in given}
    if not isinstance(given, dict) or not all(isinstance(x, str) for item in given.items() for x in item):
        raise CheckpointError(f"{where} is {given!r:.60}; expected a text, or named texts")
    return {name: _text(where, text.encode(errors="surrogatepass")) for name, text in given.items()}


def special_tokens(folder: Path | Mapping[str, bytes]) -> dict[str, str]:
    """The named special tokens, such as bos_token. Raises CheckpointError.

    Of a folder that is not from a zoo, those that its files name; a class's own are not known here.
    """
    files = _contents(folder)
    if SPECIAL_TOKENS in files:
        named = read_object(files, SPECIAL_TOKENS)
    else:
        named = read_object(files, "special_tokens_map.json") | read_object(files, _CONFIG)
    texts = {
        name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()
    }
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def with_base_templates(own: Mapping[str, bytes], base: Mapping[str, bytes]) -> dict[str, bytes]:
    """An adapter's tokenizer files over those of its base: its templates, or where it has none, its base's.

    Templates are replaced as a whole: a base's for tools beside an adapter's own would be another chat.
    Raises CheckpointError.
    """
    files = {**base, **own}
    if templates(own):
        return {name: data for name, data in files.items() if not is_template_file(name) or name in own}
    found = templates(base)
    if not found or templates(files) == found:
        return files
    config = read_object(files, _CONFIG)
    config["chat_template"] = [{"name": name, "template": text} for name, text in found.items()]
    if found.keys() == {"default"}:
        config["chat_template"] = found["default"]
    return {**files, _CONFIG: json.dumps(config, indent=2, ensure_ascii=False).encode()}


def _contents(folder: Path | Mapping[str, bytes]) -> Mapping[str, bytes]:
    if isinstance(folder, Mapping):
        return folder
    names = [_CONFIG, "special_tokens_map.json", SPECIAL_TOKENS, TEMPLATE]
    names += [f"{MORE_TEMPLATES}/{path.name}" for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _text(where: str, content: bytes) -> str:
    if len(content) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{where} is {len(content)} bytes; expected at most {MAX_TEMPLATE_BYTES}")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 ({error})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as files opened as text


def read_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A JSON object; {} where the file is absent. Raises CheckpointError."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: expected a JSON object, seen {type(value).__name__}")
    return value
