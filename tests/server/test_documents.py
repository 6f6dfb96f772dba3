"""Files of documents: what they may hold, and how everything else is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.server_config.documents import Document, pass_warnings_on, publish_documents, read_documents


def test_lines_and_whole_files_are_documents(tmp_path: Path) -> None:
    lines = tmp_path / "documents.jsonl"
    entries = [
        {"name": "faq", "text": "Q: why?\nA: \u00e4h"},
        {"name": "terms", "text": "x", "models": ["a", "b"]},
    ]
    lines.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    text = tmp_path / "manual.txt"
    text.write_text("Press the button.\n")
    assert read_documents([lines, text]) == [
        Document("faq", "Q: why?\nA: \u00e4h"),
        Document("terms", "x", ("a", "b")),
        Document("manual.txt", "Press the button.\n"),
    ]
    assert read_documents([]) == []


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty; expected lines"),
        (b"\n \n", "is empty; expected lines"),
        (b'{"name": "a", "text": "b"}\n{"name": "c", "text"', "line 2: not JSON"),
        (b'["a", "b"]', "line 1: a JSON list; expected an object"),
        (b'{"name": "a"}', "line 1: text is None; expected a text"),
        (b'{"name": 3, "text": "b"}', "line 1: name is 3"),
        (b'{"name": "a", "text": " "}', "line 1: text is ' '"),
        (b'{"name": "a", "test": "b"}', "unknown key 'test'; did you mean 'text'"),
        (b'{"name": "a", "text": "b", "models": "base"}', "models is 'base'; expected a list"),
        (b'{"name": "a", "text": "b", "models": []}', r"models is \[\]; expected a list"),
        (
            b'{"name": "a", "text": "b"}\n{"name": "a", "text": "c"}',
            "line 2: there is a document 'a'",
        ),
        (b'{"name": "a", "text": "\\ud800"}', "line 1: text is not UTF-8"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "line 1: not JSON"),
        (json.dumps({"name": "a", "text": "b" * (2 << 20)}).encode(), "line 1: text has 2097152 bytes"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=match):
        read_documents([file])


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    for name, content, match in (("a.txt", b" \n", "is empty"), ("b.txt", b"\xff", "not UTF-8")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidRequestError, match=match):
            read_documents([tmp_path / name])
    with pytest.raises(InvalidRequestError, match=r"none.txt cannot be read: No such file"):
        read_documents([tmp_path / "none.txt"])
    with pytest.raises(InvalidRequestError, match="cannot be read: Is a directory"):
        read_documents([tmp_path])


def test_they_are_published_and_warnings_logged(tmp_path: Path) -> None:
    file = tmp_path / "manual.txt"
    file.write_text("Press the button.")
    published: list[tuple[Any, ...]] = []
    logged: list[str] = []

    def publish(*document: Any) -> None:
        published.append(document)
        logging.getLogger("blockzoo.runtime.serve.kv_store").warning("%s: ignored", "file")

    pb = SimpleNamespace(Logger=SimpleNamespace(log_warn=logged.append))
    logger = logging.getLogger("blockzoo")
    before = list(logger.handlers)
    try:
        pass_warnings_on(pb)
        publish_documents(SimpleNamespace(publish=publish), [str(file)])  # type: ignore[arg-type]
    finally:
        logger.handlers[:] = before
    assert published == [("manual.txt", "Press the button.", None)]
    assert logged == ["blockzoo: file: ignored"]
