"""Workers as actors of a Ray that runs: answers are those of one process, whatever becomes of a worker."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from patience import wait_for
from running_ray import ENVIRONMENT, RunningRay, is_there

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.workers.processes import WorkerStartError
from blockzoo.runtime.workers.sockets import LOOPBACK, own_address

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"precision": "f32", "kv_cache_bytes": 32 << 20, "num_threads": 1}
CPUS = 2
GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
Answers = dict[str, list[int]]


@pytest.fixture(scope="module")
def running() -> Iterator[RunningRay]:
    pytest.importorskip("ray", reason="the extra cluster is not installed")
    import ray

    started = RunningRay(CPUS)
    with pytest.MonkeyPatch.context() as patch:
        # else an address on loopback is taken for another one of this machine
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        yield started
        ray.shutdown()
    started.stop()


@pytest.fixture(scope="module")
def expected(demo_zoo: Path) -> Answers:
    return answers(LLMEngine(demo_zoo, EngineConfig(**SETTINGS)))


@pytest.fixture
def spread(demo_zoo: Path, running: RunningRay) -> Iterator[LLMEngine]:
    engine = LLMEngine(demo_zoo, EngineConfig(workers=2, ray_address=running.address, **SETTINGS))
    yield engine
    engine.close()


def answers(engine: LLMEngine, at: int = 0, do: Callable[[], object] | None = None) -> Answers:
    """Of all models; `do` is done before a step."""
    found: Answers = {model: [] for model in engine.models}
    finished = []
    for model in engine.models:
        engine.add_request(model, model, list(range(5, 90)), GREEDY)
    step = 0
    while engine.has_unfinished():
        step += 1
        if step == at and do is not None:
            do()
        for output in engine.step():
            assert output.error is None, output.error
            found[output.request_id] += output.token_ids
            finished += [output.request_id] * output.finished
    engine.check_integrity()
    assert sorted(finished) == sorted(found)
    return found


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0))


def test_answers_are_those_of_one_process(spread: LLMEngine, expected: Answers) -> None:
    assert spread._zoo.workers is not None
    homes = spread._zoo.workers.group.plan.homes
    assert set(homes) == {0, 1}
    assert answers(spread) == expected
    assert answers(spread) == expected  # from the cache
    assert free_cpus() == CPUS - 2


def test_a_killed_worker_loses_no_request(spread: LLMEngine, expected: Answers) -> None:
    before = spread.worker_pids
    assert answers(spread, 5, lambda: os.kill(before[0], signal.SIGKILL)) == expected
    assert spread.worker_pids[1] == before[1]
    assert spread.worker_pids[0] != before[0]
    assert answers(spread, 9, lambda: os.kill(before[1], signal.SIGKILL)) == expected


def test_a_worker_that_hangs_is_replaced(spread: LLMEngine, expected: Answers) -> None:
    hung = spread.worker_pids[1]
    try:
        assert answers(spread, 5, lambda: os.kill(hung, signal.SIGSTOP)) == expected
        assert spread.worker_pids[1] != hung
        wait_for(lambda: not is_there(hung))
    finally:
        with suppress(ProcessLookupError):
            os.kill(hung, signal.SIGKILL)


def test_models_come_while_workers_serve(
    demo_zoo: Path, demo_family: dict[str, Path], running: RunningRay, tmp_path: Path
) -> None:
    """New workers start beside those there are, though all of Ray's CPUs are taken."""
    zoo = tmp_path / "zoo"
    shutil.copytree(demo_zoo, zoo)
    options = CompileOptions(verify=False, profile=False)
    engine = LLMEngine(zoo, EngineConfig(workers=2, ray_address=running.address, **SETTINGS))
    try:
        before = answers(engine)
        pids = engine.worker_pids
        compile_models({"late": demo_family["base"]}, zoo, options)
        assert engine.reload().added == ("late",)
        after = answers(engine)
        assert after.pop("late") == before["base"]
        assert after == before
        assert not set(pids) & set(engine.worker_pids)
        wait_for(lambda: not any(map(is_there, pids)))
    finally:
        engine.close()


def test_workers_are_reached_through_an_interface(
    demo_zoo: Path, running: RunningRay, expected: Answers
) -> None:
    try:
        own = own_address("tcp://192.0.2.200:9")
    except OSError:
        pytest.skip("this machine has no other interface than loopback")
    config = EngineConfig(workers=2, ray_address=running.address, worker_interface=own, **SETTINGS)
    engine = LLMEngine(demo_zoo, config)
    try:
        assert engine._zoo.workers is not None
        group = engine._zoo.workers.group
        addresses = [group._address, *(worker.address or "" for worker in group._workers)]
        assert own != LOOPBACK
        assert all(address.startswith(f"tcp://{own}:") for address in addresses)
        assert answers(engine) == expected
    finally:
        engine.close()


def test_what_is_taken_of_ray_is_given_back(demo_zoo: Path, running: RunningRay) -> None:
    engine = LLMEngine(demo_zoo, EngineConfig(workers=2, ray_address=running.address, **SETTINGS))
    pids = engine.worker_pids
    engine.close()
    wait_for(lambda: free_cpus() == CPUS and not any(map(is_there, pids)))


def test_no_room_is_said(demo_zoo: Path, running: RunningRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockzoo.runtime.workers.on_ray.START_S", 2.0)
    wait_for(lambda: free_cpus() == CPUS)
    with pytest.raises(WorkerStartError, match="no room for 3 workers"):
        LLMEngine(demo_zoo, EngineConfig(workers=3, ray_address=running.address, **SETTINGS))
    wait_for(lambda: free_cpus() == CPUS)


def test_workers_end_with_their_head(demo_zoo: Path, running: RunningRay) -> None:
    settings = SETTINGS | {"ray_address": running.address}
    code = (
        "import sys\nfrom blockzoo.runtime import EngineConfig, LLMEngine\n"
        f"engine = LLMEngine({str(demo_zoo)!r}, EngineConfig(workers=1, **{settings!r}))\n"
        "print(*engine.worker_pids, flush=True)\nsys.stdin.read()"
    )
    head = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT},
    )
    assert head.stdin is not None
    assert head.stdout is not None
    with head.stdin, head.stdout:
        (pid,) = map(int, head.stdout.readline().split())
        head.kill()
        head.wait()
    wait_for(lambda: not is_there(pid))
