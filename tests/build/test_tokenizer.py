"""Tokenizer files -> one tokenizer.json, against AutoTokenizer of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import FOLDERS, Folder, corpus, token, tokenizer_json
from tokenizers import Tokenizer

from blockzoo.build.tokenizer import ModelTokenizer, resolve
from blockzoo.zoo.checkpoint import read_tokenizer_files
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError


def _resolved(folder: Folder, path: Path) -> ModelTokenizer:
    files = read_tokenizer_files(folder.write(path))
    return resolve(files, folder.architecture, folder.config.get("tokenizer_class"))


def _library(found: ModelTokenizer) -> Tokenizer:
    return Tokenizer.from_buffer(found.files["tokenizer.json"])


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = _resolved(FOLDERS[name], tmp_path)
    ours, theirs = _library(found), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.get_vocab(with_added_tokens=True) == theirs.get_vocab()
    for text in corpus(sorted(theirs.get_added_vocab())):
        for around in (True, False):
            expected = theirs.encode(text, add_special_tokens=around)
            assert ours.encode(text, add_special_tokens=around).ids == expected, text
            for skip in (True, False):
                assert ours.decode(expected, skip_special_tokens=skip) == theirs.decode(
                    expected, skip_special_tokens=skip
                )
    assert found.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize("name", FOLDERS)
def test_resolving_again_changes_nothing(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name]
    once = _resolved(folder, tmp_path)
    twice = resolve(once.files, folder.architecture, folder.config.get("tokenizer_class"))
    assert (twice.files, twice.eos_token_id) == (once.files, once.eos_token_id)


@pytest.mark.parametrize("name", ["bare", "known-eos", "adds-bos", "qwen3-plain", "clean-up"])
def test_a_file_that_says_it_all_stays_as_it_is(name: str, tmp_path: Path) -> None:
    found = _resolved(FOLDERS[name], tmp_path)
    assert found.files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


def test_truncation_and_padding_of_the_file_count_for_nothing_but_their_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = Folder("gpt2", "LlamaForCausalLM", {})
    library = Tokenizer.from_str(tokenizer_json("gpt2"))
    library.enable_truncation(4)
    library.enable_padding(length=64, pad_token="[PAD]")
    (folder.write(tmp_path) / "tokenizer.json").write_text(library.to_str())
    found = resolve(read_tokenizer_files(tmp_path), folder.architecture, None)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in corpus(["[PAD]"]):
        assert _library(found).encode(text).ids == theirs.encode(text)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split_special_tokens": True}, "split_special_tokens=True"),
        ({"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}, "clean_up_token"),
        ({"tokenizer_class": "GemmaTokenizerFast"}, "'GemmaTokenizer' is not supported .supported: Llama"),
        ({"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}, "auto_map="),
        ({"init_inputs": [1]}, "init_inputs"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "fast_tokenizer_files"),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    files = {
        "tokenizer.json": tokenizer_json("gpt2").encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    with pytest.raises(UnsupportedModelError, match=said):
        resolve(files, "LlamaForCausalLM", None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"model": {"type": "BPE"}}),
        ("tokenizer_config.json", []),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": token("<a>")}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "<a>"}}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"eos_token": {"content": "<a>"}}),
        ("tokenizer_config.json", {"extra_special_tokens": "<a>"}),
        ("tokenizer_config.json", {"extra_special_tokens": [{"content": "<a>"}]}),
        ("special_tokens_map.json", {"eos_token": {"lstrip": 5}}),
        ("added_tokens.json", {"<a>": "five"}),
        ("added_tokens.json", [1]),
    ],
)
def test_damaged_files_are_a_named_error(name: str, content: Any) -> None:
    files = {"tokenizer.json": tokenizer_json("gpt2").encode(), name: json.dumps(content).encode()}
    with pytest.raises(CheckpointError, match=r"tokenizer|token|\.json"):
        resolve(files, "LlamaForCausalLM", None)
