"""zoo-compile --share delta: what is stored, how near it is, and what is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockzoo.build import calibration
from blockzoo.build.cli import main
from blockzoo.build.inspect import main as inspect
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.zoo.manifest import DeltaRecord, ModelRecord
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.summary import delta_text

Tree = Callable[[Path], dict[str, str]]
DELTA = CompileOptions(verify=False, profile=False, share="delta", max_kl=0.01, threads=1)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are small enough to be told by little text."""
    monkeypatch.setattr(calibration, "NUM_TOKENS", 32)


@pytest.fixture(scope="module")
def tuned(
    make_model: Callable[..., Any], save: Callable[..., Path], tmp_path_factory: Any
) -> dict[str, Path]:
    """A base and three that all weights of were changed: mostly in few directions (`near`), in all (`far`),
    in all and by less than bf16 tells (`hardly`)."""
    import torch

    root = tmp_path_factory.mktemp("tuned")
    made = {"base": save(make_model("llama", 3), root / "base")}
    for name, noise in (("near", 0.002), ("far", 0.03), ("hardly", 0.0001)):
        model = make_model("llama", 3)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for weight in model.parameters():
                change = noise * torch.randn(weight.shape, generator=generator)
                if weight.ndim == 2 and weight.shape[0] < 200 and name != "hardly":
                    a, b = (torch.randn(4, n, generator=generator) for n in reversed(weight.shape))
                    change += 0.01 * b.T @ a
                weight.data = (weight + change).to(torch.bfloat16)
        made[name] = save(model, root / name)
    return made


def record(zoo: Path, model: str) -> ModelRecord:
    return Zoo.open(zoo).manifest.models[model]


def test_a_full_fine_tune_becomes_differences(
    tuned: dict[str, Path], tmp_path: Path, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = str(tmp_path / "z")
    given = ["-o", zoo, "--no-profile", "--threads", "1"]
    assert main([f"base={tuned['base']}", *given]) == 0
    base = record(tmp_path / "z", "base")
    capsys.readouterr()
    asked = [f"near={tuned['near']}", "--share", "delta", "--max-kl", "0.01", *given]
    assert main(asked) == 0
    said = capsys.readouterr().out
    near = record(tmp_path / "z", "near")
    found = near.delta
    assert found is not None
    assert delta_text(near) in said
    assert near.chain[1:-1] == base.chain[1:-1]
    assert sorted(near.adapters) == [1, 2, 3, 4, 5, 6]
    assert found.own_blocks.keys() >= near.adapters.keys()
    assert (found.rank, found.max_kl, found.probe) == (8, 0.01, "built-in")
    assert 0.05 < found.share < 0.3
    assert 0 < found.loss.stored.kl <= 0.01
    assert near.verification is not None  # of its own blocks, against the checkpoint
    assert near.verification.figures["f32"].max_relative_error < 1e-4
    own = set(found.own_blocks.values())
    assert not own & Zoo.open(zoo).manifest.blocks.keys()
    assert not {path.stem for path in (tmp_path / "z" / "blocks").iterdir()} & own
    # again, and asked for otherwise
    before = tree(tmp_path / "z")
    assert main(asked) == 0
    assert "near  unchanged" in capsys.readouterr().out
    assert tree(tmp_path / "z") == before
    assert main([f"near={tuned['near']}", *given]) == 2
    assert "--replace" in capsys.readouterr().err
    assert inspect([zoo]) == 0
    assert delta_text(near) in capsys.readouterr().out.replace("\n", " ")
    assert inspect([zoo, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["near"]["delta"]["rank"] == 8


@pytest.mark.slow
def test_what_is_too_far_keeps_blocks_of_its_own(
    tuned: dict[str, Path], make_model: Any, save: Any, tmp_path: Path
) -> None:
    models = {name: tuned[name] for name in ("base", "far")}
    models["other"] = save(make_model("llama", 9), tmp_path / "other")
    options = replace(DELTA, max_kl=1e-9)
    report = compile_models(models, tmp_path / "z", options)
    assert "no block that it alone uses is near to another model's" in report.models[2].notes[-1]
    assert record(tmp_path / "z", "far").delta is None
    assert "no differences of low rank to them keep the model near enough" in report.models[1].notes[-1]
    assert len(Zoo.open(tmp_path / "z").manifest.blocks) == 24


def test_single_blocks_are_given_back(tuned: dict[str, Path], tmp_path: Path) -> None:
    models = {name: tuned[name] for name in ("base", "far")}
    compile_models(models, tmp_path / "all", replace(DELTA, max_kl=1.0))
    whole = record(tmp_path / "all", "far").delta
    assert whole is not None
    assert len(whole.own_blocks) == 8
    compile_models(models, tmp_path / "z", replace(DELTA, max_kl=0.5 * whole.loss.stored.kl))
    far, base = (record(tmp_path / "z", name) for name in ("far", "base"))
    assert far.delta is not None
    kept = far.delta.own_blocks.keys()
    assert 0 < len(kept) < 8
    assert far.delta.loss.stored.kl <= far.delta.max_kl
    assert [at for at in range(8) if far.chain[at] == base.chain[at]] == sorted(kept)
    assert far.adapters.keys() == kept - {0, 7}


def differences(tuned: dict[str, Path], name: str, zoo: Path) -> tuple[DeltaRecord, float]:
    """Of a model compiled beside its base by the default bound, and what tuning changed."""
    compile_models({each: tuned[each] for each in ("base", name)}, zoo, replace(DELTA, max_kl=None))
    found = record(zoo, name).delta
    assert found is not None
    assert found.tuned_kl is not None
    return found, found.tuned_kl


def test_what_is_left_out_is_a_small_share_of_what_tuning_changed(
    tuned: dict[str, Path], tmp_path: Path
) -> None:
    found, tuned_kl = differences(tuned, "near", tmp_path / "z")
    assert 0.01 < tuned_kl < 1
    assert 3 * found.loss.bf16.kl < found.loss.stored.kl <= 0.01 * tuned_kl
    assert found.loss.stored.top1 >= found.loss.bf16.top1 - 0.01
    assert f"where tuning changed {tuned_kl:.1e}" in delta_text(record(tmp_path / "z", "near"))


def test_what_tuning_hardly_changed_need_not_be_kept_beyond_a_tenth_of_bf16(
    tuned: dict[str, Path], tmp_path: Path
) -> None:
    found, tuned_kl = differences(tuned, "hardly", tmp_path / "z")
    assert 0.01 * tuned_kl < found.loss.stored.kl <= 0.1 * found.loss.bf16.kl


@pytest.mark.slow
def test_the_bases_embedding_may_take_what_the_bound_leaves(tuned: dict[str, Path], tmp_path: Path) -> None:
    models = {name: tuned[name] for name in ("base", "near")}
    compile_models(models, tmp_path / "all", replace(DELTA, max_kl=1.0))
    whole = record(tmp_path / "all", "near").delta
    assert whole is not None
    compile_models(models, tmp_path / "z", replace(DELTA, max_kl=1.01 * whole.loss.stored.kl))
    assert record(tmp_path / "z", "near").chain == record(tmp_path / "z", "base").chain
    compile_models(models, tmp_path / "own", replace(DELTA, max_kl=0.99 * whole.loss.stored.kl))
    near, base = (record(tmp_path / "own", name) for name in ("near", "base"))
    assert near.chain[1:-1] == base.chain[1:-1]
    assert near.chain[0] != base.chain[0]


@pytest.mark.slow
def test_a_bound_that_is_asked_for_alone_decides(tuned: dict[str, Path], tmp_path: Path) -> None:
    """Also where less is lost than bf16 loses."""
    models = {name: tuned[name] for name in ("base", "hardly")}
    compile_models(models, tmp_path / "all", replace(DELTA, max_kl=1e-3))
    whole = record(tmp_path / "all", "hardly").delta
    assert whole is not None
    assert whole.loss.excess < 1
    compile_models(models, tmp_path / "z", replace(DELTA, max_kl=0.1 * whole.loss.stored.kl))
    hardly = record(tmp_path / "z", "hardly").delta
    assert hardly is None or hardly.loss.stored.kl <= 0.1 * whole.loss.stored.kl


def test_a_base_of_another_run_is_taken_and_may_leave(tuned: dict[str, Path], tmp_path: Path) -> None:
    compile_models({"base": tuned["base"]}, tmp_path / "z", DELTA)
    compile_models({"near": tuned["near"]}, tmp_path / "z", DELTA)
    compile_models({}, tmp_path / "z", DELTA, remove=["base"])
    zoo = Zoo.open(tmp_path / "z")
    near = zoo.manifest.models["near"]
    assert near.delta is not None
    assert set(near.chain) == zoo.manifest.blocks.keys()
    compile_models({"base": tuned["base"]}, tmp_path / "z", DELTA, remove=["near"])
    zoo = Zoo.open(tmp_path / "z")
    assert zoo.manifest.adapters == {}
    assert len(list((tmp_path / "z" / "blocks").iterdir())) == 8


def test_a_lora_on_a_difference(tuned: dict[str, Path], tmp_path: Path, make_adapter: Any) -> None:
    """One that comes later lies beside the difference; one that comes along needs the blocks themselves."""
    lora = tmp_path / "lora"
    make_adapter(tuned["near"], lora, seed=1)
    models = {name: tuned[name] for name in ("base", "near")}
    compile_models(models, tmp_path / "z", DELTA)
    compile_models({"lora": f"{lora}@near"}, tmp_path / "z", replace(DELTA, verify=True))
    near, added = (record(tmp_path / "z", name) for name in ("near", "lora"))
    assert added.chain == near.chain
    manifest = Zoo.open(tmp_path / "z").manifest
    spec = manifest.adapters[added.adapters[1]].spec
    assert {each.projection: each.rank for each in spec.loras} == {"q": 12, "k": 8, "v": 12, "o": 8}
    assert added.verification is not None
    assert added.verification.figures["f32"].greedy_agreement == 1.0
    report = compile_models({**models, "lora": f"{lora}@near"}, tmp_path / "along", DELTA)
    assert record(tmp_path / "along", "near").delta is None
    assert "no block that it alone uses is near" in report.models[1].notes[-1]


def test_with_quantized_weights(tuned: dict[str, Path], tmp_path: Path) -> None:
    models = {name: tuned[name] for name in ("base", "near")}
    options = replace(DELTA, weights="int8")
    compile_models(models, tmp_path / "z", options)
    zoo = Zoo.open(tmp_path / "z")
    base, near = (zoo.manifest.models[name] for name in ("base", "near"))
    assert near.delta is not None
    assert near.chain[1:-1] == base.chain[1:-1]
    assert {zoo.manifest.blocks[key].dtype for key in near.chain[1:-1]} == {"i8"}
    assert compile_models(models, tmp_path / "z", options).models[1].status == "unchanged"
    # later, next to a base of which only the quantized blocks are left
    report = compile_models({"later": tuned["near"]}, tmp_path / "z", replace(options, weights=None))
    assert record(tmp_path / "z", "later").delta is None
    assert report.models[0].num_reused == 0
    assert (
        "(those in 8 or 4 bits are not compared: compile both models together)" in report.models[0].notes[-1]
    )


def test_a_dry_run_says_what_it_does_not_look_for(tuned: dict[str, Path], tmp_path: Path) -> None:
    models = {name: tuned[name] for name in ("base", "near")}
    report = compile_models(models, tmp_path / "z", replace(DELTA, dry_run=True))
    assert report.models[1].notes[-1] == "differences to other models' blocks are not looked for in a dry run"
