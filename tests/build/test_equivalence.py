"""Equivalent blocks on request: which are taken, what is recorded, and what is left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blockzoo.build.cli import main
from blockzoo.build.equivalence import compose, probe_sequences
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.tensors import TensorFile, from_f32, write_tensor_file

Tree = Callable[[Path], dict[str, str]]


@pytest.mark.parametrize("bad", [set(), {3}, {0}, {1, 2, 7}, set(range(8))])
def test_compose_takes_all_that_passes_together(bad: set[int]) -> None:
    judged = []

    def passes(chosen: object) -> bool:
        judged.append(tuple(chosen))  # type: ignore[call-overload]
        return not bad & set(judged[-1])

    assert compose(list(range(8)), passes) == [i for i in range(8) if i not in bad]
    assert len(judged) <= 2 * 8
    assert compose([], passes) == []


def test_compose_sees_errors_that_add_up() -> None:
    assert compose([5, 6, 7, 8], lambda chosen: len(chosen) <= 3) == [5, 6, 7]


def test_probe_sequences_are_bounded() -> None:
    found = probe_sequences([[1] * 300, [2] * 10, []] * 20, 128)
    assert max(map(len, found)) == 128
    assert sum(map(len, found)) == 2048


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


def test_lightly_tuned_blocks_are_replaced_and_scored(
    tuned: dict[str, Path], tmp_path: Path, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = str(tmp_path / "z")
    (tmp_path / "text").write_text("def add(a, b):\n    return a + b\n\nimport os\nfor name in names:\n")
    given = ["-o", zoo, "--no-profile"]
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
        assert min(found.cosine, found.top1) >= found.threshold == 0.9
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
    compile_models(given, tmp_path / "z", CompileOptions(verify=False, profile=False))
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
    for probe in ("missing", "empty"):
        assert main([*given, "--share", "equivalent", "--probe", str(tmp_path / probe)]) == 2
        assert f"--probe {tmp_path / probe}: " in capsys.readouterr().err
    assert not (tmp_path / "z").exists()
