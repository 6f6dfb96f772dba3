"""Merged checkpoints through zoo-compile: taken apart, verified, remembered; or stored whole, and said so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockzoo.build.cli import main
from blockzoo.build.inspect import main as inspect
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.yardstick import Yardstick
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.summary import loss_text

Tree = Callable[[Path], dict[str, str]]
FAST = CompileOptions(verify=False, profile=False)


@pytest.fixture
def models(demo_family: dict[str, Path]) -> dict[str, str | Path]:
    return {name: demo_family[name] for name in ("base", "notes-merged")}


def test_a_merged_lora_is_taken_apart_and_verified(
    models: dict[str, str | Path], tmp_path: Path, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"{name}={path}" for name, path in models.items()]
    assert main([*given, "-o", str(tmp_path / "z"), "--no-profile"]) == 0
    out = capsys.readouterr().out
    assert (
        "notes-merged  added: reused 14 of 14 blocks, 12 of them by taking out a merged LoRA of rank 8" in out
    )
    manifest = Zoo.open(tmp_path / "z").manifest
    record, base = manifest.models["notes-merged"], manifest.models["base"]
    assert record.chain == base.chain
    assert record.recovery is not None
    assert record.recovery.rank == 8
    assert 0.8 < record.recovery.rounding < 1.1
    assert sorted(record.adapters) == sorted(record.recovery.own_blocks) == list(range(1, 13))
    assert record.verification is not None
    figures = record.verification.figures["f32"]
    assert figures.greedy_agreement >= 0.99
    assert 1e-4 < figures.max_relative_error < 0.02
    loss = record.verification.loss
    assert loss is not None
    assert f"taken apart it loses {loss_text(loss)}" in out
    assert 0 < loss.stored.kl < loss.bf16.kl
    assert figures.max_relative_error <= loss.stored.max_relative_error < loss.bf16.max_relative_error
    assert record.verification.tolerance == loss.bf16.max_relative_error
    assert record.recovery.given_back == ()
    # again, and under another name: what was found is found again without looking
    before = tree(tmp_path / "z")
    assert main([*given, "-o", str(tmp_path / "z"), "--no-profile"]) == 0
    assert "notes-merged  unchanged" in capsys.readouterr().out
    assert tree(tmp_path / "z") == before
    compile_models({"alias": models["notes-merged"]}, tmp_path / "z", FAST)
    alias = Zoo.open(tmp_path / "z").manifest.models["alias"]
    assert (alias.adapters, alias.recovery) == (record.adapters, record.recovery)


def test_the_order_does_not_matter(models: dict[str, str | Path], tmp_path: Path) -> None:
    compile_models(dict(reversed(models.items())), tmp_path / "z", FAST)
    manifest = Zoo.open(tmp_path / "z").manifest
    assert manifest.models["base"].chain == manifest.models["notes-merged"].chain
    assert manifest.models["base"].recovery is not None


def test_a_dry_run_tells_the_same(
    models: dict[str, str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"{name}={path}" for name, path in models.items()]
    assert main([*given, "-o", str(tmp_path / "z"), "--dry-run"]) == 0
    assert "12 of them by taking out a merged LoRA of rank 8" in capsys.readouterr().out
    assert not (tmp_path / "z").exists()


def test_exact_sharing_takes_nothing_apart(models: dict[str, str | Path], tmp_path: Path) -> None:
    compile_models(models, tmp_path / "z", CompileOptions(verify=False, profile=False, share="exact"))
    manifest = Zoo.open(tmp_path / "z").manifest
    assert manifest.adapters == {}
    assert len(manifest.blocks) == 26


def expect_less_loss(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Bear only `factor` times what bf16 loses."""
    measured = Yardstick.of

    def stricter(*arguments: Any) -> Yardstick:
        found = measured(*arguments)
        kl, error = found.bf16.kl * factor, found.bf16.max_relative_error * factor**0.5
        return replace(found, bf16=replace(found.bf16, kl=kl, max_relative_error=error))

    monkeypatch.setattr(Yardstick, "of", stricter)


@pytest.mark.slow
def test_what_loses_too_much_is_stored_whole(
    models: dict[str, str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_less_loss(monkeypatch, 1e-6)
    options = CompileOptions(profile=False)
    report = compile_models(models, tmp_path / "z", options).models[1]
    assert report.num_recovered == 0
    assert report.notes[0].startswith("stored with its own blocks: notes-merged: taken apart")
    manifest = Zoo.open(tmp_path / "z").manifest
    record = manifest.models["notes-merged"]
    assert (record.adapters, record.recovery, manifest.adapters) == ({}, None, {})
    assert record.verification is not None
    assert record.verification.figures["f32"].greedy_agreement == 1.0
    assert record.verification.loss is None
    assert compile_models(models, tmp_path / "z", options).models[1].status == "unchanged"


@pytest.mark.slow
def test_single_blocks_are_given_back(
    models: dict[str, str | Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = CompileOptions(profile=False)
    compile_models(models, tmp_path / "all", options)
    checked = Zoo.open(tmp_path / "all").manifest.models["notes-merged"].verification
    assert checked is not None
    assert checked.loss is not None
    assert 0 < checked.loss.excess < 1
    expect_less_loss(monkeypatch, 0.6 * checked.loss.excess)
    report = compile_models(models, tmp_path / "z", options).models[1]
    manifest = Zoo.open(tmp_path / "z").manifest
    record, base = manifest.models["notes-merged"], manifest.models["base"]
    assert record.recovery is not None
    back, kept = record.recovery.given_back, sorted(record.recovery.own_blocks)
    assert sorted([*back, *kept]) == list(range(1, 13))
    assert 1 <= len(back) <= 8
    assert sorted(record.adapters) == kept
    assert [i for i in range(14) if record.chain[i] != base.chain[i]] == list(back)
    assert (report.num_recovered, report.num_reused) == (len(kept), 2 + len(kept))
    assert report.notes[0].startswith(f"stored with {len(back)} of 12 blocks of its own: notes-merged: taken")
    assert record.verification is not None
    assert record.verification.loss is not None
    assert record.verification.loss.excess <= 1
    assert record.verification.loss.stored.kl < checked.loss.stored.kl
    assert compile_models(models, tmp_path / "z", options).models[1].status == "unchanged"
    assert inspect([str(tmp_path / "z")]) == 0
    assert f"{len(back)} blocks given back: they lost too much" in capsys.readouterr().out


def test_tuned_layers_are_no_lora(
    demo_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"{name}={demo_family[name]}" for name in ("base", "solver")]
    assert main([*given, "-o", str(tmp_path / "z"), "--no-verify", "--no-profile", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["models"][1]
    assert (report["num_recovered"], report["num_reused"]) == (0, 10)
    assert "4 blocks are near to others, but no merged LoRA" in report["notes"][0]


def test_removing_the_base_keeps_what_stands_on_it(models: dict[str, str | Path], tmp_path: Path) -> None:
    compile_models(models, tmp_path / "z", FAST)
    compile_models({}, tmp_path / "z", FAST, remove=["base"])
    zoo = Zoo.open(tmp_path / "z")
    assert list(zoo.manifest.models) == ["notes-merged"]
    assert len(list((tmp_path / "z" / "blocks").iterdir())) == 14 + 12
    compile_models({"base": models["base"]}, tmp_path / "z", FAST, remove=["notes-merged"])
    assert Zoo.open(tmp_path / "z").manifest.adapters == {}
