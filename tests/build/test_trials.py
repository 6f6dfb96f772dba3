"""Trials of a model with other blocks: what is kept, in how many runs, and what is run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.trials import Candidate, Probe, compose
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain
from blockzoo.zoo.blocks import Adapter, Block
from blockzoo.zoo.store import Zoo

CANDIDATES = [Candidate({i: f"block {i}"}) for i in range(60)]


def positions(chosen: Sequence[Candidate]) -> list[int]:
    return [i for candidate in chosen for i in candidate.blocks]


@pytest.mark.parametrize("bad", [set(), {3}, {0}, {1, 2, 7}])
def test_compose_takes_all_but_the_bad(bad: set[int]) -> None:
    judged: list[list[int]] = []

    def judge(chosen: Sequence[Candidate]) -> float:
        judged.append(positions(chosen))
        return 50.0 if bad & set(judged[-1]) else 0.01 * len(chosen)

    taken = compose(CANDIDATES[:8], lambda c: 1.0, judge)
    assert positions(taken) == [i for i in range(8) if i not in bad]
    assert len(judged) <= 12
    assert compose([], lambda c: 1.0, judge) == []


def test_compose_finds_how_many_fit_in_a_few_trials() -> None:
    """Losses that add up and saturate, as those of real models do."""
    judged: list[int] = []

    def judge(chosen: Sequence[Candidate]) -> float:
        judged.append(len(chosen))
        return float(50 * np.tanh(sum(1 + i for i in positions(chosen)) / 50 / 210))

    taken = compose(CANDIDATES, lambda c: 1.0 + positions([c])[0], judge)
    assert positions(taken) == list(range(20))
    assert len(judged) <= 8


def test_compose_gives_up_where_nothing_fits() -> None:
    judged: list[int] = []

    def judge(chosen: Sequence[Candidate]) -> float:
        judged.append(len(chosen))
        return 1000.0 * len(chosen)

    assert compose(CANDIDATES, lambda c: 1.0, judge) == []
    assert judged == [60, 1, 1, 1]


@pytest.mark.parametrize("found", [float("nan"), float("inf")])
def test_compose_takes_nothing_that_has_no_loss(found: float) -> None:
    assert compose(CANDIDATES, lambda c: 1.0, lambda chosen: found) == []


def test_compose_ends_at_its_bound() -> None:
    judged: list[int] = []

    def judge(chosen: Sequence[Candidate]) -> float:
        judged.append(len(chosen))
        return 50.0 if 59 in positions(chosen) else 0.0

    taken = compose(CANDIDATES, lambda c: 1.0, judge, lambda chosen: len(judged) < 3)
    assert len(judged) == 3
    assert len(taken) == max(judged[1:])


@pytest.fixture(scope="module")
def zoo(
    make_model: Callable[..., Any], save: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Zoo:
    """A random model, and one of which every matrix strays by 2 %."""
    import torch

    root = tmp_path_factory.mktemp("trials")
    model = make_model("llama", 0)
    folders: dict[str, str | Path] = {"base": save(model, root / "base")}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    folders["light"] = save(model, root / "light")
    compile_models(folders, root / "zoo", CompileOptions(verify=False, profile=False, threads=1))
    return Zoo.open(root / "zoo")


class Runs:
    """A probe of `light`, and which blocks it has read."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo, self.maker = zoo, OpenVINOEngines("f32", 1)
        models = zoo.manifest.models
        self.record, self.other = models["light"], models["base"].chain
        rng = np.random.default_rng(0)
        self.sequences = [rng.integers(2, 256, count).tolist() for count in (50, 20)]
        self.candidates = [Candidate({i: self.other[i]}) for i in range(1, 7)]
        self.read: list[tuple[int, str]] = []
        self.told = 0
        self.probe = Probe(
            *(self.record.chain, self.record.config, self._read, self.maker, self.sequences),
            candidates=self.candidates,
            on_block=self._on_block,
        )

    def _read(self, position: int, block_id: str) -> tuple[Block, Adapter | None]:
        self.read.append((position, block_id))
        return self.zoo.read_block(block_id), None

    def _on_block(self) -> None:
        self.told += 1

    def whole(self, chain: Sequence[str]) -> list[np.ndarray]:
        """Logits of a chain compiled as one."""
        blocks = [self.zoo.read_block(i) for i in chain]
        run = ProbeChain(self.maker, blocks, self.record.config, 64)
        return [run.forward(tokens, 0) for tokens in self.sequences]


def test_own_logits_are_those_of_the_chain_as_one(zoo: Zoo) -> None:
    runs = Runs(zoo)
    for ours, expected in zip(runs.probe.logits, runs.whole(runs.record.chain), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert runs.told == 8 + 6
    strays = [runs.probe.strays(candidate) for candidate in runs.candidates]
    assert all(1e-6 < found < 1e-2 for found in strays)
    assert len(set(strays)) == 6


def test_only_what_lies_above_a_change_is_run_again(zoo: Zoo) -> None:
    runs = Runs(zoo)
    own, other = runs.record.chain, runs.other

    def trial(*at: int) -> list[int]:
        """Run the chain with base's blocks there; the positions that were read."""
        chosen, runs.read = [runs.candidates[i - 1] for i in at], []
        cost = runs.probe.cost(chosen)
        seen = runs.probe.trial(chosen)
        assert len(runs.read) == cost
        chain = [other[i] if i in at else own[i] for i in range(8)]
        for ours, expected in zip(seen, runs.whole(chain), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-4)
        assert runs.read == [(i, chain[i]) for i in sorted(i for i, _ in runs.read)]
        return [i for i, _ in runs.read]

    assert trial(3, 5) == [3, 4, 5, 6, 7]
    assert trial(5) == [5, 6, 7]  # the trial before was not kept
    runs.probe.keep()
    assert trial(5, 6) == [6, 7]
    assert trial(2, 5) == [2, 3, 4, 5, 6, 7]
    assert trial(5) == [7]


def test_few_hidden_states_are_kept_of_a_large_model(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockzoo.build.trials._MAX_STATE_BYTES", 70 * 64 * 4 * 3)
    runs = Runs(zoo)  # a state of 70 tokens takes a third of it, a chain has seven: every third is kept
    chosen = [runs.candidates[4]]
    assert runs.probe.cost(chosen) == 4
    seen = runs.probe.trial(chosen)
    chain = [*runs.record.chain[:5], runs.other[5], *runs.record.chain[6:]]
    for ours, expected in zip(seen, runs.whole(chain), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
