"""The documents that an operator publishes with `zoo-serve --publish FILE`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.server_config.schema import checked_text, did_you_mean

if TYPE_CHECKING:
    from blockzoo.runtime import EngineThread

WARNING_MARK = "blockzoo: "  # begins the warnings that the launcher passes on
_KEYS = ("name", "text", "models")


class Document(NamedTuple):
    """A text to publish under a name, for some models; None: for all."""

    name: str
    text: str
    models: tuple[str, ...] | None = None


def read_documents(paths: Iterable[Path]) -> list[Document]:
    """Read documents: each line of a .jsonl file is one, and so is each other file, by its name.

    A line is an object with `name`, `text` and, where it is not for all models, `models`.

    Raises:
        InvalidRequestError: a file cannot be read, or something in it is not as expected; with its line.
    """
    documents: dict[str, Document] = {}
    for path in paths:
        for where, document in _read_file(path):
            if document.name in documents:
                raise InvalidRequestError(f"{where}: there is a document {document.name!r} already")
            documents[document.name] = document
    return list(documents.values())


def pass_warnings_on(pb: Any) -> None:
    """Write what the runtime warns of to Triton's log, marked for the launcher.

    Args:
        pb: the `triton_python_backend_utils` module.
    """
    logging.getLogger("blockzoo").addHandler(_TritonLog(pb))


def publish_documents(engine: EngineThread, paths: Iterable[str]) -> None:
    """Publish what the files hold. Raises RequestError where a file, or a document, is not as expected."""
    for document in read_documents(map(Path, paths)):
        engine.publish(*document)


class _TritonLog(logging.Handler):
    def __init__(self, pb: Any) -> None:
        super().__init__(logging.WARNING)
        self._log = pb.Logger.log_warn

    def emit(self, record: logging.LogRecord) -> None:
        self._log(WARNING_MARK + record.getMessage())


def _read_file(path: Path) -> list[tuple[str, Document]]:
    """Each document with where it stands."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"--publish {path} cannot be read: {error.strerror}") from None
    if path.suffix != ".jsonl":
        text = checked_text(content, str(path))
        if not text.strip():
            raise InvalidRequestError(f"{path} is empty; expected the text of a document")
        return [(str(path), Document(path.name, text))]
    lines = enumerate(content.splitlines(), 1)
    found = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    if not found:
        raise InvalidRequestError(f'{path} is empty; expected lines such as {{"name": "faq", "text": "..."}}')
    return [(where, _read_line(where, line)) for where, line in found]


def _read_line(where: str, line: bytes) -> Document:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise InvalidRequestError(
            f"{where}: a JSON {type(entry).__name__}; expected an object with name, text"
        )
    for key in entry:
        if key not in _KEYS:
            raise InvalidRequestError(f"{where}: the unknown key {key!r}; {did_you_mean(key, _KEYS)}")
    for key in ("name", "text"):
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip():
            raise InvalidRequestError(f"{where}: {key} is {value!r:.40}; expected a text")
        checked_text(value.encode("utf-8", "surrogatepass"), f"{where}: {key}")
    models = entry.get("models")
    if models is None:
        return Document(entry["name"], entry["text"])
    if not isinstance(models, list) or not models or not all(isinstance(model, str) for model in models):
        raise InvalidRequestError(f"{where}: models is {models!r:.80}; expected a list of model names")
    return Document(entry["name"], entry["text"], tuple(models))
