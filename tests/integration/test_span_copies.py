"""Spans that two workers have, each for other models: the same answers, whenever that begins and ends."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from over_workers import SETTINGS, group_of, over_two
from test_span_moves import jobs_of, run, shuffle

from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.serve.span_loading import MoveError
from blockzoo.runtime.serve.span_moves import Routed
from blockzoo.runtime.workers.settings import NOWHERE
from blockzoo.zoo.manifest import Manifest


def spans_of(engine: LLMEngine, model: str) -> list[int]:
    topology = engine._zoo.topology
    return [use.span for use in topology.chains[topology.chain_of_model[model]].uses]


def shared_span(engine: LLMEngine) -> int:
    """The second span that base and solver have in common."""
    own = spans_of(engine, "solver")
    return [span for span in spans_of(engine, "base") if span in own][1]


def worker_of(engine: LLMEngine, model: str, span: int) -> int:
    """Through which a model goes in a span."""
    originals, plan = engine._zoo.topology.originals, group_of(engine).plan
    return next(plan.homes[own] for own in spans_of(engine, model) if originals[own] == span)


def route(engine: LLMEngine, models: Sequence[str], span: int, worker: int) -> Routed:
    """And check that all is where it should be."""
    assert engine.placement is not None
    routed = engine.placement.route({model: {span: worker} for model in models})
    engine.check_integrity()
    assert {worker_of(engine, model, span) for model in models} == {worker}
    return routed


def kill(engine: LLMEngine, worker: int) -> None:
    pid = group_of(engine).pids[worker]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_models_part_and_come_together(local: LLMEngine, spread: LLMEngine) -> None:
    """In the middle of streams solver goes through a copy, a worker is killed, and the copy is given up."""
    jobs = jobs_of(local, (5, 40, 150))
    expected, span, before = run(local, jobs), shared_span(spread), spread._zoo.topology
    home, held = worker_of(spread, "base", span), spread.metrics().spans_held
    routed, restarts = [], group_of(spread).num_restarts

    def between(step: int) -> None:
        if step == 6:
            routed.append(route(spread, ["solver"], span, 1 - home))
            assert worker_of(spread, "base", span) == home
            assert len(spread.metrics().spans_held) == len(held) + 1
        if step == 14:
            kill(spread, 1 - home)
        if step == 22:
            routed.append(route(spread, ["solver"], span, home))

    assert run(spread, jobs, between) == expected
    assert [(len(each.homes), len(each.given_up)) for each in routed] == [(1, 0), (0, 1)]
    assert all(each.anew for each in routed)
    assert group_of(spread).num_restarts == restarts + 1
    assert spread._zoo.topology == before
    assert spread.metrics().spans_held == held


def test_kv_is_shared_up_to_the_copy(local: LLMEngine, spread: LLMEngine) -> None:
    (_, prompt), *_ = jobs_of(local, (150,), seed=1)
    span, before = shared_span(spread), Counter(spread.metrics().prefix_hit_tokens)
    home = worker_of(spread, "base", span)
    route(spread, ["solver"], span, 1 - home)
    place = spans_of(spread, "base").index(span)
    layer = spread._zoo.models["base"].chain.uses[place].first_layer
    assert layer > 0
    jobs = [("base", prompt), ("solver", prompt)]
    expected = {str(i): run(local, [job])["0"] for i, job in enumerate(jobs)}
    for key, job in zip(expected, jobs, strict=True):
        assert run(spread, [job])["0"] == expected[key]
    base, solver = (spread._zoo.models[name].chain for name in ("base", "solver"))
    shared = [segment for segment in base.segments if segment in solver.segments]
    assert [(segment.first_layer, segment.end_layer) for segment in shared] == [(0, layer)]
    hits = Counter(spread.metrics().prefix_hit_tokens) - before
    assert hits == {f"0-{layer - 1}": len(prompt) // 32 * 32}
    route(spread, ["solver"], span, home)


@pytest.mark.slow
def test_a_span_of_which_only_the_copy_is_used(local: LLMEngine, spread: LLMEngine) -> None:
    jobs = jobs_of(local, (40, 150))
    expected, span = run(local, jobs), shared_span(spread)
    home = worker_of(spread, "base", span)
    users = [name for name in spread.models if span in spans_of(spread, name)]

    def between(step: int) -> None:
        if step == 4:
            route(spread, ["solver"], span, 1 - home)
        if step == 8:
            route(spread, users, span, 1 - home)
            assert group_of(spread).plan.homes[span] == NOWHERE
            with pytest.raises(MoveError, match="given up"):
                spread.placement.move({span: 1})  # type: ignore[union-attr]
        if step == 12:
            route(spread, ["base"], span, home)
            assert group_of(spread).plan.homes[span] == home

    assert run(spread, jobs, between) == expected
    route(spread, users, span, home)
    assert not spread._zoo.topology.copies


def test_what_cannot_be_copied_says_why(demo_zoo: Path, spread: LLMEngine) -> None:
    assert spread.placement is not None
    span, before = shared_span(spread), group_of(spread).plan
    for wanted, why in (
        ({"nobody": {span: 0}}, "no model 'nobody'"),
        ({"base": {span: 2}}, "in worker 2 of 2"),
        ({"base": {99: 0}}, "span 99 of"),
        ({"base": {spans_of(spread, "solver")[-2]: 0}}, "does not go through span"),
    ):
        with pytest.raises(MoveError, match=why):
            spread.placement.route(wanted)
    workers = spread._zoo.workers
    assert workers is not None
    small = [replace(worker, num_bytes=1 << 20) for worker in workers.task.workers]
    full = replace(workers, task=replace(workers.task, workers=small))
    spread._served.current = replace(spread._zoo, workers=full)
    with pytest.raises(MoveError, match="has room for 1048576 bytes of weights"):
        spread.placement.route({"solver": {span: 1 - before.homes[span]}})
    assert group_of(spread).plan == before
    spread._served.current = replace(spread._zoo, workers=workers)


@pytest.mark.slow
@pytest.mark.usefixtures("eager_search")
def test_copies_follow_the_rates(demo_zoo: Path, local: LLMEngine, caplog: pytest.LogCaptureFixture) -> None:
    """Over a slow link two models part, and as one is asked alone the copies go."""
    config = EngineConfig(workers=2, worker_delays_ms=[0.0, 5.0], **SETTINGS)
    engine = LLMEngine(demo_zoo, config)
    try:
        workers, placement = engine._zoo.workers, engine.placement
        assert workers is not None
        assert placement is not None
        own = [replace(worker, speed=1.0) for worker in workers.task.workers]  # cores, wherever this runs
        task = replace(workers.task, workers=own, copies=True)
        engine._served.current = replace(engine._zoo, workers=replace(workers, task=task))
        jobs = [job for job in jobs_of(local, (40, 60, 50)) if job[0] in ("base", "solver")]
        assert run(engine, jobs) == run(local, jobs)
        assert placement.follow() is not None
        engine.check_integrity()
        assert engine._zoo.topology.copies
        assert re.search(": worker 1 for (base|solver)", caplog.text), "which of them goes there is a toss-up"
        assert run(engine, jobs) == run(local, jobs)
        held = len(engine.metrics().spans_held)
        alone = [("solver", prompt) for _, prompt in jobs_of(local, (220, 240))] * 2
        assert run(engine, alone) == run(local, alone)
        assert placement.follow() is not None
        assert len(engine.metrics().spans_held) < held
        assert placement.follow() is None
        assert run(engine, jobs) == run(local, jobs)
    finally:
        engine.close()


@pytest.mark.slow
def test_a_model_comes_while_there_are_copies(demo_zoo: Path, tmp_path: Path, local: LLMEngine) -> None:
    """The other workers begin with each span once."""
    zoo = tmp_path / "zoo"
    shutil.copytree(demo_zoo, zoo)
    jobs = jobs_of(local, (40, 150))
    with over_two(zoo) as engine:
        span = shared_span(engine)
        home = worker_of(engine, "base", span)

        def between(step: int) -> None:
            if step == 4:
                route(engine, ["solver"], span, 1 - home)
            if step == 8:
                manifest = Manifest.load(zoo / "manifest.json")
                base = manifest.models["base"]
                twin = replace(base, chain=(*base.chain[:-1], manifest.models["solver"].chain[-1]))
                manifest.models["twin"] = twin
                (zoo / "manifest.json").write_text(manifest.to_text())
                assert engine.reload().added == ("twin",)
                assert not engine._zoo.topology.copies

        assert run(engine, jobs, between) == run(local, jobs)
        route(engine, ["twin"], span, 1 - worker_of(engine, "base", span))
        assert run(engine, jobs) == run(local, jobs)


def fuzz(local: LLMEngine, spread: LLMEngine, seed: int, rounds: int) -> list[Routed]:
    """Copies come and go at random steps, spans move, workers are killed, requests end early."""
    source, routed = random.Random(seed), []
    ended: set[str] = set()

    def between(step: int) -> None:
        dice = source.random()
        if dice < 0.12:
            model = source.choice(spread.models)
            span = source.choice(spans_of(spread, model))
            models = [
                name for name in spread.models if span in spans_of(spread, name) and source.random() < 0.7
            ]
            wanted = {name: {span: source.randrange(2)} for name in {*models, model}}
            assert spread.placement is not None
            routed.append(spread.placement.route(wanted))
            spread.check_integrity()
        elif dice < 0.2:
            where = {s: w for s, w in shuffle(spread, source).items() if group_of(spread).plan.homes[s] >= 0}
            assert spread.placement is not None
            spread.placement.move(where)
            spread.check_integrity()
        elif dice < 0.22:
            kill(spread, source.randrange(2))
        elif dice < 0.25:
            key = str(source.randrange(10))
            if spread.abort(key) is not None:
                ended.add(key)

    for number in range(rounds):
        jobs = jobs_of(local, (source.randrange(3, 60), source.randrange(60, 300)), seed + number)
        expected = run(local, jobs)
        ended.clear()
        for key, tokens in run(spread, jobs, between, ended).items():
            assert tokens == expected[key][: len(tokens)]
    return routed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_copies_at_random_steps(demo_zoo: Path, local: LLMEngine, seed: int) -> None:
    """In a pool that is too small for all; with guesses."""
    small = {"kv_cache_bytes": 3 << 20, "max_num_seqs": 6, "speculate": "auto"}
    engine = LLMEngine(demo_zoo, EngineConfig(**(SETTINGS | small), workers=2))
    try:
        assert any(each.anew for each in fuzz(local, engine, seed, 4))
    finally:
        engine.close()
