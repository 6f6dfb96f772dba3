"""Spans that go from worker to worker while requests run: the same answers, and no request lost."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from over_workers import SETTINGS, group_of, over_two

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, EngineThread, LLMEngine, RequestOutput, SamplingParams
from blockzoo.runtime.serve import live_placement, span_moves
from blockzoo.runtime.serve.span_loading import MoveError
from blockzoo.runtime.serve.span_moves import Moved
from blockzoo.runtime.workers.group import WorkerGroup
from blockzoo.zoo.rates import Rates

MOST_TOKENS = 24
Jobs = list[tuple[str, list[int]]]
Answers = dict[str, list[int]]


def jobs_of(engine: LLMEngine, lengths: tuple[int, ...], seed: int = 0) -> Jobs:
    """For each model and length; half of them begin alike."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(2, 2048, 70).tolist()
    found = []
    for length in lengths:
        for model in engine.models:
            own = rng.integers(2, 2048, length).tolist()
            found.append((model, [*begin, *own][:length] if len(found) % 2 and length > 80 else own))
    return found


def run(
    engine: LLMEngine,
    jobs: Jobs,
    between: Callable[[int], None] = lambda step: None,
    ended: Collection[str] = (),
) -> Answers:
    """Greedy answers; `between` is called before each step with its number. Those `ended` may be shorter."""
    greedy = SamplingParams(max_tokens=MOST_TOKENS, temperature=0.0, ignore_eos=True)
    found: Answers = {}
    for index, (model, prompt) in enumerate(jobs):
        engine.add_request(str(index), model, prompt, greedy)
    step = 0
    while engine.has_unfinished():
        between(step)
        for output in engine.step():
            assert output.error is None, output.error
            found.setdefault(output.request_id, []).extend(output.token_ids)
        step += 1
    engine.rest()
    engine.check_integrity()
    assert all(len(tokens) == MOST_TOKENS or key in ended for key, tokens in found.items())
    return found


@pytest.fixture
def fresh(demo_zoo: Path) -> Iterator[LLMEngine]:
    with over_two(demo_zoo) as engine:
        yield engine


def homes(engine: LLMEngine) -> list[int]:
    return list(group_of(engine).plan.homes)


def move(engine: LLMEngine, where: dict[int, int]) -> Moved:
    """Move spans, and check that all is where it should be."""
    assert engine.placement is not None
    moved = engine.placement.move(where)
    engine.check_integrity()
    assert {span: homes(engine)[span] for span in where} == where
    return moved


def test_all_tenants_answer_alike_whatever_moves(local: LLMEngine, spread: LLMEngine) -> None:
    """Every span goes to the other worker in the middle of streams, and one comes back."""
    jobs = jobs_of(local, (5, 40, 150))
    expected, before, moved = run(local, jobs), homes(spread), []
    counted, workers = spread.metrics(), spread._zoo.workers
    assert workers is not None
    workers.link_byte_s[:] = [[1e-9] * 2] * 2

    def between(step: int) -> None:
        if step == 6:
            moved.append(move(spread, {span: 1 - home for span, home in enumerate(before)}))
        if step == 14:
            moved.append(move(spread, {0: before[0]}))

    assert run(spread, jobs, between) == expected
    assert moved[0].pages > 0
    assert moved[0].num_bytes > 0
    assert not moved[0].anew, "over such a link nothing is cheaper to compute"
    hits = sum(spread.metrics().prefix_hit_tokens.values())
    assert run(spread, jobs) == expected  # from the cache, which has moved
    assert sum(spread.metrics().prefix_hit_tokens.values()) > hits
    assert spread.metrics().span_moves_total == counted.span_moves_total + len(before) + 1
    pages = spread.metrics().moved_pages_total - counted.moved_pages_total
    assert pages == sum(each.pages for each in moved)


def test_over_a_slow_link_requests_are_computed_anew(local: LLMEngine, spread: LLMEngine) -> None:
    jobs = jobs_of(local, (40, 150))
    expected, workers = run(local, jobs), spread._zoo.workers
    assert workers is not None
    moved = []

    def between(step: int) -> None:
        if step == 6:
            workers.link_byte_s[:] = [[1e-3] * 2] * 2
            moved.append(move(spread, {span: 1 - home for span, home in enumerate(homes(spread))}))

    assert run(spread, jobs, between) == expected
    assert moved[0].pages == 0
    assert moved[0].anew > 0
    assert moved[0].dropped > 0


def shuffle(engine: LLMEngine, source: random.Random) -> dict[int, int]:
    """Some spans, and where to."""
    now = homes(engine)
    return {span: 1 - now[span] for span in source.sample(range(len(now)), source.randrange(1, 4))}


def fuzz(local: LLMEngine, spread: LLMEngine, seed: int, rounds: int) -> list[Moved]:
    """Moves at random steps, over links that cost anything, and requests that end early."""
    source, workers = random.Random(seed), spread._zoo.workers
    assert workers is not None
    moved: list[Moved] = []
    ended: set[str] = set()

    def between(step: int) -> None:
        if source.random() < 0.15:
            workers.link_byte_s[:] = [[source.choice([1e-9, 3e-8, 1e-7, 1e-3])] * 2] * 2
            moved.append(move(spread, shuffle(spread, source)))
        if source.random() < 0.03:
            key = str(source.randrange(10))
            if spread.abort(key) is not None:
                ended.add(key)

    for number in range(rounds):
        jobs = jobs_of(local, (source.randrange(3, 60), source.randrange(60, 300)), seed + number)
        expected = run(local, jobs)
        ended.clear()
        found = run(spread, jobs, between, ended)
        for key, tokens in found.items():
            assert tokens == expected[key][: len(tokens)]
            assert len(tokens) == MOST_TOKENS or key in ended
    return moved


def test_moves_at_random_steps(local: LLMEngine, spread: LLMEngine) -> None:
    assert fuzz(local, spread, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_many_moves_at_random_steps(demo_zoo: Path, local: LLMEngine, seed: int) -> None:
    """In a pool that is too small for all, so that pages change hands all the time; with guesses."""
    small = {"kv_cache_bytes": 3 << 20, "max_num_seqs": 6, "speculate": "auto"}
    engine = LLMEngine(demo_zoo, EngineConfig(**(SETTINGS | small), workers=2))
    try:
        moved = fuzz(local, engine, seed, 6)
        assert any(each.pages for each in moved)
        assert any(each.anew for each in moved)
        assert engine.metrics().preemptions_total > 0
    finally:
        engine.close()


@pytest.fixture
def steps_that_take_as_long(fresh: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Workers, links and rates are what they are said to be, however busy this machine is; called before
    a step, which takes 10 ms."""
    workers, clock = fresh._zoo.workers, SimpleNamespace(now=0.0)
    assert workers is not None
    own = [replace(worker, speed=1.0) for worker in workers.task.workers]
    task = replace(workers.task, workers=own, hop_s=[[0.0, 1e-4], [1e-4, 0.0]], head=0)
    steady = replace(workers, task=task, rates=Rates(60.0, 0.0), link_byte_s=[[1e-9] * 2] * 2)
    fresh._served.current = replace(fresh._zoo, workers=steady)
    monkeypatch.setattr(live_placement, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def step() -> None:
        clock.now += 0.01

    return step


@pytest.mark.usefixtures("eager_search")
def test_spans_follow_the_rates(
    local: LLMEngine,
    fresh: LLMEngine,
    steps_that_take_as_long: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is asked alone has its spans spread; then nothing pays any more."""
    placement = fresh.placement
    assert placement is not None
    assert placement.propose() is None, "nobody asks"
    jobs = [("solver", prompt) for _, prompt in jobs_of(local, (200, 180))]
    before = homes(fresh)
    moved = []

    def between(step: int) -> None:
        steps_that_take_as_long()
        if step == 20:
            moved.append(placement.follow())

    assert run(fresh, jobs, between) == run(local, jobs)
    assert moved[0] is not None
    assert homes(fresh) != before
    assert "tokens a second: solver" in caplog.text
    assert "steps stood still for" in caplog.text
    assert placement.follow() is None
    held = fresh.metrics().spans_held
    assert len(held) == len(before)
    assert {int(name.split(":")[0]): int(worker) for name, worker in held} == dict(enumerate(homes(fresh)))


@pytest.mark.slow
def test_a_worker_killed_while_spans_move(local: LLMEngine, fresh: LLMEngine) -> None:
    """Before it is ready, or as K and V are sent: spans stay where they are, and the next move works."""
    jobs = jobs_of(local, (40, 150))
    expected, group = run(local, jobs), group_of(fresh)
    where = {span: 1 - home for span, home in enumerate(homes(fresh))}
    told = []

    def kill_before(kind: bytes, worker: int) -> None:
        send = WorkerGroup.send

        def kill(self: WorkerGroup, to: int, *frames: bytes) -> None:
            if frames[0] == kind and not told.count(kind):
                told.append(kind)
                os.kill(self.pids[worker], signal.SIGKILL)
            send(self, to, *frames)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WorkerGroup, "send", kill)
            with pytest.raises(MoveError, match="ended"):
                move(fresh, where)

    def between(step: int) -> None:
        if step == 4:
            kill_before(b"load", 1)
        if step == 12:
            kill_before(b"give", 0)
        if step == 20:
            move(fresh, where)

    assert run(fresh, jobs, between) == expected
    assert group.num_restarts == 2
    assert homes(fresh) == [where[span] for span in range(len(where))]
    os.kill(group.pids[0], signal.SIGKILL)
    assert run(fresh, jobs) == expected  # started again with the spans that it had last


@pytest.mark.slow
def test_spans_that_cannot_be_loaded_stay(
    demo_family: dict[str, Path], tmp_path: Path, local: LLMEngine
) -> None:
    options = CompileOptions(verify=False, profile=False)
    zoo = tmp_path / "zoo"
    compile_models({name: demo_family[name] for name in ("base", "solver")}, zoo, options)
    engine = LLMEngine(zoo, EngineConfig(workers=2, **SETTINGS))
    try:
        before = homes(engine)
        for file in (zoo / "blocks").iterdir():
            file.rename(file.with_suffix(".gone"))
        with pytest.raises(MoveError, match="cannot be loaded"):
            move(engine, {span: 1 - home for span, home in enumerate(before)})
        assert homes(engine) == before
        jobs = [("base", [5, 6, 7]), ("solver", [8, 9])]
        assert run(engine, jobs) == run(local, jobs)
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.usefixtures("eager_search")
def test_an_engine_thread_follows_the_rates(demo_zoo: Path, local: LLMEngine) -> None:
    """In the middle of a stream, from a thread of its own."""
    prompt = jobs_of(local, (200,))[0][1]
    greedy = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
    thread = EngineThread(demo_zoo, EngineConfig(workers=2, move_spans_every_s=0.2, **SETTINGS))
    try:
        before, outputs = homes(thread.engine), []
        done = threading.Event()

        def take(output: RequestOutput) -> None:
            outputs.append(output)
            if output.finished:
                done.set()

        deadline = time.monotonic() + 120
        streams = []
        while not thread.metrics().span_moves_total:
            assert time.monotonic() < deadline
            outputs.clear()
            done.clear()
            thread.submit(str(len(streams)), "solver", prompt, greedy, take)
            assert done.wait(60)
            streams.append([token for output in outputs for token in output.token_ids])
        assert homes(thread.engine) != before
        assert all(stream == streams[0] and len(stream) == 300 for stream in streams)
    finally:
        thread.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_moves_beside_the_steps(
    demo_zoo: Path, local: LLMEngine, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Pages sent ahead, a few between two steps, may be evicted and used otherwise before the rest."""
    monkeypatch.setattr(span_moves, "_AHEAD_S", 1e-4)
    source = random.Random(seed)
    jobs = jobs_of(local, (40, 120, 200, 60), seed)
    expected = run(local, jobs)
    small = {"kv_cache_bytes": 3 << 20, "max_num_seqs": 6}
    thread = EngineThread(demo_zoo, EngineConfig(workers=2, move_spans_every_s=0, **(SETTINGS | small)))
    placement, greedy = (
        thread.engine.placement,
        SamplingParams(max_tokens=MOST_TOKENS, temperature=0.0, ignore_eos=True),
    )
    assert placement is not None
    moved = []
    try:
        for _ in range(3):
            found: Answers = {str(index): [] for index in range(len(jobs))}
            left = threading.Semaphore(0)

            def take(output: RequestOutput, found: Answers = found, left: threading.Semaphore = left) -> None:
                found[output.request_id].extend(output.token_ids)
                if output.finished:
                    assert output.error is None, output.error
                    left.release()

            for index, (model, prompt) in enumerate(jobs):
                thread.submit(str(index), model, prompt, greedy, take)
            while any(len(tokens) < MOST_TOKENS for tokens in found.values()):
                moved.append(placement.move(shuffle(thread.engine, source)))
            for _ in jobs:
                left.acquire()
            thread.engine.check_integrity()
            assert found == expected
        assert sum(each.pages for each in moved) > 0
        assert sum(cache.stats().evictions for cache in thread.engine._zoo.caches.values()) > 0
    finally:
        thread.close()
