"""Guesses over workers: those of surrogates, in the pages of their models, and those of other models."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from over_workers import SETTINGS, group_of
from quiet import words
from test_surrogates import drafted, surrogates_of, with_surrogates, without

from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.serve.live_placement import span_names
from blockzoo.runtime.serve.span_groups import leaders
from blockzoo.runtime.serve.span_loading import MoveError
from blockzoo.zoo.manifest import Manifest, SurrogateRecord

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
MODELS = ("base", "notes", "solver", "twin")


@pytest.fixture(scope="module")
def zoo(demo_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Surrogates that leave layers out or have another model's blocks; a model that guesses for its twin."""
    surrogates = surrogates_of(Manifest.load(demo_zoo / "manifest.json").models)
    folder = with_surrogates(demo_zoo, tmp_path_factory.mktemp("guessing") / "zoo", surrogates)
    manifest = Manifest.load(folder / "manifest.json")
    found = SurrogateRecord("base", "base", {}, (0.9,), 0.3, 1.5, 1, "built-in")
    manifest.models["twin"] = replace(manifest.models["base"], surrogate=found)
    kept = {name: manifest.models[name] for name in MODELS}
    (folder / "manifest.json").write_text(replace(manifest, models=kept).to_text())
    return folder


@pytest.fixture(scope="module")
def spread(zoo: Path) -> Iterator[LLMEngine]:
    engine = LLMEngine(zoo, EngineConfig(workers=2, speculate="auto", **SETTINGS))
    yield engine
    engine.close()


Answers = dict[str, list[int]]


@pytest.fixture(scope="module")
def expected(demo_zoo: Path) -> Answers:
    quiet = LLMEngine(demo_zoo, EngineConfig(speculate="off", **SETTINGS))
    found: Answers = {model: [] for model in MODELS}
    for number, model in enumerate(MODELS):
        quiet.add_request(model, model.replace("twin", "base"), words(30, number), GREEDY)
    while quiet.has_unfinished():
        for output in quiet.step():
            found[output.request_id] += output.token_ids
    return found


def answers(engine: LLMEngine, at: int = -1, what: Callable[[], None] = lambda: None) -> Answers:
    """Of all models at once; `what` is called before step number `at`."""
    found: Answers = {model: [] for model in MODELS}
    for number, model in enumerate(MODELS):
        engine.add_request(model, model, words(30, number), GREEDY)
    for step in range(1000):
        if step == at:
            what()
        for output in engine.step():
            assert output.error is None, output.error
            found[output.request_id] += output.token_ids
        engine.check_integrity()
        if not engine.has_unfinished():
            break
    assert engine.metrics().pages_used == 0
    return found


def test_answers_are_those_without_guesses(spread: LLMEngine, expected: Answers, dice: random.Random) -> None:
    before = drafted(spread)
    assert answers(spread) == expected
    tried, true = (after - each for after, each in zip(drafted(spread), before, strict=True))
    assert 0 < true < tried, "wrong guesses and right ones were tried"
    counts = spread.metrics().drafted_tokens_total
    assert all(counts[model, "surrogate"] for model in MODELS)


def test_what_writes_the_same_pages_is_in_one_worker(spread: LLMEngine) -> None:
    topology, homes = group_of(spread).plan.topology, group_of(spread).plan.homes
    first = leaders(topology)
    apart = [span for span in range(len(homes)) if first[span] != span]
    assert apart, "the surrogate of solver has blocks of base"
    assert all(homes[span] == homes[first[span]] for span in apart)
    assert len(set(homes)) == 2
    assert all(" of " in name for name in span_names(topology))


def test_they_move_together(spread: LLMEngine, expected: Answers, dice: random.Random) -> None:
    group = group_of(spread)
    first = leaders(group.plan.topology)
    span = next(span for span in range(len(first)) if first[span] != span)
    assert spread.placement is not None
    with pytest.raises(MoveError, match=f"stays with span {first[span]}"):
        spread.placement.move({first[span]: 0, span: 1})
    worker = 1 - group.plan.homes[span]

    def move() -> None:
        assert spread.placement is not None
        assert spread.placement.move({span: worker}).homes[first[span]] == worker

    assert answers(spread, 8, move) == expected
    assert group.plan.homes[span] == group.plan.homes[first[span]] == worker


def test_a_copy_is_for_surrogates_too(spread: LLMEngine, expected: Answers, dice: random.Random) -> None:
    """Of a span for which the surrogate of solver has other blocks."""
    topology, homes = spread._zoo.topology, group_of(spread).plan.homes
    first = leaders(topology)
    uses = topology.chains[topology.chain_of_model["solver"]].uses
    own = next(use.span for use in uses if first.count(first[use.span]) > 1)
    home = homes[own]

    def route(worker: int) -> None:
        assert spread.placement is not None
        spread.placement.route({"solver": {own: worker}})

    assert answers(spread, 8, lambda: route(1 - home)) == expected
    copied = spread._zoo.topology
    for index in (copied.chain_of_model["solver"], copied.surrogate_of_model["solver"]):
        assert any(1 - home == group_of(spread).plan.homes[use.span] for use in copied.chains[index].uses)
    assert answers(spread, 8, lambda: route(home)) == expected
    assert group_of(spread).plan.homes[own] == home


def test_a_killed_worker_loses_no_request(spread: LLMEngine, expected: Answers, dice: random.Random) -> None:
    def kill() -> None:
        pid = group_of(spread).pids[1]
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    restarts = group_of(spread).num_restarts
    assert answers(spread, 8, kill) == expected
    assert group_of(spread).num_restarts == restarts + 1


def test_surrogates_come_and_go(
    demo_zoo: Path, tmp_path: Path, expected: Answers, dice: random.Random
) -> None:
    """Under a request whose surrogate goes."""
    models = Manifest.load(demo_zoo / "manifest.json").models
    path = with_surrogates(demo_zoo, tmp_path / "zoo", {"base": without(models["base"], 5, 6)})
    after = with_surrogates(
        demo_zoo,
        tmp_path / "after",
        {"base": without(models["base"], 3), "notes": without(models["notes"], 8)},
    )
    engine = LLMEngine(path, EngineConfig(workers=2, speculate="auto", **SETTINGS))
    try:
        engine.add_request("base", "base", words(30, 0), GREEDY)
        tokens = [token for _ in range(3) for output in engine.step() for token in output.token_ids]
        (after / "manifest.json").replace(path / "manifest.json")
        assert engine.reload().replaced == ("base", "notes")
        while engine.has_unfinished():
            tokens += [token for output in engine.step() for token in output.token_ids]
        assert tokens == expected["base"]
        before = drafted(engine)[0]
        engine.add_request("notes", "notes", words(30, 1), GREEDY)
        while engine.has_unfinished():
            engine.step()
            engine.check_integrity()
        assert drafted(engine)[0] > before
    finally:
        engine.close()
