"""Workers that hang, that are killed at any moment, and links that take their time."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from over_workers import SETTINGS, group_of, over_two
from patience import wait_for

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, EngineThread, LLMEngine, RequestOutput, SamplingParams
from blockzoo.runtime.workers import distributed, processes
from blockzoo.runtime.workers import group as groups
from blockzoo.runtime.workers.group import WorkerGroup
from blockzoo.runtime.workers.pairs import Pair

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)


def jobs_of(engine: LLMEngine) -> list[tuple[str, list[int]]]:
    rng = np.random.default_rng(3)
    return [(model, rng.integers(2, 2048, n).tolist()) for n in (20, 260) for model in engine.models]


def answers(engine: LLMEngine) -> dict[str, list[int]]:
    """Every request ends once, and with all its tokens."""
    found: dict[str, list[int]] = {}
    finished = []
    for index, (model, prompt) in enumerate(jobs_of(engine)):
        engine.add_request(str(index), model, prompt, GREEDY)
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None, output.error
            found.setdefault(output.request_id, []).extend(output.token_ids)
            finished += [output.request_id] * output.finished
    engine.check_integrity()
    assert sorted(finished) == sorted(found)
    return found


@pytest.fixture(scope="module")
def expected(demo_zoo: Path) -> dict[str, list[int]]:
    return answers(LLMEngine(demo_zoo, EngineConfig(**SETTINGS)))


@pytest.fixture
def spread(demo_zoo: Path) -> Iterator[LLMEngine]:
    with over_two(demo_zoo) as engine:
        yield engine


def test_a_worker_that_hangs_is_replaced(spread: LLMEngine, expected: dict[str, list[int]]) -> None:
    pid = group_of(spread).pids[1]
    timer = threading.Timer(0.15, os.kill, (pid, signal.SIGSTOP))
    timer.start()
    start = time.monotonic()
    assert answers(spread) == expected
    timer.join()
    assert group_of(spread).num_restarts == 1
    assert not Path(f"/proc/{pid}").exists()
    assert time.monotonic() - start > groups.SILENT_S


def test_workers_killed_at_any_moment(spread: LLMEngine, expected: dict[str, list[int]]) -> None:
    source, group = random.Random(1), group_of(spread)
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(source.uniform(0.2, 2.0)):
            # not three times while it loads, after which its requests fail
            pids = group.pids
            if len(pids) == 2 and all(worker.address for worker in group._workers):
                with suppress(ProcessLookupError):  # it was replaced just now
                    os.kill(source.choice(pids), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for _ in range(3):
            assert answers(spread) == expected
    finally:
        stop.set()
        killer.join()
    assert group.num_restarts >= 3


def resident(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_pages_that_hold_nothing_take_no_memory(demo_zoo: Path) -> None:
    engine = LLMEngine(demo_zoo, EngineConfig(workers=2, **(SETTINGS | {"kv_cache_bytes": 64 << 20})))
    try:
        rng, few = np.random.default_rng(5), SamplingParams(max_tokens=1)
        engine.add_request("first", "base", rng.integers(2, 2048, 200).tolist(), few)
        while engine.has_unfinished():
            engine.step()
        stays = group_of(engine).pids[0]
        before = resident(stays)
        for index in range(60):
            engine.add_request(str(index), "base", rng.integers(2, 2048, 200).tolist(), few)
        while engine.has_unfinished():
            engine.step()
        filled = resident(stays)
        os.kill(group_of(engine).pids[1], signal.SIGKILL)

        def started_again() -> bool:
            engine.watch()
            return bool(group_of(engine).num_restarts)

        wait_for(started_again)
        wait_for(lambda: resident(stays) <= (before + filled) // 2)
    finally:
        engine.close()


def test_a_worker_that_cannot_start_again_fails_its_requests_clearly(
    spread: LLMEngine, monkeypatch: pytest.MonkeyPatch, expected: dict[str, list[int]]
) -> None:
    monkeypatch.setattr(processes, "_MODULE", "blockzoo.no_such_module")
    spread.add_request("r", "base", [5, 6, 7], GREEDY)
    spread.step()
    os.kill(group_of(spread).pids[0], signal.SIGKILL)
    outputs = [output for _ in range(3) for output in spread.step()]
    assert [output.finish_reason for output in outputs if output.finished] == ["error"]
    assert "while it loaded" in (outputs[-1].error or "")
    monkeypatch.undo()
    assert answers(spread) == expected


class SlowLink:
    """Passes bytes between a port of its own and an address, each a while after it came."""

    def __init__(self, address: str, delay_s: float) -> None:
        host, port = address.removeprefix("tcp://").split(":")
        self._target, self._delay_s = (host, int(port)), delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with source, target:
            while data := source.recv(1 << 16):
                self.num_bytes += len(data)
                time.sleep(self._delay_s)
                target.sendall(data)

    def close(self) -> None:
        self._listener.close()


def test_links_that_take_their_time(
    demo_zoo: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come late, from one worker later than from the other, and out of step with what the head says."""
    links: list[SlowLink] = []
    tell = WorkerGroup.send

    def send(self: WorkerGroup, worker: int, *frames: bytes, ends: Sequence[Pair] = ()) -> None:
        if frames[0] == b"peers":
            if not links:
                links.extend(
                    SlowLink(each.address or "", 0.002 * (1 + i)) for i, each in enumerate(self._workers)
                )
            told = {"addresses": [link.address for link in links], "pairs": []}
            frames = (b"peers", groups.pack_json(told))
        tell(self, worker, *frames)

    monkeypatch.setattr(WorkerGroup, "send", send)
    engine = LLMEngine(demo_zoo, EngineConfig(workers=2, **SETTINGS))
    try:
        assert answers(engine) == expected
        assert sum(link.num_bytes for link in links) > 10_000
    finally:
        engine.close()
        for link in links:
            link.close()


def test_families_side_by_side(architecture_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several KV geometries, with micro-batches that do not all go through every worker."""
    monkeypatch.setattr(distributed, "LEAST_ROWS", 8)
    settings = SETTINGS | {"kv_cache_bytes": 96 << 20, "max_model_len": 400}
    spread = LLMEngine(architecture_zoo, EngineConfig(workers=3, **settings))
    try:
        assert answers(spread) == answers(LLMEngine(architecture_zoo, EngineConfig(**settings)))
    finally:
        spread.close()


def test_equivalents_answer_as_from_one_process(demo_family: dict[str, Path], tmp_path: Path) -> None:
    options = CompileOptions(verify=False, profile=False, threads=1, share="equivalent", threshold=0.5)
    compile_models({name: demo_family[name] for name in ("base", "solver")}, tmp_path / "zoo", options)
    engine = LLMEngine(tmp_path / "zoo", EngineConfig(**SETTINGS))
    assert any(record.equivalence is not None for record in engine._zoo.manifest.models.values())
    spread = LLMEngine(tmp_path / "zoo", EngineConfig(workers=2, **SETTINGS))
    try:
        assert answers(spread) == answers(engine)
    finally:
        spread.close()


def test_a_worker_that_ends_while_nothing_runs_is_replaced(demo_zoo: Path) -> None:
    thread = EngineThread(demo_zoo, EngineConfig(workers=1, **SETTINGS))
    try:
        group = group_of(thread.engine)
        os.kill(group.pids[0], signal.SIGKILL)
        wait_for(lambda: group.num_restarts)
        outputs: list[RequestOutput] = []
        thread.submit("r", "base", list(range(2, 22)), GREEDY, outputs.append)
        wait_for(lambda: outputs and outputs[-1].finished)
        assert outputs[-1].finish_reason == "length"
        assert group.num_restarts == 1
    finally:
        thread.close()
    assert not group.pids
