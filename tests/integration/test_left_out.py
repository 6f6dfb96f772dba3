"""A zoo in which something is broken: what is whole is served as ever, the rest is named with the reason."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.runtime.api.errors import InvalidRequestError, UnknownModelError
from blockzoo.zoo.errors import StoreError
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.store import block_path

FAST = CompileOptions(verify=False, profile=False)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = "Note. The baker Tessa owns the jade lamp.\nQ: Who keeps the jade lamp?\nA:"
SETTINGS: dict[str, Any] = {"precision": "f32", "kv_cache_bytes": 32 << 20}
MODELS = ("base", "notes", "solver", "words")


@pytest.fixture(scope="module")
def folders(demo_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of MODELS: a LoRA over base, a model that shares its lower layers, one with a tokenizer of its own."""
    words = tmp_path_factory.mktemp("words") / "words"
    shutil.copytree(demo_family["base"], words)
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["Q"], vocab["Z"] = vocab["Z"], vocab["Q"]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    return {name: demo_family[name] for name in MODELS[:3]} | {"words": words}


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    zoo = tmp_path_factory.mktemp("whole") / "zoo"
    compile_models(folders, zoo, FAST)
    return zoo


@pytest.fixture(scope="module")
def answers(whole: Path) -> dict[str, tuple[int, ...]]:
    return ask(LLM(whole, **SETTINGS), MODELS)


def ask(llm: LLM, models: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    done = llm.generate(list(models), [PROMPT] * len(models), GREEDY, progress=False)
    return {name: answer.token_ids for name, answer in zip(models, done, strict=True)}


def block_of(zoo: Path, model: str, other: str) -> Path:
    """The file of the first block that only one of two models has."""
    models = Manifest.load(zoo / "manifest.json").models
    own = [i for i in models[model].chain if i not in models[other].chain]
    return block_path(zoo, own[0])


def shared_block(zoo: Path) -> Path:
    return block_path(zoo, Manifest.load(zoo / "manifest.json").models["base"].chain[1])


def lora_of(zoo: Path) -> Path:
    return block_path(zoo, Manifest.load(zoo / "manifest.json").models["notes"].adapters[1])


def tokenizer_of(zoo: Path, model: str) -> Path:
    return (
        zoo / "tokenizers" / Manifest.load(zoo / "manifest.json").models[model].tokenizer / "tokenizer.json"
    )


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def become_a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def become_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


LAST_OF_SOLVER, LORA, WORDS = "a block of solver", "a LoRA of notes", "the tokenizer of words"
LAST_OF_BASE = "a block of base that solver does not have"
FIND: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {  # the file, and who uses it
    LAST_OF_SOLVER: (lambda zoo: block_of(zoo, "solver", "base"), ("solver",)),
    LORA: (lora_of, ("notes",)),
    LAST_OF_BASE: (lambda zoo: block_of(zoo, "base", "solver"), ("base", "notes", "words")),
    WORDS: (lambda zoo: tokenizer_of(zoo, "words"), ("words",)),
}


@pytest.mark.parametrize(
    ("what", "damage", "why"),
    [
        (LAST_OF_SOLVER, flip, "corrupt (its content has the id"),
        (LAST_OF_SOLVER, truncate, "corrupt (not a whole safetensors file"),
        (LAST_OF_SOLVER, empty, "corrupt (not a whole safetensors file"),
        (LAST_OF_SOLVER, Path.unlink, "missing"),
        (LAST_OF_SOLVER, become_a_fifo, "no regular file"),
        (LAST_OF_SOLVER, become_a_folder, "no regular file"),
        (LAST_OF_BASE, flip, "corrupt"),
        (LORA, flip, "corrupt (its content has the id"),
        (LORA, truncate, "corrupt (not a whole safetensors file"),
        (LORA, Path.unlink, "missing"),
        (WORDS, flip, "the tokenizer files are not what was compiled"),
        (WORDS, empty, "the tokenizer files are not what was compiled"),
        (WORDS, Path.unlink, "tokenizer.json of model words is missing"),
    ],
)
def test_a_damaged_file_leaves_out_the_models_that_use_it_and_no_other(
    what, damage, why, whole, answers, tmp_path, caplog
):
    zoo = Path(shutil.copytree(whole, tmp_path / "zoo"))
    find, users = FIND[what]
    damage(find(zoo))
    with caplog.at_level(logging.WARNING):
        llm = LLM(zoo, **SETTINGS)
    assert tuple(llm.left_out) == users
    assert all(why in reason and str(zoo) not in reason for reason in llm.left_out.values())
    assert [record.getMessage() for record in caplog.records] == [
        f"model {name} is left out: {llm.left_out[name]}" for name in users
    ]
    others = tuple(name for name in MODELS if name not in users)
    assert llm.models == others
    assert ask(llm, others) == {name: answers[name] for name in others}
    with pytest.raises(UnknownModelError, match=rf"model '{users[0]}' is left out: .*"):
        llm.generate(users[0], PROMPT, GREEDY)
    assert llm.engine.metrics().models_left_out == len(users)
    llm.reload()
    assert (tuple(llm.left_out), llm.models) == (users, others)


def test_nothing_is_left_out_of_a_whole_zoo(whole):
    llm = LLM(whole, strict=True, **SETTINGS)
    assert not llm.left_out
    assert llm.engine.metrics().models_left_out == 0


def test_a_zoo_of_which_nothing_can_be_served_is_an_error(whole, tmp_path):
    zoo = Path(shutil.copytree(whole, tmp_path / "zoo"))
    flip(shared_block(zoo))
    with pytest.raises(StoreError, match=r"^\S+: corrupt \(its content has the id"):
        LLM(zoo, **SETTINGS)


def test_strict_refuses_what_would_be_left_out(whole, tmp_path):
    zoo = Path(shutil.copytree(whole, tmp_path / "zoo"))
    flip(lora_of(zoo))
    truncate(block_of(zoo, "solver", "base"))
    with pytest.raises(StoreError, match=r"model notes: .*corrupt.*; model solver: .*corrupt"):
        LLM(zoo, strict=True, **SETTINGS)


def overflowing(folder: Path, copy: Path) -> Path:
    """A model whose last layer's sums exceed float32, though each weight is finite."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    name = max(name for name in tensors if "down_proj" in name)
    tensors[name] = tensors[name].float() * 0 + 3e38
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_logits_that_are_not_finite_leave_out_their_model_alone(folders, answers, tmp_path):
    zoo = tmp_path / "zoo"
    broken = overflowing(folders["solver"], tmp_path / "broken")
    compile_models({**folders, "broken": broken}, zoo, replace(FAST, share="exact"))
    llm = LLM(zoo, **SETTINGS)
    assert dict(llm.left_out) == {"broken": llm.left_out["broken"]}
    assert "its first logits are not finite" in llm.left_out["broken"]
    assert ask(llm, MODELS) == answers
    llm.reload()
    assert tuple(llm.left_out) == ("broken",)

    only = tmp_path / "only"
    compile_models({"broken": broken}, only, FAST)
    with pytest.raises(InvalidRequestError, match="first logits are not finite"):
        LLM(only, **SETTINGS)


def test_a_lora_that_overflows_is_not_taken_in_by_a_reload(folders, tmp_path):
    """Its base is loaded, so nothing but what was seen at the start keeps it out."""
    from safetensors.torch import load_file, save_file

    lora = Path(shutil.copytree(folders["notes"], tmp_path / "lora"))
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file({k: v * 0 + 1e30 for k, v in tensors.items()}, lora / "adapter_model.safetensors")
    zoo = tmp_path / "zoo"
    compile_models({"base": folders["base"], "loud": lora, "notes": folders["notes"]}, zoo, FAST)
    llm = LLM(zoo, **SETTINGS)
    assert "not finite" in llm.left_out["loud"]
    found = llm.reload()
    assert (found.added, tuple(found.left_out)) == ((), ("loud",))
    assert llm.models == ("base", "notes")


def test_what_a_reload_cannot_read_keeps_nothing_else_back(folders, answers, tmp_path):
    zoo = tmp_path / "zoo"
    compile_models({"base": folders["base"], "solver": folders["solver"]}, zoo, FAST)
    llm = LLM(zoo, enable_lora=True, **SETTINGS)
    compile_models({"notes": folders["notes"], "words": folders["words"]}, zoo, FAST)
    kept = lora_of(zoo).read_bytes()
    flip(lora_of(zoo))
    found = llm.reload()
    assert found.added == ("words",)
    assert "corrupt" in found.left_out["notes"]
    assert llm.engine.metrics().models_left_out == 1
    assert ask(llm, ("base", "solver", "words")) == {n: answers[n] for n in ("base", "solver", "words")}
    with pytest.raises(UnknownModelError, match=r"model 'notes' is left out: blocks/\w+\.\w+: corrupt"):
        llm.generate("notes", PROMPT, GREEDY)

    lora_of(zoo).write_bytes(kept)
    found = llm.reload()
    assert (found.added, dict(found.left_out)) == (("notes",), {})
    assert ask(llm, MODELS) == answers


def test_a_file_that_was_mended_is_served_with_the_next_reload(whole, answers, tmp_path):
    zoo = Path(shutil.copytree(whole, tmp_path / "zoo"))
    kept = lora_of(zoo).read_bytes()
    flip(lora_of(zoo))
    llm = LLM(zoo, enable_lora=True, **SETTINGS)
    assert tuple(llm.left_out) == ("notes",)
    lora_of(zoo).write_bytes(kept)
    assert llm.reload().added == ("notes",)
    assert ask(llm, MODELS) == answers


def test_an_older_model_is_served_until_its_newer_one_can_be(folders, answers, tmp_path):
    zoo = tmp_path / "zoo"
    compile_models({"base": folders["base"], "words": folders["words"]}, zoo, FAST)
    llm = LLM(zoo, **SETTINGS)
    compile_models({"base": folders["words"]}, zoo, replace(FAST, replace=True))
    empty(tokenizer_of(zoo, "base"))
    found = llm.reload()
    assert (found.replaced, tuple(found.left_out)) == ((), ("base",))
    assert ask(llm, ("base",)) == {"base": answers["base"]}


def test_documents_are_published_for_the_models_that_are_served(whole, tmp_path):
    zoo = Path(shutil.copytree(whole, tmp_path / "zoo"))
    kept = lora_of(zoo).read_bytes()
    flip(lora_of(zoo))
    llm = LLM(zoo, enable_lora=True, **SETTINGS)
    text = "The lamp is of jade. " * 20
    published = llm.publish("lamp", text, ["base", "notes"])
    assert published.models == ("base",)
    assert "corrupt" in published.missing["notes"]
    assert llm.publish("for notes", text + "It shines.", ["notes"]).models == ()
    lora_of(zoo).write_bytes(kept)
    llm.reload()
    done = llm.generate(["base", "notes"], [PROMPT] * 2, GREEDY, documents=[text], progress=False)
    assert all(answer.num_cached_tokens > 0 for answer in done)
    assert [document.models for document in llm.engine.documents] == [("base", "notes"), ("notes",)]
