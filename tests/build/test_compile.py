"""zoo-compile from its command line: what it adds, what it refuses, and that a refusal changes nothing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockzoo.build.cli import main
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.writer import ZooWriter

FAST = ["--no-verify", "--no-profile"]
Tree = Callable[[Path], dict[str, str]]


@pytest.fixture
def zoo(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "zoo"
    assert main([f"base={checkpoints['llama']}", "-o", str(path), *FAST]) == 0
    return path


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def test_adding_reports_reuse_and_sizes(
    zoo: Path, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"copy={checkpoints['llama']}", f"other={checkpoints['qwen3']}", "-o", str(zoo), *FAST]) == 0
    out = capsys.readouterr().out
    assert "copy   added: reused 8 of 8 blocks, 0 B new of 222 kB" in out
    assert "other  added: reused 0 of 8 blocks" in out
    assert "the zoo holds 3 models in 16 distinct blocks" in out
    manifest = Zoo.open(zoo).manifest
    assert manifest.models["copy"].chain == manifest.models["base"].chain
    assert manifest.models["base"].config.eos_token_ids == (257, 258)
    assert len(list((zoo / "blocks").iterdir())) == 16
    assert len(list((zoo / "tokenizers").iterdir())) == 2  # transformers makes a Qwen2Tokenizer of the file


def test_names_default_to_the_folder(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoints["llama"]), "-o", str(tmp_path / "z"), "--json", *FAST]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["models"][0]["name"] == "llama"
    assert report["stored_bytes"] == report["unshared_bytes"] == report["models"][0]["new_bytes"]


def test_a_dry_run_writes_nothing(
    zoo: Path, checkpoints: dict[str, Path], tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(zoo)
    assert main([f"m={checkpoints['mistral']}", "-o", str(zoo), "--remove", "base", "--dry-run"]) == 0
    assert tree(zoo) == before
    assert "the zoo would hold 1 model in 8 distinct blocks" in capsys.readouterr().out
    assert main([f"m={checkpoints['mistral']}", "-o", str(zoo.parent / "new"), "--dry-run"]) == 0
    assert not (zoo.parent / "new").exists()


def test_the_same_model_again_changes_nothing(
    zoo: Path, checkpoints: dict[str, Path], tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(zoo)
    assert main([f"base={checkpoints['llama']}", "-o", str(zoo), *FAST]) == 0
    assert "base  unchanged: reused 8 of 8 blocks" in capsys.readouterr().out
    assert tree(zoo) == before


def test_another_model_of_the_same_name_needs_replace(
    zoo: Path, checkpoints: dict[str, Path], tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(zoo)
    assert main([f"base={checkpoints['qwen2']}", "-o", str(zoo), *FAST]) == 2
    assert "--replace" in capsys.readouterr().err
    assert tree(zoo) == before
    assert main([f"base={checkpoints['qwen2']}", "-o", str(zoo), "--replace", *FAST]) == 0
    assert Zoo.open(zoo).manifest.models["base"].config.architecture == "Qwen2ForCausalLM"
    assert len(list((zoo / "blocks").iterdir())) == 8


def test_a_replaced_base_says_which_adapters_stay_on_the_old_one(
    zoo: Path,
    checkpoints: dict[str, Path],
    make_model: Callable[..., Any],
    save: Callable[..., Path],
    make_adapter: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = tmp_path / "adapter"
    make_adapter(checkpoints["llama"], adapter)
    of_base = [f"{name}={adapter}@base" for name in ("follows", "stays")]
    assert main([*of_base, f"second={adapter}@stays", "-o", str(zoo), *FAST]) == 0
    assert "stay on the old" not in capsys.readouterr().out
    old = Zoo.open(zoo).manifest.models["base"].chain
    given = [f"base={save(make_model('llama', 77), tmp_path / 'new')}", of_base[0]]
    assert main([*given, "-o", str(zoo), "--replace", *FAST]) == 0
    said = "adapters that stay on the old base (compile them too): stays, second\n"
    assert said in capsys.readouterr().out
    models = Zoo.open(zoo).manifest.models
    assert models["follows"].chain == models["base"].chain != old
    assert models["stays"].chain == models["second"].chain == old


def test_remove_collects_garbage(
    zoo: Path, checkpoints: dict[str, Path], tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(zoo)
    assert main([f"extra={checkpoints['mistral']}", "-o", str(zoo), *FAST]) == 0
    assert main(["-o", str(zoo), "--remove", "extra", *FAST]) == 0
    assert tree(zoo) == before
    assert main(["-o", str(zoo), "--remove", "bose"]) == 2
    assert "did you mean base?" in capsys.readouterr().err


def test_damaged_blocks_are_written_again(zoo: Path, checkpoints: dict[str, Path], tree: Tree) -> None:
    before = tree(zoo)
    first, second, *_ = sorted((zoo / "blocks").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    assert main([f"base={checkpoints['llama']}", "-o", str(zoo), *FAST]) == 0
    assert tree(zoo) == before


def test_an_interrupted_run_is_continued(
    zoo: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ZooWriter, "add_tokenizer", interrupt)
        assert main([f"m={checkpoints['mistral']}", "-o", str(zoo), *FAST]) == 130
    assert list(Zoo.open(zoo).manifest.models) == ["base"]
    written = {path.name: path.stat().st_ino for path in (zoo / "blocks").iterdir()}
    assert len(written) == 16
    assert main([f"m={checkpoints['mistral']}", "-o", str(zoo), *FAST]) == 0
    assert {path.name: path.stat().st_ino for path in (zoo / "blocks").iterdir()} == written


def test_two_writers_do_not_meet(
    zoo: Path, checkpoints: dict[str, Path], tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(zoo)
    with ZooWriter(zoo):
        assert main([f"m={checkpoints['mistral']}", "-o", str(zoo), *FAST]) == 2
    assert "another zoo-compile is writing" in capsys.readouterr().err
    assert tree(zoo) == before
    assert main([f"m={checkpoints['mistral']}", "-o", str(zoo), *FAST]) == 0


def cut_file(name: str, keep: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:keep])

    return damage


def remove_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def break_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def escape_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def foreign_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: i + 1000 for token, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-folder": (shutil.rmtree, "is not a folder"),
    "no-config": (remove_file("config.json"), "config.json is missing"),
    "config-cut": (cut_file("config.json", 40), "not readable as JSON"),
    "no-weights": (remove_file("model.safetensors"), "expected model.safetensors"),
    "weights-cut": (cut_file("model.safetensors", 5000), "not a whole safetensors file"),
    "weights-empty": (cut_file("model.safetensors", 0), "not a whole safetensors file"),
    "no-tokenizer": (remove_file("tokenizer.json"), "tokenizer.json is missing"),
    "tokenizer-cut": (cut_file("tokenizer.json", 100), "tokenizer.json: not readable"),
    "tokenizer-other-json": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json is not readable",
    ),
    "tokenizer-foreign": (foreign_tokenizer, "tokenizer of another model"),
    "shard-missing": (break_index, "model-00001-of-00002.safetensors is missing"),
    "shard-elsewhere": (escape_index, "is not the name of a file in this folder"),
    "architecture": (lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "no-architecture": (lambda f: edit_config(f, architectures=...), "architectures"),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), "'gelu'"),
    "quantized": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "'gptq'"),
    "rope": (lambda f: edit_config(f, rope_parameters={"rope_type": "dynamic", "factor": 2}), "'dynamic'"),
    "shape": (
        lambda f: edit_config(f, intermediate_size=128),
        r"has shape [96, 64], config.json asks for [128",
    ),
    "layers": (lambda f: edit_config(f, num_hidden_layers=4), "model.layers.3.input_layernorm.weight"),
    "fewer-layers": (lambda f: edit_config(f, num_hidden_layers=2), "belong to no block"),
    "untied": (lambda f: edit_config(f, tie_word_embeddings=False), "lm_head.weight is missing"),
    "no-number": (lambda f: edit_config(f, hidden_size="64"), "hidden_size must be a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused_and_change_nothing(
    case: str, zoo: Path, checkpoint: Path, checkpoints: dict[str, Path], tree: Tree, capfd: Any
) -> None:
    damage, said = BAD[case]
    damage(checkpoint)
    before = tree(zoo)
    # a sound model that comes first is not added either
    assert main([f"ok={checkpoints['qwen2']}", f"bad={checkpoint}", "-o", str(zoo), *FAST]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.startswith("zoo-compile: error: ")
    assert error.count("\n") == 1
    assert tree(zoo) == before
    assert main([f"bad={checkpoint}", "-o", str(zoo.parent / "new"), *FAST]) == 2
    assert not (zoo.parent / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a b=x"], "model name 'a b'"),
        (["m=", "x"], "the path is missing"),
        (["m=x", "m=y"], "two models are named m"),
        (["m=base@other"], "is not a folder"),
    ],
)
def test_bad_names(arguments: list[str], said: str, tmp_path: Path, capfd: Any) -> None:
    assert main([*arguments, "-o", str(tmp_path / "z")]) == 2
    assert said in capfd.readouterr().err


def test_an_output_that_is_no_zoo_is_left_alone(
    checkpoints: dict[str, Path], tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me too")
    for name in ("mine", "file"):
        assert main([f"m={checkpoints['llama']}", "-o", str(tmp_path / name), *FAST]) == 2
    assert "holds 'letter.txt'" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("command", ["cli", "inspect"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = f"""
import sys
from blockzoo.build.{command} import main
try:
    main(["--help"])
except SystemExit as stop:
    heavy = {{"openvino", "numpy", "safetensors", "tokenizers", "rich", "torch"}} & set(sys.modules)
    sys.exit(f"imported {{heavy}}" if heavy or stop.code else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: zoo-" in done.stdout
