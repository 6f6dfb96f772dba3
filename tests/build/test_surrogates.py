"""zoo-compile --surrogate: how often drafts come true, what is kept, and what is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blockzoo.build import draft_trial, surrogates
from blockzoo.build.cli import main
from blockzoo.build.draft_trial import DraftTrial
from blockzoo.build.inspect import main as inspect
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.surrogates import search, speedup
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.zoo.errors import ManifestError
from blockzoo.zoo.manifest import Manifest, SurrogateRecord
from blockzoo.zoo.store import Zoo

FAST = CompileOptions(verify=False, profile=False, calibration_texts=0)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are small enough to be told by little text."""
    monkeypatch.setattr(draft_trial, "_NUM_TEXTS", 4)
    monkeypatch.setattr(draft_trial, "_NUM_TOKENS", 64)


def trial_of(zoo: Zoo, name: str) -> DraftTrial:
    record = zoo.manifest.models[name]
    adapters = {at: zoo.read_adapter(key) for at, key in record.adapters.items()}
    prompts = [[70, 71, 72], [80]]
    return DraftTrial(zoo.read_block, record, adapters, OpenVINOEngines("f32", 1), prompts)


def test_drafts_run_over_the_models_own_kv(demo_zoo: Path) -> None:
    """Two computations of one figure: block by block, and by the numbers of an engine's requests."""
    zoo = Zoo.open(demo_zoo)
    for name in ("base", "notes"):
        trial, chain = trial_of(zoo, name), zoo.manifest.models[name].chain
        whole = dict(enumerate(chain))
        assert trial.acceptance(whole) == (1.0,) * 4, "the model agrees with itself"
        fewer = {at: key for at, key in whole.items() if at not in (5, 6)}
        rates = trial.acceptance(fewer)
        assert 0 < rates[0] < 1
        assert trial.acceptance(fewer) == rates, "nothing of a trial is left for the next"
        assert trial.acceptance(whole) == (1.0,) * 4
        assert len(trial.places) == len({*trial.places})
        assert np.diff(sorted(trial.places)).min() >= 4, "a draft reads nothing that another wrote"


def test_what_a_surrogate_is_hoped_to_give() -> None:
    def free(rows: int) -> float:
        return 1.0

    assert speedup((0.8, 0.5), 0.25, free) == pytest.approx((1 + 0.8 + 0.4 + 0.2) / 1.75)
    assert speedup((1.0,), 0.0, free) == 16
    assert speedup((0.1,), 0.9, free) < 0.4, "then none drafts"


def test_the_search_leaves_out_what_is_missed_least() -> None:
    chain = ["e", "a0", "f0", "a1", "f1", "a2", "f2", "h"]
    needed = {"a0": 0.5, "f0": 0.0, "a1": 0.0, "f1": 0.2, "a2": 1, "f2": 1}

    class Trial:
        num_guesses = 10

        def acceptance(self, chain: dict[int, str], num_drafted: int = 4) -> tuple[float, ...]:
            lost = sum(
                needed[key] for key in ("a0", "f0", "a1", "f1", "a2", "f2") if key not in chain.values()
            )
            return (max(0.0, 1 - lost),) * num_drafted

    class Costs:
        def of(self, chain: dict[int, str], rows: int, drafts: bool = False) -> float:
            return float(len(chain))

    found = search(Trial(), Costs(), chain, None, leaves_out=True)  # type: ignore[arg-type]
    assert found is not None
    assert {at: chain[at] for at in found.blocks} == dict(found.blocks)
    assert {*chain} - {*found.blocks.values()} == {"f0", "a1"}
    assert search(Trial(), Costs(), chain, None, leaves_out=False) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["int4", pytest.param("layers", marks=pytest.mark.slow)])
def test_what_pays_is_kept_and_shared_and_shown(
    kind: str,
    demo_family: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(surrogates, "LEAST_SPEEDUP", 0.0)
    zoo = tmp_path / "zoo"
    names = ("base", "base-sharded", "notes")
    options = replace(FAST, surrogate=kind)  # type: ignore[arg-type]
    report = compile_models({name: demo_family[name] for name in names}, zoo, options)
    manifest = Zoo.open(zoo).manifest
    found = {name: manifest.models[name].surrogate for name in names}
    base = found["base"]
    assert base is not None
    assert base == found["base-sharded"], "models of equal weights are tried once"
    others = {*base.blocks.values()} - {*manifest.models["base"].chain}
    assert bool(others) == (kind == "int4")
    if kind == "int4":
        assert found["notes"] is not None
        assert found["notes"].blocks == base.blocks, "fine-tunes share the blocks of their base's"
        made = [manifest.blocks[key].quantized for key in others]
        assert {each.group for each in made if each is not None} == {64}, "128 do not divide 704"
        assert len(base.acceptance) == 4
        assert base.acceptance[0] > 0.5
    assert {path.stem for path in (zoo / "blocks").iterdir()} == {*manifest.blocks, *manifest.adapters}
    for model in report.models:
        assert any(note.startswith("surrogate: ") for note in model.notes)
    assert inspect([str(zoo)]) == 0
    assert "surrogate: " in capsys.readouterr().out
    again = compile_models({"base": demo_family["base"]}, zoo, FAST)
    assert again.models[0].status == "unchanged"
    assert Zoo.open(zoo).manifest.models["base"].surrogate == base, "it is left alone"


def test_what_does_not_pay_is_told_and_not_kept(
    demo_family: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(surrogates, "LEAST_SPEEDUP", 100.0)
    given = [f"base={demo_family['base']}", "-o", str(tmp_path / "zoo"), "--no-verify", "--no-profile"]
    assert main([*given, "--surrogate", "layers"]) == 0
    assert "no surrogate pays; the best would be a surrogate: " in capsys.readouterr().out
    manifest = Zoo.open(tmp_path / "zoo").manifest
    assert manifest.models["base"].surrogate is None
    assert {*manifest.blocks} == {*manifest.models["base"].chain}


def test_a_manifest_with_a_surrogate_that_cannot_run_is_refused(demo_zoo: Path) -> None:
    manifest = Manifest.load(demo_zoo / "manifest.json")
    model = manifest.models["base"]
    whole = dict(enumerate(model.chain))
    good = SurrogateRecord("layers", None, whole, (0.9,), 0.5, 1.2, 10, "built-in")

    def read(surrogate: SurrogateRecord) -> Manifest:
        models = {**manifest.models, "base": replace(model, surrogate=surrogate)}
        return Manifest.from_text(replace(manifest, models=models).to_text())

    assert read(good).models["base"].surrogate == good
    last = len(model.chain) - 1
    for blocks, said in (
        ({at: key for at, key in whole.items() if at != last}, "the head lacks"),
        ({at: key for at, key in whole.items() if at != last - 2}, "last layer"),
        ({**whole, last + 1: whole[1]}, "blocks"),
        ({**whole, 3: whole[4]}, "cannot stand there"),
        ({**whole, 3: "nobody"}, "cannot stand there"),
    ):
        with pytest.raises(ManifestError, match=said):
            read(replace(good, blocks=blocks))
    for figures in ({"acceptance": ()}, {"acceptance": (1.5,)}, {"cost": 0.0}, {"speedup": -1.0}):
        with pytest.raises(ManifestError, match="out of range"):
            read(replace(good, **figures))
