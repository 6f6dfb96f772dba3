"""What an adapter's folder says of tokens: a tokenizer, files over the base's, and where answers end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_folders import corpus, token
from tokenizers import Tokenizer

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.sources import Source, open_sources
from blockzoo.zoo.errors import CheckpointError, ZooError
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.tensors import TensorFile, from_f32, write_tensor_file

FAST = CompileOptions(verify=False, profile=False)
VOCAB = 258  # of the base's tokenizer; the model has 288 rows
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft


@pytest.fixture
def adapter(checkpoints: dict[str, Path], make_adapter: Callable[..., Any], tmp_path: Path) -> Path:
    make_adapter(checkpoints["llama"], tmp_path / "adapter")
    put(tmp_path / "adapter", {"adapter_config.json": {"base_model_name_or_path": "base"}})
    return tmp_path / "adapter"


def put(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    """Write JSON files into a folder; objects that are there already are extended."""
    for name, content in files.items():
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | content))
    return folder


def opened(base: Path, adapter: Path) -> tuple[Source, Source]:
    one, other = open_sources({"base": base, "notes": adapter}, None)
    return one, other


def library(source: Source) -> Tokenizer:
    return Tokenizer.from_buffer(source.tokenizer.files["tokenizer.json"])


OVER_THE_BASE: dict[str, dict[str, dict[str, Any]]] = {
    "added_tokens": {"added_tokens.json": {"<tool>": VOCAB, "word": VOCAB + 1}},
    "decoder": {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {str(VOCAB): token("<tool>", lstrip=True)},
        }
    },
    "special_map": {
        "special_tokens_map.json": {"eos_token": "<end>", "additional_special_tokens": ["<tool>"]}
    },
    "eos": {"tokenizer_config.json": {"eos_token": "<end>", "pad_token": "</s>"}},
    "class": {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
}


@pytest.mark.parametrize("name", OVER_THE_BASE)
def test_files_without_a_tokenizer_json_are_put_over_the_bases(
    name: str, adapter: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    put(adapter, OVER_THE_BASE[name])
    whole = Path(shutil.copytree(checkpoints["llama"], tmp_path / "whole"))
    theirs = AutoTokenizer.from_pretrained(put(whole, OVER_THE_BASE[name]))
    base, notes = opened(checkpoints["llama"], adapter)
    assert library(base).get_vocab_size() == VOCAB
    assert library(notes).get_vocab(with_added_tokens=True) == theirs.get_vocab()
    for text in corpus(sorted(theirs.get_added_vocab())):
        assert library(notes).encode(text).ids == theirs.encode(text)
    assert notes.tokenizer.eos_token_id == theirs.eos_token_id


def test_a_tokenizer_of_its_own_stands_alone(
    adapter: Path, checkpoints: dict[str, Path], tokenizer_json: Path
) -> None:
    from transformers import AutoTokenizer

    shutil.copy(tokenizer_json, adapter / "tokenizer.json")
    put(adapter, {"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<end>"}})
    theirs = AutoTokenizer.from_pretrained(adapter)
    _, notes = opened(checkpoints["llama"], adapter)
    for text in corpus(["<end>", "<|endoftext|>"]):
        assert library(notes).encode(text).ids == theirs.encode(text)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"added_tokens.json": {"<tool>": 280}}, "'<tool>' has id 258 .* gives it id 280"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"270": token("<a>")}}}, "'<a>' has .*id 270"),
        (
            {
                "tokenizer_config.json": {"added_tokens_decoder": {}},
                "special_tokens_map.json": {"eos_token": token("<end>")},
            },
            "'<end>' has id None .* names it",
        ),
    ],
)
def test_ids_that_the_base_cannot_give_are_refused(
    files: dict[str, Any], said: str, adapter: Path, checkpoints: dict[str, Path]
) -> None:
    put(adapter, files)
    with pytest.raises(CheckpointError, match=f"adapter: token {said}.* save the adapter's whole tokenizer"):
        opened(checkpoints["llama"], adapter)


def test_a_vocabulary_without_tokenizer_json_is_refused(adapter: Path, checkpoints: dict[str, Path]) -> None:
    (adapter / "tokenizer.model").write_bytes(b"\x00")
    with pytest.raises(CheckpointError, match=r"tokenizer.model is a tokenizer .* tokenizer.json is missing"):
        opened(checkpoints["llama"], adapter)


def test_a_base_in_the_zoo_gives_the_same_tokenizer_as_one_given(
    adapter: Path, checkpoint: Path, tmp_path: Path
) -> None:
    put(checkpoint, {"tokenizer_config.json": {"extra_special_tokens": ["<base>"]}})
    put(adapter, {"added_tokens.json": {"<tool>": VOCAB + 1}, "generation_config.json": {"eos_token_id": 9}})
    compile_models({"base": checkpoint, "notes": adapter}, tmp_path / "together", FAST)
    compile_models({"base": checkpoint}, tmp_path / "apart", FAST)
    compile_models({"notes": adapter}, tmp_path / "apart", FAST)
    assert (tmp_path / "apart/manifest.json").read_text() == (tmp_path / "together/manifest.json").read_text()
    zoo = Zoo.open(tmp_path / "apart")
    stored = {
        name: Tokenizer.from_file(str(zoo.tokenizer_dir(name) / "tokenizer.json"))
        for name in ("base", "notes")
    }
    assert stored["base"].encode("<base><tool>").ids[0] == VOCAB
    assert len(stored["base"].encode("<base><tool>").ids) == 7
    assert stored["notes"].encode("<base><tool>").ids == [VOCAB, VOCAB + 1]


def test_a_chat_template_alone_leaves_the_tokens(adapter: Path, checkpoints: dict[str, Path]) -> None:
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    base, notes = opened(checkpoints["llama"], adapter)
    added = {"chat_template.jinja": b"{{ messages }}", "chat_special_tokens.json": b"{}"}
    assert notes.tokenizer.files == {**base.tokenizer.files, **added}


END_IDS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    # files of the base and of the adapter, end tokens of each; the base's generation_config has 257 and 258
    "nothing said": ({}, {}, (257, 258), (257, 258)),
    "the base's tokenizer": (
        {"tokenizer_config.json": {"eos_token": "<s>"}},
        {},
        (257, 258, 256),
        (257, 258, 256),
    ),
    "known already": ({"tokenizer_config.json": {"eos_token": "</s>"}}, {}, (257, 258), (257, 258)),
    "generation config": ({}, {"generation_config.json": {"eos_token_id": 5}}, (257, 258), (5,)),
    "several": ({}, {"generation_config.json": {"eos_token_id": [5, 6]}}, (257, 258), (5, 6)),
    "none of them": ({}, {"generation_config.json": {"max_length": 6}}, (257, 258), (257, 258)),
    "eos token": ({}, {"tokenizer_config.json": {"eos_token": "<s>"}}, (257, 258), (257, 258, 256)),
    "new eos token": ({}, {"special_tokens_map.json": {"eos_token": "<end>"}}, (257, 258), (257, 258)),
    "another eos token": (
        {"tokenizer_config.json": {"eos_token": "<s>"}},
        {"tokenizer_config.json": {"eos_token": "</s>"}},
        (257, 258, 256),
        (257, 258),
    ),
    "both": (
        {"tokenizer_config.json": {"eos_token": "<s>"}},
        {"generation_config.json": {"eos_token_id": 5}},
        (257, 258, 256),
        (5, 256),
    ),
}


@pytest.mark.parametrize("name", END_IDS)
def test_where_answers_end(name: str, adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    of_base, of_adapter, base_ids, ids = END_IDS[name]
    put(checkpoint, of_base)
    put(adapter, of_adapter)
    compile_models({"base": checkpoint, "notes": adapter}, tmp_path / "zoo", FAST)
    models = Zoo.open(tmp_path / "zoo").manifest.models
    assert (models["base"].end_ids, models["notes"].end_ids) == (base_ids, ids)


def test_an_end_token_without_a_row_in_the_model_ends_nothing(
    adapter: Path, checkpoints: dict[str, Path]
) -> None:
    added = [f"<{i}>" for i in range(288 - VOCAB)]
    put(adapter, {"tokenizer_config.json": {"extra_special_tokens": added, "eos_token": "<end>"}})
    put(adapter, {"added_tokens.json": {content: VOCAB + i for i, content in enumerate(added)}})
    _, notes = opened(checkpoints["llama"], adapter)
    assert notes.tokenizer.eos_token_id == 288
    assert notes.end_ids == (257, 258)
    assert notes.notes() == (
        "token ids 288 to 288 of its tokenizer have no embedding: texts with them are refused",
    )
    file = TensorFile(adapter / "adapter_model.safetensors")
    tensors = {name: file.tensor(name) for name in file.names}
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = from_f32(np.ones((290, 64)), "bf16")
    write_tensor_file(adapter / "new", tensors, {})
    (adapter / "new").rename(adapter / "adapter_model.safetensors")
    _, notes = opened(checkpoints["llama"], adapter)
    assert notes.end_ids == (257, 258, 288)
    assert notes.notes() == ()


def test_a_generation_config_of_the_wrong_kind_is_named(adapter: Path, checkpoints: dict[str, Path]) -> None:
    put(adapter, {"generation_config.json": {"eos_token_id": "</s>"}})
    with pytest.raises(ZooError, match=r"adapter: generation_config.json: eos_token_id must be a token id"):
        opened(checkpoints["llama"], adapter)


def test_other_end_tokens_are_other_content(adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    compile_models({"base": checkpoint, "notes": adapter}, tmp_path / "zoo", FAST)
    put(adapter, {"generation_config.json": {"eos_token_id": 5}})
    with pytest.raises(ZooError, match="notes is in the zoo with other content"):
        compile_models({"notes": adapter}, tmp_path / "zoo", FAST)
