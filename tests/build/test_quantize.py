"""zoo-compile --weights: what is stored, who shares it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockzoo.build import calibration
from blockzoo.build.cli import main
from blockzoo.build.inspect import main as inspect
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.zoo.manifest import ModelRecord
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.summary import sharing_bytes

Tree = Callable[[Path], dict[str, str]]
FAST = CompileOptions(verify=False, profile=False)
INT8 = CompileOptions(weights="int8", verify=False, profile=False)
INT4 = CompileOptions(weights="int4", verify=False, profile=False)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are small enough to be told by little text."""
    monkeypatch.setattr(calibration, "NUM_TOKENS", 32)


@pytest.fixture(scope="module")
def pair(make_model: Callable[..., Any], save: Callable[..., Path], tmp_path_factory: Any) -> dict[str, Path]:
    """Two models that differ in their last feed-forward block; both tie their head."""
    import torch

    root = tmp_path_factory.mktemp("pair")
    model = make_model("llama", 3)
    save(model, root / "one")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(-1.0)
    save(model, root / "two")
    return {"one": root / "one", "two": root / "two"}


def dtypes(zoo: Path, model: str) -> list[str]:
    manifest = Zoo.open(zoo).manifest
    return [manifest.blocks[key].dtype for key in manifest.models[model].chain]


def record(zoo: Path, model: str) -> ModelRecord:
    return Zoo.open(zoo).manifest.models[model]


def test_blocks_are_stored_in_the_bits_asked_for(pair: dict[str, Path], tmp_path: Path) -> None:
    for weights, inner in (("int8", "i8"), ("int4", "i4")):
        zoo = tmp_path / weights
        compile_models(
            {"one": pair["one"]}, zoo, CompileOptions(weights=weights, verify=False, profile=False)
        )  # type: ignore[arg-type]
        assert dtypes(zoo, "one") == ["i8", *[inner] * 6, "bf16"]  # the tied head holds its norm alone
        opened = Zoo.open(zoo)
        files = {path.stem for path in (zoo / "blocks").iterdir()}
        assert files == set(opened.manifest.blocks)  # those as given are gone
        for key, block in opened.manifest.blocks.items():
            tensors = opened.read_block(key).tensors
            own = {name: t for name, t in tensors.items() if name != "weight" or block.tied_to is None}
            assert block.num_bytes == sum(t.num_bytes for t in own.values())
            assert block.quantized is not None
            for name, tensor in own.items():
                assert (tensor.dtype == "bf16") == (len(tensor.shape) == 1), name
                if name in ("q", "k", "v", "o"):
                    assert tensor.dtype == ("i8" if name in ("k", "v") else inner)


def test_models_share_quantized_blocks_as_they_shared_the_given_ones(
    pair: dict[str, Path], tmp_path: Path
) -> None:
    zoo, together = tmp_path / "z", tmp_path / "together"
    compile_models({"one": pair["one"]}, zoo, INT8)
    report = compile_models({"two": pair["two"]}, zoo, INT8)
    one, two = (record(zoo, name).chain for name in pair)
    assert [a == b for a, b in zip(one, two, strict=True)] == [True] * 6 + [False, True]
    assert report.models[0].num_reused == 7
    assert report.models[0].new_bytes == Zoo.open(zoo).manifest.blocks[two[6]].num_bytes
    compile_models(dict(pair), together, INT8)
    assert record(together, "one").chain == one
    compile_models({}, zoo, FAST, remove=["one"])
    assert {path.stem for path in (zoo / "blocks").iterdir()} == set(two)


def test_a_zoo_may_hold_both(pair: dict[str, Path], tmp_path: Path) -> None:
    zoo = tmp_path / "z"
    compile_models({"plain": pair["one"]}, zoo, FAST)
    compile_models({"small": pair["one"], "other": pair["two"]}, zoo, INT4)
    manifest = Zoo.open(zoo).manifest
    assert set(dtypes(zoo, "plain")) == {"bf16"}
    made_of = [manifest.blocks[key].quantized for key in record(zoo, "small").chain]
    assert [made.source for made in made_of if made] == list(record(zoo, "plain").chain)
    assert record(zoo, "small").chain[:6] == record(zoo, "other").chain[:6]


def test_the_same_again_changes_nothing_and_other_bits_need_replace(
    pair: dict[str, Path], tmp_path: Path, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = tmp_path / "z"
    compile_models({"one": pair["one"]}, zoo, INT8)
    before = tree(zoo)
    report = compile_models({"one": pair["one"]}, zoo, INT8)
    assert report.models[0].status == "unchanged"
    assert (report.models[0].num_reused, report.models[0].new_bytes) == (8, 0)
    assert report.freed_bytes == 0  # what was written on the way does not count
    assert tree(zoo) == before
    given = [f"one={pair['one']}", "-o", str(zoo), "--no-verify", "--no-profile"]
    for weights in ([], ["--weights", "int4"], ["--weights", "int8", "--max-kl", "0.5"]):
        assert main([*given, *weights]) == 2
        assert "--replace" in capsys.readouterr().err
        assert tree(zoo) == before
    assert main([*given, "--weights", "int4", "--replace"]) == 0
    assert dtypes(zoo, "one")[1] == "i4"


def test_damaged_quantized_blocks_are_made_again(pair: dict[str, Path], tmp_path: Path, tree: Tree) -> None:
    zoo = tmp_path / "z"
    compile_models({"one": pair["one"]}, zoo, INT8)
    before = tree(zoo)
    first, second, *_ = sorted((zoo / "blocks").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    compile_models({"one": pair["one"]}, zoo, INT8)
    assert tree(zoo) == before


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_dry_run_tells_the_size(weights: Any, pair: dict[str, Path], tmp_path: Path) -> None:
    options = CompileOptions(weights=weights, verify=False, profile=False, dry_run=True)
    said = compile_models(dict(pair), tmp_path / "z", options)
    assert not (tmp_path / "z").exists()
    done = compile_models(
        dict(pair), tmp_path / "z", CompileOptions(weights=weights, verify=False, profile=False)
    )
    assert [m.new_bytes for m in said.models] == [m.new_bytes for m in done.models]
    assert said.stored_bytes == done.stored_bytes == sharing_bytes(Zoo.open(tmp_path / "z").manifest)[1]


def test_figures_are_kept_and_shown(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo, probe = tmp_path / "z", tmp_path / "text"
    probe.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 4)
    given = ["-o", str(zoo), "--weights", "int8", "--no-profile", "--probe", str(probe), "--max-kl", "0.2"]
    assert main([f"one={pair['one']}", *given]) == 0
    said = capsys.readouterr().out
    assert "weights int8 in groups of 32: 1 blocks bf16" in said
    assert ", 9.0 bits a value; over" in said  # 8, and a scale of 32 for 32 columns
    found = record(zoo, "one").quantization
    assert found is not None
    assert (found.probe, found.weights, found.max_kl) == ("text", "int8", 0.2)
    figures = found.figures["f32"]
    assert 0 < figures.kl < 0.2
    assert figures.top1 > 0.8
    assert figures.greedy_agreement > 0.8
    assert abs(figures.perplexity / found.perplexity - 1) < 0.2
    assert record(zoo, "one").verification is not None  # of the blocks as given
    assert inspect([str(zoo), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["models"]["one"]["quantization"]["figures"]["f32"]["kl"] == figures.kl
    assert {block["dtype"] for block in said["blocks"].values()} == {"i8", "bf16"}
    assert inspect([str(zoo)]) == 0
    assert "same top token" in capsys.readouterr().out


def test_a_model_that_strays_too_far_is_refused(
    pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"one={pair['one']}", "-o", str(tmp_path / "z"), "--weights", "int4", "--no-profile"]
    assert main([*given, "--max-kl", "1e-9"]) == 2
    said = capsys.readouterr().err
    assert "one: with weights in int4 it strays from itself by" in said
    assert "raise --max-kl" in said
    assert not (tmp_path / "z").exists()


def test_adapters_take_a_quantized_base_as_it_is(
    pair: dict[str, Path], make_adapter: Callable[..., Any], tmp_path: Path
) -> None:
    """Of a base that is quantized with them, and of one that is in the zoo already."""
    zoo = tmp_path / "z"
    make_adapter(pair["one"], tmp_path / "lora")
    make_adapter(pair["one"], tmp_path / "both", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    compile_models({"one": pair["one"], "first": f"{tmp_path / 'lora'}@one"}, zoo, INT4)
    assert record(zoo, "first").chain == record(zoo, "one").chain
    # verified against the numpy forward of the quantized values
    report = compile_models({"later": f"{tmp_path / 'lora'}@one"}, zoo, CompileOptions(profile=False))
    assert report.models[0].num_reused == 8
    assert record(zoo, "later").chain == record(zoo, "one").chain
    assert record(zoo, "later").adapters == record(zoo, "first").adapters
    report = compile_models(
        {"ends": f"{tmp_path / 'both'}@one"}, zoo, CompileOptions(weights="int4", profile=False)
    )
    assert any("leaves its blocks as they are" in note for note in report.models[0].notes)
    assert record(zoo, "ends").chain[1:7] == record(zoo, "one").chain[1:7]
    assert dtypes(zoo, "ends")[0] == "bf16"
    verified = record(zoo, "ends").verification
    assert verified is not None
    assert verified.figures["f32"].max_relative_error < 1e-4


def test_a_merged_lora_is_taken_out_before(demo_family: dict[str, Path], tmp_path: Path) -> None:
    models: dict[str, str | Path] = {name: demo_family[name] for name in ("base", "notes-merged")}
    compile_models(models, tmp_path / "z", INT8)
    merged = record(tmp_path / "z", "notes-merged")
    assert merged.recovery is not None
    assert len(merged.adapters) == 12
    assert merged.chain == record(tmp_path / "z", "base").chain
    again = compile_models(models, tmp_path / "z", INT8)
    assert [model.status for model in again.models] == ["unchanged"] * 2


def test_a_quantized_base_is_not_converted(
    pair: dict[str, Path],
    make_adapter: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compile_models({"one": pair["one"]}, tmp_path / "z", INT8)
    make_adapter(pair["one"], tmp_path / "lora")
    assert main([f"x={tmp_path / 'lora'}@one", "-o", str(tmp_path / "z"), "--dtype", "f16"]) == 2
    assert "is quantized: --dtype cannot convert it" in capsys.readouterr().err


@pytest.mark.slow
def test_every_architecture_is_near_to_itself(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = CompileOptions(weights="int8", profile=False, max_kl=0.3)
    compile_models(dict(checkpoints), tmp_path / "z", options)
    for name in checkpoints:
        found = record(tmp_path / "z", name).quantization
        assert found is not None
        assert found.figures["f32"].top1 > 0.8, name
        assert np.isfinite(found.figures["f32"].perplexity)
