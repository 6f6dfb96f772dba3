"""Tokenizer files -> one tokenizer.json, against AutoTokenizer of transformers."""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tokenizer_folders import ARCHITECTURES, FOLDERS, SCRIPTS, Folder, corpus, token, tokenizer_json
from tokenizers import Tokenizer

from blockzoo.build.tokenizer import ModelTokenizer, resolve
from blockzoo.zoo.checkpoint import read_tokenizer_files
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError


def _resolved(folder: Folder, path: Path) -> ModelTokenizer:
    files = read_tokenizer_files(folder.write(path))
    return resolve(files, folder.model_type, folder.config.get("tokenizer_class"))


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
    twice = resolve(once.files, folder.model_type, folder.config.get("tokenizer_class"))
    assert (twice.files, twice.eos_token_id) == (once.files, once.eos_token_id)


@pytest.mark.parametrize("name", ["bare", "known-eos", "adds-bos", "qwen3-plain", "clean-up"])
def test_a_file_that_says_it_all_stays_as_it_is(name: str, tmp_path: Path) -> None:
    found = _resolved(FOLDERS[name], tmp_path)
    assert found.files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


def test_truncation_and_padding_of_the_file_count_for_nothing_but_their_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = Folder("gpt2", "llama", {})
    library = Tokenizer.from_str(tokenizer_json("gpt2"))
    library.enable_truncation(4)
    library.enable_padding(length=64, pad_token="[PAD]")
    (folder.write(tmp_path) / "tokenizer.json").write_text(library.to_str())
    found = resolve(read_tokenizer_files(tmp_path), folder.model_type, None)
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
        resolve(files, "llama", None)


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
        resolve(files, "llama", None)


def test_a_token_that_is_special_in_one_file_alone_is_refused(tmp_path: Path) -> None:
    decoder = {"added_tokens_decoder": {"1": token("<s>", special=False)}}
    with pytest.raises(UnsupportedModelError, match="token '<s>' is given with different settings"):
        _resolved(Folder("llama2", "mistral", {"tokenizer_config.json": decoder}), tmp_path)


def test_a_blank_token_that_strips_is_refused(tmp_path: Path) -> None:
    decoder = {"added_tokens_decoder": {"380": token(" ", lstrip=True)}}
    with pytest.raises(UnsupportedModelError, match="token ' ' is blank and takes blanks"):
        _resolved(Folder("gpt2", "llama", {"tokenizer_config.json": decoder}), tmp_path)


def test_the_way_out_of_a_refusal_keeps_the_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = {"tokenizer_config.json": {"tokenizer_class": "GPTNeoXTokenizer", "pad_token": "<pad>"}}
    folder = Folder("gpt2", "llama", files)
    with pytest.raises(UnsupportedModelError, match=r"PreTrainedTokenizerFast\(tokenizer_object="):
        _resolved(folder, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    saved = PreTrainedTokenizerFast(tokenizer_object=theirs.backend_tokenizer, eos_token=theirs.eos_token)
    saved.save_pretrained(tmp_path)
    found = resolve(read_tokenizer_files(tmp_path), folder.model_type, None)
    for text in corpus(["<pad>", "<|endoftext|>"]):
        assert _library(found).encode(text).ids == theirs.encode(text)
    assert found.eos_token_id == theirs.eos_token_id


_CONTENTS = st.sampled_from(
    ["<a>", "<b>", "fox", "É", "e", " ", "▁the", "the fox", "<|im_end|>", "</s>", "<0x41>", "\n"]
)
_FLAGS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), st.booleans())
)
_FIELDS = st.builds(lambda content, flags: {"content": content} | flags, _CONTENTS, _FLAGS)
_TAGGED = st.one_of(_CONTENTS, _FIELDS.map(lambda fields: fields | {"__type": "AddedToken"}))
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
_CLASSES = (
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "LlamaTokenizer",
    "Qwen2TokenizerFast",
    "GPT2Tokenizer",
)
_LISTS = st.lists(_TAGGED, max_size=3)
_SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "tokenizer_class": st.sampled_from(_CLASSES),
        "added_tokens_decoder": st.dictionaries(st.integers(0, 500).map(str), _FIELDS, max_size=4),
        "additional_special_tokens": _LISTS,
        "extra_special_tokens": st.one_of(_LISTS, st.dictionaries(st.just("image_token"), _CONTENTS)),
        "tool_token": _TAGGED,
        "legacy": st.sampled_from([True, False, None]),
        "add_prefix_space": st.booleans(),
        "add_bos_token": st.booleans(),
        **dict.fromkeys(_NAMES, st.one_of(st.none(), _TAGGED)),
    },
)
_SPECIAL_MAP = st.fixed_dictionaries(
    {},
    optional={
        "additional_special_tokens": st.lists(_CONTENTS, max_size=2),
        "extra_special_tokens": st.lists(st.one_of(_CONTENTS, _FIELDS), max_size=2),
        **dict.fromkeys(_NAMES, st.one_of(_CONTENTS, _FIELDS)),
    },
)
_FILES = st.fixed_dictionaries(
    {"tokenizer_config.json": _SETTINGS},
    optional={
        "special_tokens_map.json": _SPECIAL_MAP,
        "added_tokens.json": st.dictionaries(_CONTENTS, st.integers(0, 500), max_size=3),
    },
)
_TEXTS = st.lists(st.one_of(_CONTENTS, st.sampled_from(SCRIPTS), st.text(max_size=6)), max_size=8).map(
    "".join
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    base=st.sampled_from(["gpt2", "llama3", "llama2", "metaspace"]),
    model_type=st.sampled_from([None, *ARCHITECTURES]),
    files=_FILES,
    texts=st.lists(_TEXTS, min_size=6, max_size=6),
)
def test_whatever_a_folder_says(
    base: str, model_type: str | None, files: dict[str, Any], texts: list[str]
) -> None:
    """Ids and texts of AutoTokenizer; a named error only where it fails, or where the library would."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as path:
        folder = Folder(base, model_type, files)
        folder.write(Path(path))
        try:
            theirs = AutoTokenizer.from_pretrained(path)
        except Exception as error:
            event(f"AutoTokenizer fails: {type(error).__name__}")
            with suppress(CheckpointError):
                _resolved(folder, Path(path))
            return
        try:
            found = _resolved(folder, Path(path))
        except UnsupportedModelError as error:
            said = re.search("given with different settings|blank and takes blanks", str(error))
            if said is None:
                raise
            event(said[0])
            return
    event(type(theirs).__name__)
    ours = _library(found)
    assert ours.get_vocab(with_added_tokens=True) == theirs.get_vocab()
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text).ids == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert found.eos_token_id == theirs.eos_token_id
    assert resolve(found.files, model_type, None).files == found.files
