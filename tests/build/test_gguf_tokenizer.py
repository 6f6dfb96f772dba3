"""Vocabularies in GGUF metadata -> tokenizer files, against AutoTokenizer's reading of the same file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_files import add_metadata
from tokenizer_folders import corpus, tokenizer_json
from tokenizers import Tokenizer

from blockzoo.build.gguf_config import Metadata
from blockzoo.build.gguf_tokenizer import tokenizer_files
from blockzoo.build.tokenizer import ModelTokenizer, resolve
from blockzoo.zoo.errors import UnsupportedModelError
from blockzoo.zoo.gguf_file import GgufFile

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"


@cache
def byte_level(base: str = "gpt2") -> dict[str, Any]:
    """A trained vocabulary with <|endoftext|>, <|im_start|>, <|im_end|> first, and more tokens behind."""
    model = json.loads(tokenizer_json(base))["model"]
    more = ["<think>", "fox", "[PAD0]", "<|eot|>", "né"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), *more]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3, 3, *([1] * (len(tokens) - 3 - len(more))), 4, 4, 5, 3, 1],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
    }


@cache
def pieces() -> dict[str, Any]:
    """A trained vocabulary of ▁ and bytes; a token's score is the rank of the merge that makes it."""
    model = json.loads(tokenizer_json("llama2"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    made = {"".join(pair): -float(rank) for rank, pair in enumerate(model["merges"])}
    tokens += ["<|eot|>", "<think>"]
    types = [2, 3, 3, *([6] * 256), *([1] * (len(tokens) - 261)), 3, 4]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [made.get(token, -1e4) for token in tokens],
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-2": ("llama", byte_level()),
    "nothing said": ("llama", byte_level() | {"pre": None}),
    "smollm": ("llama", byte_level() | {"pre": "smollm", "add_bos_token": False, "add_space_prefix": False}),
    "llama3": ("llama", byte_level() | {"pre": "llama-bpe", "add_bos_token": True}),
    "bos and eos": (
        "llama",
        byte_level() | {"pre": "llama-bpe", "add_bos_token": True, "add_eos_token": True},
    ),
    "tekken": ("llama", byte_level() | {"pre": "tekken", "add_bos_token": True}),
    "qwen2": ("qwen2", byte_level() | {"pre": "qwen2", "add_bos_token": False, "bos_token_id": None}),
    "qwen3": ("qwen3", byte_level() | {"pre": "qwen2", "add_bos_token": False, "bos_token_id": 0}),
    "deepseek": ("qwen2", byte_level() | {"pre": "deepseek-r1-qwen", "add_bos_token": True}),
    "no types": ("llama", byte_level() | {"token_type": None}),
    "pieces": ("llama", pieces()),
    "pieces with merges": (
        "llama",
        pieces() | {"merges": [" ".join(m) for m in json.loads(tokenizer_json("llama2"))["model"]["merges"]]},
    ),
    "pieces without bos": ("llama", pieces() | {"add_bos_token": False, "add_space_prefix": True}),
    "pieces with eos": ("llama", pieces() | {"add_bos_token": True, "add_eos_token": True}),
    "pieces, unknown not named": ("llama", pieces() | {"unknown_token_id": None}),
}


def write(path: Path, arch: str, vocabulary: dict[str, Any], **extra: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in vocabulary.items():
        if value is not None:
            add_metadata(writer, f"tokenizer.ggml.{key}", value)
    for key, value in extra.items():
        add_metadata(writer, f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> ModelTokenizer:
    return resolve(tokenizer_files(Metadata(path, GgufFile(path).metadata)), None, None)


@pytest.mark.parametrize("case", CASES)
def test_ids_and_texts_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write(tmp_path / "model.gguf", *CASES[case], chat_template=TEMPLATE)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    found = read(path)
    ours = Tokenizer.from_buffer(found.files["tokenizer.json"])
    vocabulary = CASES[case][1]
    special = ["<|im_start|>", "<|im_end|>", "<|eot|>", "<think>", "<s>", "</s>", "fox"]
    texts = corpus([token for token in special if token in vocabulary["tokens"]])
    assert len(texts) > 20
    for text in texts:
        for around in (True, False):
            expected = theirs.encode(text, add_special_tokens=around)
            assert ours.encode(text, add_special_tokens=around).ids == expected, text
            for skip in (True, False):
                decoded = theirs.decode(expected, skip_special_tokens=skip)
                assert ours.decode(expected, skip_special_tokens=skip) == decoded
    assert found.eos_token_id == theirs.eos_token_id == vocabulary["eos_token_id"]
    assert found.largest_id == len(vocabulary["tokens"]) - 1
    assert found.files["chat_template.jinja"].decode() == theirs.chat_template == TEMPLATE


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_a_folder_that_transformers_reads_alike(case: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write(tmp_path / "model.gguf", *CASES[case])
    found = read(path)
    assert resolve(found.files, None, None).files == found.files
    (tmp_path / "folder").mkdir()
    for name, content in found.files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    ours = Tokenizer.from_buffer(found.files["tokenizer.json"])
    for text in corpus(["<|im_end|>", "</s>"]):
        assert ours.encode(text).ids == theirs.encode(text)


def test_a_file_without_prefix_space_gets_none(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", pieces() | {"add_space_prefix": False})
    ours = Tokenizer.from_buffer(read(path).files["tokenizer.json"])
    tokens = pieces()["tokens"]
    assert tokens[ours.encode("fox", add_special_tokens=False).ids[0]][0] == "f"
    assert ours.decode(ours.encode(" fox").ids) == " fox"


def test_special_tokens_that_no_byte_can_spell_are_whole(tmp_path: Path) -> None:
    given = byte_level()
    token = "<｜begin▁of▁sentence｜>"
    more = {"tokens": [*given["tokens"], token], "token_type": [*given["token_type"], 3]}
    path = write(tmp_path / "model.gguf", "llama", given | more | {"bos_token_id": len(given["tokens"])})
    ours = Tokenizer.from_buffer(read(path).files["tokenizer.json"])
    assert ours.encode(token).ids == [len(given["tokens"])]


def test_splits_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", byte_level() | {"pre": "poro-chat"})
    with pytest.raises(
        UnsupportedModelError, match=r"'poro-chat' is not supported \(supported: default, gpt-2"
    ):
        read(path)
