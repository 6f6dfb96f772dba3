"""Bits by block: which steps are taken, what is measured, and that the bound holds for the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from blockzoo.build import calibration
from blockzoo.build.bits import Trial, affordable
from blockzoo.build.cli import main
from blockzoo.build.likeness import Text, divergence, log_probabilities, strayed
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

    taken = affordable([costs], saved, [passes])
    expected = [n for n in range(5) if sum(costs[s] for s in order[:n]) <= bound]
    assert taken == order[: expected[-1]]
    assert len(asked) <= 3


def test_several_models_take_what_each_of_them_bears() -> None:
    """Of their own steps alone; what one strikes out leaves room for what the next one has of its own."""
    saved = dict.fromkeys("abcde", 1)
    shares = [
        {"a": 0.1, "b": 0.2, "c": 0.3},
        {"a": 0.2, "b": 0.8, "c": 0.9, "d": 0.1},
        {"e": 5.0},
    ]
    judged: list[int] = []

    def bears(index: int, steps: Sequence[str]) -> bool:
        judged.append(index)
        return sum(shares[index][step] for step in steps) <= 1

    taken = affordable(shares, saved, [partial(bears, index) for index in range(3)])
    assert taken == ["d", "a"]  # d, a, b would be 1.1 of what the second may lose; nobody bears e
    assert judged[0] == 2  # whom steps cost most
    assert judged[-1] == 0
    assert judged.count(0) == 1
    loose = affordable(shares[:1], dict.fromkeys("abc", 1), [partial(bears, 0)])
    assert loose == ["a", "b", "c"]


def test_what_costs_any_model_much_comes_last() -> None:
    shares = [{"a": 0.1, "b": 0.3}, {"a": 0.6}, {"b": 0.2}]
    asked: list[Sequence[str]] = []

    def bears(steps: Sequence[str]) -> bool:
        asked.append(steps)
        return True

    assert affordable(shares, {"a": 1, "b": 1}, [bears] * 3) == ["b", "a"]
    assert affordable(shares, {"a": 3, "b": 1}, [bears] * 3) == ["a", "b"]  # it saves more


def test_a_trial_measures_the_whole_chain(demo_zoo: Path) -> None:
    zoo, engines = Zoo.open(demo_zoo), OpenVINOEngines("f32")
    base, other = zoo.manifest.models["base"], zoo.manifest.models["solver"]
    rng = np.random.default_rng(0)
    texts = [Text(rng.integers(0, 2048, n).tolist(), start) for n, start in ((30, 0), (12, 5))]
    trial = Trial(zoo.read_block, base, {}, engines, texts)

    def logits(chain: Sequence[str]) -> list[np.ndarray]:
        runner = ProbeChain(engines, [zoo.read_block(key) for key in chain], base.config, 32)
        return [log_probabilities(runner.forward(text.tokens, 0)[text.start :].copy()) for text in texts]

    own = logits(base.chain)
    at = [i for i, (a, b) in enumerate(zip(base.chain, other.chain, strict=True)) if a != b]
    for places in (at, at[:1], at[-1:]):
        replaced = {i: other.chain[i] for i in places}
        chain = [replaced.get(i, key) for i, key in enumerate(base.chain)]
        for count in (1, None):
            expected = strayed(own[:count], logits(chain)[:count])
            assert trial.strays(replaced, count) == pytest.approx(expected, rel=1e-3)
        assert expected.kl > 1e-4
    assert trial.strays({}) == (0, 1)


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NUM_TOKENS", 32)


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize(
    ("max_kl", "four", "given"),
    [
        pytest.param(1e-5, range(1), range(2, 14), marks=pytest.mark.slow),
        (2e-3, range(1, 12), range(1, 2)),
        pytest.param(5.0, range(12, 13), range(1, 2), marks=pytest.mark.slow),
    ],
)
def test_auto_stays_within_its_bound(
    max_kl: float, four: range, given: range, demo_family: dict[str, Path], demo_zoo: Path, tmp_path: Path
) -> None:
    """Judged here by the chains as a whole; `four`, `given`: how many blocks are in 4 bits, and as given."""
    text = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()[:2000]
    (tmp_path / "probe").write_text(text)
    options = CompileOptions(
        weights="auto",
        max_kl=max_kl,
        probe=str(tmp_path / "probe"),
        verify=False,
        profile=False,
    )
    report = compile_models({"base": demo_family["base"]}, tmp_path / "z", options)
    zoo, engines = Zoo.open(tmp_path / "z"), OpenVINOEngines("f32")
    record = zoo.manifest.models["base"]
    dtypes = [zoo.manifest.blocks[key].dtype for key in record.chain]
    assert dtypes.count("i4") in four
    assert dtypes.count("bf16") in given  # the tied head holds its norm alone
    (told,) = report.models
    assert record.quantization is not None
    assert record.quantization.min_top1 == 0  # divergence alone was bounded
    said = f": {dtypes.count('bf16')} blocks bf16"
    assert any(note.startswith("weights auto") and said in note for note in told.notes)
    assert (told.num_reused, told.new_bytes) == (0, report.stored_bytes)
    assert {path.stem for path in (tmp_path / "z" / "blocks").iterdir()} == set(zoo.manifest.blocks)
    tokenizer = Tokenizer.from_file(str(zoo.tokenizer_dir("base") / "tokenizer.json"))
    texts = [tokenizer.encode(part).ids[:256] for part in text.split("\n\n")]
    texts = [ids for ids in texts if len(ids) > 1]
    logs = []
    for opened, chain in ((Zoo.open(demo_zoo), None), (zoo, record.chain)):
        keys = chain or opened.manifest.models["base"].chain
        runner = ProbeChain(engines, [opened.read_block(key) for key in keys], record.config, 256)
        logs.append([log_probabilities(runner.forward(ids, 0)) for ids in texts])
    assert divergence(*logs) <= max_kl


@pytest.mark.usefixtures("short_texts")
@pytest.mark.slow
def test_a_base_its_loras_and_its_copies_stay_together(demo_family: dict[str, Path], tmp_path: Path) -> None:
    models: dict[str, str | Path] = {name: demo_family[name] for name in ("base", "notes", "base-sharded")}
    options = CompileOptions(weights="auto", max_kl=6e-3, profile=False, verify=False)
    compile_models(models, tmp_path / "z", options)
    manifest = Zoo.open(tmp_path / "z").manifest
    chains = {manifest.models[name].chain for name in models}
    assert len(chains) == 1
    assert {manifest.blocks[key].dtype for key in chains.pop()} >= {"i8", "i4"}


@pytest.mark.usefixtures("short_texts")
def test_blocks_that_4_bits_make_no_smaller(
    make_model: Callable[..., Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    """No width divides into groups, so all matrices stay in 8 bits, and there is nothing to choose."""
    given = save(make_model("llama", 3, hidden_size=48, intermediate_size=80, head_dim=16), tmp_path / "odd")
    options = CompileOptions(weights="auto", max_kl=0.1, profile=False)
    compile_models({"odd": given}, tmp_path / "z", options)
    manifest = Zoo.open(tmp_path / "z").manifest
    assert {manifest.blocks[key].dtype for key in manifest.models["odd"].chain[:-1]} == {"i8"}


@pytest.mark.usefixtures("short_texts")
def test_without_bounds_most_likeliest_tokens_stay(
    make_model: Callable[..., Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    given = save(make_model("llama", 3), tmp_path / "flat")  # it hardly prefers any token
    found = {}
    for min_top1 in (None, 0.5):
        options = CompileOptions(weights="auto", min_top1=min_top1, profile=False)
        compile_models({"flat": given}, tmp_path / str(min_top1), options)
        found[min_top1] = Zoo.open(tmp_path / str(min_top1)).manifest.models["flat"].quantization
    stays, strays = found[None], found[0.5]
    assert stays is not None
    assert strays is not None
    assert (stays.min_top1, strays.min_top1, stays.max_kl, strays.max_kl) == (0.95, 0.5, 0.02, 0.02)
    assert strays.figures["f32"].top1 < 0.95 <= stays.figures["f32"].top1


def test_a_bound_without_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["x", "-o", str(tmp_path), "--max-kl", "1"])
    assert "--max-kl is a bound of --weights and of --share delta" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["x", "-o", str(tmp_path), "--probe", "text"])
    assert "--probe is text for --weights, --surrogate and --share" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["x", "-o", str(tmp_path), "--weights", "int8", "--min-top1", "0.9"])
    assert "--min-top1 is a bound of --weights auto" in capsys.readouterr().err
    for bad in ("0", "nan", "x"):
        with pytest.raises(SystemExit):
            main(["x", "-o", str(tmp_path), "--weights", "int8", "--max-kl", bad])
        assert "is not a number above 0" in capsys.readouterr().err
