"""Equivalent blocks on request: which are taken, what is recorded, and what is left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blockzoo.build.cli import main
from blockzoo.build.equivalence import probe_sequences, substitute
from blockzoo.build.inspect import main as inspect
from blockzoo.build.originals import oracle_for
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.sources import open_sources
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.summary import loss_text
from blockzoo.zoo.tensors import BlockTensor, TensorFile, from_f32, write_tensor_file

Tree = Callable[[Path], dict[str, str]]
TEXT = "".join(
    f"def add_{name}(a, b):\n    return a + b + {name}\n\n" for name in ("one", "two", "three", "four")
)


def test_probe_sequences_are_bounded() -> None:
    found = probe_sequences([[1] * 300, [2] * 10, []] * 20, 128, 32_000)
    assert max(map(len, found)) == 128
    assert sum(map(len, found)) == 2048
    assert sum(map(len, probe_sequences([[1] * 300] * 20, 4096, 1 << 18))) == 256


@pytest.fixture(scope="module")
def tuned(demo_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, a lightly tuned copy, and one of which the upper layers are tuned further."""
    root = tmp_path_factory.mktemp("tuned")
    made = {"base": demo_family["base"]}
    for name, sizes in (("light", [0.02] * 6), ("far", [0.02] * 3 + [0.9] * 3)):
        folder = Path(shutil.copytree(demo_family["base"], root / name))
        file = TensorFile(demo_family["base"] / "model.safetensors")
        rng = np.random.default_rng(len(name))
        tensors = {key: file.tensor(key) for key in file.names}
        for key, tensor in tensors.items():
            if "layers." in key and key.endswith("proj.weight"):
                values = tensor.to_f32()
                noise = rng.standard_normal(values.shape, dtype=np.float32) * values.std()
                tensors[key] = from_f32(values + np.float32(sizes[int(key.split(".")[2])]) * noise, "bf16")
        write_tensor_file(folder / "new", tensors, {})
        (folder / "new").rename(folder / "model.safetensors")
        made[name] = folder
    return made


@pytest.mark.slow
def test_lightly_tuned_blocks_are_replaced_and_scored(
    tuned: dict[str, Path], tmp_path: Path, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = str(tmp_path / "z")
    (tmp_path / "text").write_text(TEXT)
    given = ["-o", zoo, "--no-profile", "--threads", "1"]
    assert main([f"base={tuned['base']}", *given]) == 0
    asked = [f"{name}={tuned[name]}" for name in ("light", "far")]
    asked += ["--share", "equivalent", "--threshold", "0.9", "--probe", str(tmp_path / "text")]
    assert main([*asked, *given]) == 0
    assert "blocks replaced by equivalent ones: cosine 0.9" in capsys.readouterr().out
    models = Zoo.open(zoo).manifest.models
    light, far = models["light"], models["far"]
    assert light.chain == models["base"].chain
    for model in (light, far):
        found = model.equivalence
        assert found is not None
        assert found.cosine >= found.threshold == 0.9
        assert 0 < found.kl < 1
        assert found.probe == "text"
        assert model.verification is not None  # of its own blocks, against the checkpoint
        assert model.verification.figures["f32"].max_relative_error < 1e-4
    assert far.equivalence is not None
    assert len(far.equivalence.own_blocks) < 12
    assert {1, 2}.issubset(far.equivalence.own_blocks)
    before = tree(tmp_path / "z")
    assert main([*asked, *given]) == 0
    assert "light  unchanged" in capsys.readouterr().out
    assert tree(tmp_path / "z") == before
    assert main([*asked[:1], *given]) == 2  # now asked for exactly: another content
    assert "--replace" in capsys.readouterr().err


def test_nothing_is_replaced_unless_asked_for(tuned: dict[str, Path], tmp_path: Path) -> None:
    given: dict[str, str | Path] = {name: tuned[name] for name in ("base", "light")}
    compile_models(given, tmp_path / "z", CompileOptions(verify=False, profile=False, threads=1))
    light = Zoo.open(tmp_path / "z").manifest.models["light"]
    assert light.equivalence is None
    assert len(Zoo.open(tmp_path / "z").manifest.blocks) == 14 + 12


def test_what_is_not_alike_is_left_alone(
    tuned: dict[str, Path], demo_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"base={tuned['base']}", f"solver={demo_family['solver']}", "-o", str(tmp_path / "z")]
    asked = ["--share", "equivalent", "--threshold", "1", "--no-verify", "--no-profile", "--json"]
    assert main([*given, *asked]) == 0
    report = json.loads(capsys.readouterr().out)["models"][1]
    assert "no block is equivalent to another model's at 1" in report["notes"][-1]


def test_what_loses_no_more_than_bf16_is_taken_at_any_threshold(
    tuned: dict[str, Path], tmp_path: Path
) -> None:
    """One weight in fifty moved to the next bf16 number."""
    folder = Path(shutil.copytree(tuned["base"], tmp_path / "moved"))
    file = TensorFile(tuned["base"] / "model.safetensors")
    tensors = {key: file.tensor(key) for key in file.names}
    rng = np.random.default_rng(0)
    for key in [key for key in tensors if key.endswith("proj.weight")]:
        bits = tensors[key].data
        tensors[key] = BlockTensor("bf16", bits + (rng.random(bits.shape) < 0.02).astype(np.uint16))
    write_tensor_file(folder / "new", tensors, {})
    (folder / "new").rename(folder / "model.safetensors")
    given: dict[str, str | Path] = {"base": tuned["base"], "moved": folder}
    options = CompileOptions(verify=False, profile=False, threads=1, share="equivalent", threshold=1.0)
    compile_models(given, tmp_path / "z", options)
    models = Zoo.open(tmp_path / "z").manifest.models
    found = models["moved"].equivalence
    assert found is not None
    assert found.loss is not None
    assert models["moved"].chain == models["base"].chain
    assert 0 < found.loss.stored.kl <= found.loss.bf16.kl
    assert found.loss.clear_top1 >= 0.99


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "1.5"], "'1.5' is not a number above 0 and up to 1"),
        (["--threshold", "nan"], "'nan' is not a number"),
    ],
)
def test_unfit_thresholds_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["x", "-o", "z", *arguments])
    assert said in capsys.readouterr().err


def test_an_unfit_probe_is_refused(
    tuned: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"base={tuned['base']}", f"light={tuned['light']}", "-o", str(tmp_path / "z"), "--no-verify"]
    (tmp_path / "empty").write_text("\n\n\n")
    (tmp_path / "binary").write_bytes(b"caf\xe9 " * 200)
    (tmp_path / "short").write_text("def f(x):\n")
    for probe, said in (
        ("missing", "not readable as UTF-8 text"),
        ("binary", "not readable as UTF-8 text"),
        (".", "not readable as UTF-8 text"),
        ("empty", "the file holds no text"),
        ("short", "tokens of base; expected at least 64"),
    ):
        assert main([*given, "--share", "equivalent", "--probe", str(tmp_path / probe)]) == 2
        err = capsys.readouterr().err
        assert f"--probe {tmp_path / probe}: " in err
        assert said in err
    assert not (tmp_path / "z").exists()


def test_the_scores_are_shown(
    tuned: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = tmp_path / "z"
    given: dict[str, str | Path] = {name: tuned[name] for name in ("base", "light")}
    options = CompileOptions(verify=False, profile=False, threads=1, share="equivalent", threshold=0.9)
    report = compile_models(given, zoo, options)
    assert report.models[0].notes == ()  # the base stays what it is: there was none before it
    models = Zoo.open(zoo).manifest.models
    found = models["light"].equivalence
    assert found is not None
    assert models["base"].equivalence is None
    assert found.loss is not None
    assert (found.kl, found.top1) == (found.loss.stored.kl, found.loss.stored.top1)
    assert found.loss.bf16.kl < found.kl
    said = f"cosine {found.cosine:.4f} (asked for 0.9), {loss_text(found.loss)} of built-in text"
    page = tmp_path / "page.html"
    assert inspect([str(zoo), "--html", str(page)]) == 0
    assert said in capsys.readouterr().out
    assert (
        f'"replaced": "{len(found.own_blocks)} blocks replaced by equivalent ones: {said}' in page.read_text()
    )
    assert inspect([str(zoo), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["models"]["light"]["equivalence"]
    assert (shown["cosine"], shown["kl"], shown["top1"]) == (found.cosine, found.kl, found.top1)
    assert shown["num_tokens"] == 339


@pytest.fixture(scope="module")
def with_ends(tuned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, and a copy of which embedding (and with it the head) and last norm are tuned lightly."""
    folder = tmp_path_factory.mktemp("ends") / "ends"
    shutil.copytree(tuned["base"], folder)
    file = TensorFile(tuned["base"] / "model.safetensors")
    tensors = {key: file.tensor(key) for key in file.names}
    rng = np.random.default_rng(0)
    for key in ("model.embed_tokens.weight", "model.norm.weight"):
        values = tensors[key].to_f32()
        noise = rng.standard_normal(values.shape, dtype=np.float32) * values.std()
        tensors[key] = from_f32(values + np.float32(0.02) * noise, "bf16")
    write_tensor_file(folder / "new", tensors, {})
    (folder / "new").rename(folder / "model.safetensors")
    return {"base": tuned["base"], "ends": folder}


def test_a_tied_embedding_goes_with_its_head(with_ends: dict[str, Path], tmp_path: Path) -> None:
    models: dict[str, str | Path] = {**with_ends}
    options = CompileOptions(verify=False, profile=False, threads=1, share="equivalent", threshold=0.9)
    compile_models(models, tmp_path, options)
    manifest = Zoo.open(tmp_path).manifest
    found = manifest.models["ends"].equivalence
    assert found is not None
    assert sorted(found.own_blocks) == [0, 13]
    assert manifest.models["ends"].chain == manifest.models["base"].chain
    assert len(manifest.blocks) == 14


def test_blocks_of_models_that_come_later_are_not_taken(tuned: dict[str, Path], tmp_path: Path) -> None:
    given: dict[str, str | Path] = {name: tuned[name] for name in ("base", "light")}
    compile_models(given, tmp_path, CompileOptions(verify=False, profile=False, threads=1))
    zoo = Zoo.open(tmp_path)
    ids = [[5, 6, 7, 8] * 30]
    source = open_sources({"base": tuned["base"]}, zoo)[0]
    search = substitute(
        *("base", zoo, ids, OpenVINOEngines("f32", 1), oracle_for(source, True, None), 0.5, "x"),
        progress=lambda *_: None,
        besides=["light"],
    )
    assert search.record == zoo.manifest.models["base"]
    assert search.num_candidates == 0
