"""One zoo's blocks in several processes: the same answers as from one, whatever becomes of a worker."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from over_workers import SETTINGS, group_of
from patience import PATIENCE_S, wait_for

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.serve.reload import Reloaded
from blockzoo.runtime.workers import distributed
from blockzoo.runtime.workers.pairs import Pair

Answers = dict[str, list[int]]


def greedy(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def words(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 2048, length).tolist()


def jobs_of(engine: LLMEngine, lengths: tuple[int, ...]) -> list[tuple[str, list[int]]]:
    return [(model, words(n, seed)) for seed, n in enumerate(lengths) for model in engine.models]


def answers(
    engine: LLMEngine,
    jobs: list[tuple[str, list[int]]],
    max_tokens: int = 12,
) -> Answers:
    found: Answers = {}
    for index, (model, prompt) in enumerate(jobs):
        engine.add_request(str(index), model, prompt, greedy(max_tokens))
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None, output.error
            found.setdefault(output.request_id, []).extend(output.token_ids)
    engine.rest()
    engine.check_integrity()
    assert all(len(tokens) == max_tokens for tokens in found.values())
    return found


def test_chains_go_through_both_workers(spread: LLMEngine) -> None:
    plan = group_of(spread).plan
    for chain in plan.topology.chains:
        assert {plan.homes[use.span] for use in chain.uses} == {0, 1}


def test_all_tenants_answer_as_from_one_process(
    local: LLMEngine, spread: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "LEAST_ROWS", 24)  # prompts are cut within, decode steps are not
    jobs = jobs_of(local, (5, 40, 333))
    expected = answers(local, jobs)
    assert answers(spread, jobs) == expected
    before = sum(spread.metrics().prefix_hit_tokens.values())
    assert answers(spread, jobs) == expected  # from the cache
    assert sum(spread.metrics().prefix_hit_tokens.values()) > before
    begins_alike = [(model, [*prompt[:200], *words(30, 77)]) for model, prompt in jobs if len(prompt) > 300]
    assert answers(spread, begins_alike) == answers(local, begins_alike)  # the begun page is copied


def test_decode_steps_may_be_cut_too(
    local: LLMEngine, spread: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "LEAST_ROWS", 2)
    jobs = jobs_of(local, (17, 18, 70))
    assert answers(spread, jobs) == answers(local, jobs)


def test_what_finds_no_room_between_processes_of_a_machine_comes_another_way(
    local: LLMEngine, spread: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends, refused = Pair.send, itertools.cycle((True, False, False))

    def send(pair: Pair, *what: Any) -> bool:
        return not next(refused) and sends(pair, *what)

    monkeypatch.setattr(Pair, "send", send)  # of the head: what it says comes by both ways, in its order
    jobs = jobs_of(local, (5, 70))
    assert answers(spread, jobs) == answers(local, jobs)


def test_requests_can_be_ended_at_any_moment(local: LLMEngine, spread: LLMEngine) -> None:
    jobs = jobs_of(local, (300, 20))
    expected = answers(local, jobs)
    for index, (model, prompt) in enumerate(jobs):
        spread.add_request(str(index), model, prompt, greedy())
    found: Answers = {}
    for step in range(1000):
        for output in spread.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
        if step % 2:
            spread.abort(str(step))
        if not spread.has_unfinished():
            break
    spread.check_integrity()
    for key, tokens in found.items():
        assert tokens == expected[key][: len(tokens)]


@pytest.mark.slow
def test_memory_moves_with_the_pages(demo_zoo: Path, local: LLMEngine) -> None:
    """With a pool that all of them fill anew, pages change owners all the time."""
    small = {"workers": 2, "kv_cache_bytes": 2 << 20, "max_num_seqs": 4}
    engine = LLMEngine(demo_zoo, EngineConfig(**(SETTINGS | small | {"num_threads": os.cpu_count()})))
    try:
        executors = engine._zoo.executors.values()
        assert not any(executor._cuts for executor in executors), "each has all cores in its turn"
        jobs = jobs_of(local, (100, 60, 130, 33))
        assert answers(engine, jobs) == answers(local, jobs)
    finally:
        engine.close()


# ---- what goes wrong


def test_a_killed_worker_loses_no_request(local: LLMEngine, spread: LLMEngine) -> None:
    jobs = jobs_of(local, (40, 333))
    expected = answers(local, jobs, 40)
    group = group_of(spread)
    before, killed = group.num_restarts, []

    found: Answers = {}
    for index, (model, prompt) in enumerate(jobs):
        spread.add_request(str(index), model, prompt, greedy(40))
    steps = 0
    finished = []
    while spread.has_unfinished():
        if (steps := steps + 1) in (3, 25):
            os.kill(group.pids[steps % 2], signal.SIGKILL)
            start = time.monotonic()
        for output in spread.step():
            assert output.error is None
            found.setdefault(output.request_id, []).extend(output.token_ids)
            finished += [output.request_id] * output.finished
        if steps in (3, 25):
            killed.append(time.monotonic() - start)
    spread.check_integrity()
    assert found == expected
    assert sorted(finished) == sorted(expected), "each ends once"
    assert group.num_restarts == before + 2
    assert max(killed) < PATIENCE_S, "seconds until both serve again"


def test_workers_end_with_their_head(demo_zoo: Path) -> None:
    code = (
        "import sys\nfrom blockzoo.runtime import EngineConfig, LLMEngine\n"
        f"engine = LLMEngine({str(demo_zoo)!r}, EngineConfig(workers=1, **{SETTINGS!r}))\n"
        "print(*engine._zoo.workers.group.pids, flush=True)\nsys.stdin.read()"
    )
    head = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert head.stdin is not None
    assert head.stdout is not None
    with head.stdin, head.stdout:
        (pid,) = map(int, head.stdout.readline().split())
        head.kill()
        head.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_strangers_cannot_take_part(spread: LLMEngine, local: LLMEngine) -> None:
    """Who has no keys is heard neither by the head nor by a worker."""
    group = group_of(spread)
    addresses = [group._address, *(worker.address for worker in group._workers)]
    sockets = []
    for address, kind in zip(addresses, (zmq.DEALER, zmq.PUSH, zmq.PUSH), strict=True):
        socket = zmq.Context.instance().socket(kind)
        socket.linger = 0
        if kind == zmq.DEALER:
            socket.identity = group._workers[0].identity.encode()
        socket.connect(address)
        with suppress(zmq.Again):  # it has been turned away already
            for _ in range(10):
                socket.send_multipart([b"error", b"{"], zmq.NOBLOCK)
        sockets.append(socket)
    time.sleep(0.2)
    jobs = jobs_of(local, (30,))
    assert answers(spread, jobs) == answers(local, jobs)
    for socket in sockets:
        socket.close(0)


@pytest.mark.slow
def test_a_zoo_that_does_not_fit_one_worker(demo_zoo: Path, local: LLMEngine) -> None:
    memory = {"kv_cache_bytes": 2 << 20, "worker_memory_bytes": 19 << 20, "max_num_seqs": 4}
    with pytest.raises(InvalidRequestError, match="does not fit in 1 workers"):
        LLMEngine(demo_zoo, EngineConfig(**(SETTINGS | memory), workers=1))
    engine = LLMEngine(demo_zoo, EngineConfig(**(SETTINGS | memory), workers=2))
    try:
        jobs = jobs_of(local, (30,))
        assert answers(engine, jobs) == answers(local, jobs)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"workers": 65}, "at most 64"),
        ({"worker_memory_bytes": 1 << 30}, "set both"),
        ({"workers": 2, "backend": "reference"}, "leave one out"),
        ({"ray_address": "10.0.0.1:6379"}, "set both"),
        ({"workers": 2, "ray_address": "10.0.0.1:6379"}, "needs num_threads"),
        ({"workers": 2, "worker_interface": "0.0.0.0"}, "of one interface"),
        ({"workers": 2, "worker_interface": "eth0"}, "of one interface"),
        ({"worker_interface": "127.0.0.1"}, "set both"),
        ({"worker_cores": 2}, "set both"),
    ],
)
def test_what_workers_cannot_do_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        EngineConfig(**settings)


def test_a_zoo_that_has_not_changed_is_reloaded(spread: LLMEngine) -> None:
    assert spread.reload() == Reloaded()


def test_models_come_and_go(demo_family: dict[str, Path], tmp_path: Path, local: LLMEngine) -> None:
    """Under requests that run: those to other models go on, and of removed ones they hold up the change."""
    zoo, options = tmp_path / "zoo", CompileOptions(verify=False, profile=False)
    compile_models({name: demo_family[name] for name in ("base", "notes")}, zoo, options)
    engine = LLMEngine(zoo, EngineConfig(workers=2, **SETTINGS))
    jobs = [(model, words(40, seed)) for seed, model in enumerate(("base", "notes", "base"))]
    expected, before = answers(local, jobs, 30), engine.worker_pids
    try:
        for index, (model, prompt) in enumerate(jobs):
            engine.add_request(str(index), model, prompt, greedy(30))
        found: Answers = {}
        steps = 0
        while engine.has_unfinished():
            for output in engine.step():
                assert output.error is None
                found.setdefault(output.request_id, []).extend(output.token_ids)
            steps += 1
            if steps == 8:
                compile_models({"solver": demo_family["solver"]}, zoo, options)
                assert engine.reload().added == ("solver",)
            if steps == 12:
                compile_models({}, zoo, options, remove=("notes",))
                with pytest.raises(InvalidRequestError, match="until they have ended"):
                    engine.reload()
        assert found == expected
        assert not set(engine.worker_pids) & set(before)
        assert not any(Path(f"/proc/{pid}").exists() for pid in before)
        assert engine.reload().removed == ("notes",)
        assert engine.models == ("base", "solver")
        jobs = [(model, words(40, 9)) for model in engine.models]
        assert answers(engine, jobs) == answers(local, jobs)
    finally:
        engine.close()
