"""Bits by block: which steps are taken, what is measured, and that the bound holds for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from blockzoo.build import calibration
from blockzoo.build.bits import Trial, affordable
from blockzoo.build.cli import main
from blockzoo.build.likeness import divergence, log_probabilities
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain
from blockzoo.zoo.store import Zoo


@pytest.mark.parametrize("bound", [0.0, 0.5, 3.0, 7.0, 100.0])
def test_the_cheapest_steps_are_taken_as_far_as_the_bound_goes(bound: float) -> None:
    costs = {"a": 4.0, "b": 1.0, "c": 2.0, "d": 1.0}
    saved = {"a": 10, "b": 1, "c": 4, "d": 8}
    order = ["d", "a", "c", "b"]  # by cost for what is saved
    asked: list[Sequence[str]] = []

    def passes(steps: Sequence[str]) -> bool:
        asked.append(steps)
        return sum(costs[step] for step in steps) <= bound

    taken = affordable(costs, saved, passes)
    expected = [n for n in range(5) if sum(costs[s] for s in order[:n]) <= bound]
    assert taken == order[: expected[-1]]
    assert len(asked) <= 3


def test_a_trial_measures_the_whole_chain(demo_zoo: Path) -> None:
    zoo, engines = Zoo.open(demo_zoo), OpenVINOEngines("f32")
    base, other = zoo.manifest.models["base"], zoo.manifest.models["solver"]
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 2048, n).tolist() for n in (30, 12)]
    trial = Trial(zoo.read_block, base, {}, engines, texts)

    def logits(chain: Sequence[str]) -> list[np.ndarray]:
        runner = ProbeChain(engines, [zoo.read_block(key) for key in chain], base.config, 32)
        return [log_probabilities(runner.forward(text, 0)) for text in texts]

    own = logits(base.chain)
    at = [i for i, (a, b) in enumerate(zip(base.chain, other.chain, strict=True)) if a != b]
    for places in (at, at[:1], at[-1:]):
        replaced = {i: other.chain[i] for i in places}
        chain = [replaced.get(i, key) for i, key in enumerate(base.chain)]
        expected = divergence(own, logits(chain))
        assert trial.kl(replaced) == pytest.approx(expected, rel=1e-3)
        assert trial.kl(replaced, 1) == pytest.approx(divergence(own[:1], logits(chain)[:1]), rel=1e-3)
        assert expected > 1e-4
    assert trial.kl({}) == 0


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NUM_TOKENS", 64)


@pytest.mark.usefixtures("short_texts")
def test_auto_stays_within_its_bound(demo_family: dict[str, Path], tmp_path: Path) -> None:
    counts = []
    for max_kl in (1e-5, 4e-3, 5.0):
        zoo = tmp_path / f"{max_kl}"
        options = CompileOptions(weights="auto", max_kl=max_kl, profile=False)
        report = compile_models({"base": demo_family["base"]}, zoo, options)
        manifest = Zoo.open(zoo).manifest
        found = manifest.models["base"].quantization
        assert found is not None
        assert found.figures["f32"].kl <= max_kl
        dtypes = [manifest.blocks[key].dtype for key in manifest.models["base"].chain]
        counts.append([dtypes.count(dtype) for dtype in ("bf16", "i8", "i4")])
        assert any(
            f"weights auto: {counts[-1][0]} blocks bf16" in note for note in report.models[0].notes
        ) or (not counts[-1][0])
        assert {path.stem for path in (zoo / "blocks").iterdir()} == set(manifest.blocks)
    tight, middle, wide = counts
    assert tight[2] == 0  # 8 bits throughout are too far, so some blocks stay as they were given
    assert tight[0] > 1
    assert middle[1] > 1  # of the inner blocks some
    assert 0 < middle[2] < 12
    assert wide[2] == 12


@pytest.mark.usefixtures("short_texts")
def test_a_base_its_loras_and_its_copies_stay_together(demo_family: dict[str, Path], tmp_path: Path) -> None:
    models: dict[str, str | Path] = {name: demo_family[name] for name in ("base", "notes", "base-sharded")}
    options = CompileOptions(weights="auto", max_kl=6e-3, profile=False, verify=False)
    compile_models(models, tmp_path / "z", options)
    manifest = Zoo.open(tmp_path / "z").manifest
    chains = {manifest.models[name].chain for name in models}
    assert len(chains) == 1
    assert {manifest.blocks[key].dtype for key in chains.pop()} >= {"i8", "i4"}


def test_a_bound_without_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["x", "-o", str(tmp_path), "--max-kl", "1"])
    assert "--max-kl is a bound of --weights" in capsys.readouterr().err
    for bad in ("0", "nan", "x"):
        with pytest.raises(SystemExit):
            main(["x", "-o", str(tmp_path), "--weights", "int8", "--max-kl", bad])
        assert "is not a number above 0" in capsys.readouterr().err
