"""A head that is gone without closing its workers: the next one goes on with them, or they end."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from head import SETTINGS, answer
from over_workers import running
from patience import PATIENCE_S, wait_for

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.workers import head_line


class Head:
    """A process that has an engine over two workers."""

    def __init__(self, zoo: Path, folder: Path, **settings: Any) -> None:
        script = str(Path(__file__).parents[1] / "head.py")
        self.process = subprocess.Popen(
            [sys.executable, script, str(zoo), str(folder), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str = "answer") -> dict[str, Any]:
        """What it says to that."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        found: dict[str, Any] = json.loads(line)
        return found

    def kill(self) -> None:
        """With no time to close anything."""
        self.process.kill()
        self.process.communicate()

    def close(self) -> str:
        """In good order; what it has logged."""
        _, errors = self.process.communicate("close\n", PATIENCE_S)
        assert self.process.returncode == 0
        return errors


@pytest.fixture(scope="module")
def expected(demo_zoo: Path) -> dict[str, list[int]]:
    return answer(LLMEngine(demo_zoo, EngineConfig(**SETTINGS)))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / ("x" * 100)  # longer than the name of a socket may be
    path.mkdir()
    yield path
    shutil.rmtree(path)  # whatever still waits there ends


@pytest.fixture
def orphans(demo_zoo: Path, folder: Path, expected: dict[str, list[int]]) -> list[int]:
    """Two workers whose head is gone in the middle of a step."""
    head = Head(demo_zoo, folder)
    assert head.ask()["answers"] == expected
    pids: list[int] = head.ask("begin")["pids"]
    head.kill()
    wait_for(lambda: len(list(folder.glob("*/*.sock"))) == 2)
    assert running(pids) == pids
    return pids


def test_the_next_head_goes_on_with_them_and_so_on(
    demo_zoo: Path, folder: Path, orphans: list[int], expected: dict[str, list[int]]
) -> None:
    head = Head(demo_zoo, folder)
    assert head.ask() == {"pids": orphans, "answers": expected}
    head.kill()
    wait_for(lambda: len(list(folder.glob("*/*.sock"))) == 2)
    head = Head(demo_zoo, folder)
    assert head.ask() == {"pids": orphans, "answers": expected}
    assert "2 workers of an engine that has ended go on" in head.close()
    assert not running(orphans)
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_one_that_is_lost_later_is_replaced(
    demo_zoo: Path, folder: Path, orphans: list[int], expected: dict[str, list[int]]
) -> None:
    head = Head(demo_zoo, folder)
    assert head.ask()["pids"] == orphans
    os.kill(orphans[0], signal.SIGKILL)
    found = head.ask()
    assert found["answers"] == expected
    assert found["pids"][0] != orphans[0]
    assert found["pids"][1] == orphans[1]
    head.kill()
    wait_for(lambda: len(list(folder.glob("*/*.sock"))) == 2)
    head = Head(demo_zoo, folder)
    assert head.ask() == found
    head.close()


@pytest.mark.parametrize(
    "settings", [{"kv_precision": "u8"}, pytest.param({"workers": 1}, marks=pytest.mark.slow)], ids=str
)
def test_those_that_do_not_fit_end(
    demo_zoo: Path, folder: Path, orphans: list[int], settings: dict[str, Any]
) -> None:
    head = Head(demo_zoo, folder, **settings)
    assert not set(head.ask()["pids"]) & set(orphans)
    assert not running(orphans)
    head.close()


@pytest.mark.slow
def test_a_zoo_that_has_lost_models_fits(demo_zoo: Path, tmp_path: Path, folder: Path) -> None:
    """What the others need is there; what none needs is let go."""
    zoo = tmp_path / "zoo"
    shutil.copytree(demo_zoo, zoo)
    head = Head(zoo, folder)
    before = head.ask()
    head.kill()
    wait_for(lambda: len(list(folder.glob("*/*.sock"))) == 2)
    compile_models({}, zoo, CompileOptions(verify=False, profile=False), remove=["base-sharded"])
    head = Head(zoo, folder)
    after = head.ask()
    assert after["pids"] == before["pids"]
    del before["answers"]["base-sharded"]
    assert after["answers"] == before["answers"]
    head.close()


@pytest.mark.slow
def test_all_begin_anew_where_one_is_missing(
    demo_zoo: Path, folder: Path, orphans: list[int], expected: dict[str, list[int]]
) -> None:
    os.kill(orphans[1], signal.SIGKILL)
    head = Head(demo_zoo, folder)
    found = head.ask()
    assert found["answers"] == expected
    assert not set(found["pids"]) & set(orphans)
    assert not running(orphans)
    head.close()


def test_they_end_with_the_folder(demo_zoo: Path, folder: Path, orphans: list[int]) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    wait_for(lambda: not running(orphans))


@pytest.mark.slow
def test_who_says_nothing_gets_nothing(demo_zoo: Path, folder: Path, orphans: list[int]) -> None:
    """Connections that lead nowhere do not keep a worker from the next head."""
    for path in folder.glob("*/*.sock"):
        with head_line.connect(path, 5.0):
            pass
        with head_line.connect(path, 5.0) as connection, connection.makefile("rb") as said:
            said.read(1)
            connection.sendall(b"no descriptors")
    head = Head(demo_zoo, folder)
    assert head.ask()["pids"] == orphans
    head.close()


def test_nobody_waits_forever(tmp_path: Path) -> None:
    held = head_line.Held(0, head_line.EngineKind(tmp_path, "f32", False, None, 1), frozenset())
    code = (  # in a process of its own, whose output is cut off
        "import pickle, sys; from pathlib import Path; from blockzoo.runtime.workers import head_line;"
        "held = pickle.load(sys.stdin.buffer);"
        "raise SystemExit(head_line.wait_for_head(Path(sys.argv[1]), held, 0.2) is not None)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "1.sock")],
        input=pickle.dumps(held),
        timeout=PATIENCE_S,
        check=True,
    )


@pytest.mark.slow
def test_heads_at_the_same_time_have_workers_of_their_own(
    demo_zoo: Path, folder: Path, expected: dict[str, list[int]]
) -> None:
    one, other = Head(demo_zoo, folder), Head(demo_zoo, folder)
    first, second = one.ask(), other.ask()
    assert first["answers"] == second["answers"] == expected
    assert not set(first["pids"]) & set(second["pids"])
    one.close()
    assert running(second["pids"]) == second["pids"]
    assert other.ask() == second
    other.close()


@pytest.mark.parametrize(
    "settings", [{"ray_address": "auto", "num_threads": 1}, {"worker_delays_ms": (0.0, 1.0)}], ids=str
)
def test_workers_elsewhere_do_not_wait(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="worker_folder"):
        EngineConfig(workers=2, worker_folder=str(tmp_path), **settings)
    with pytest.raises(InvalidRequestError, match="worker_folder"):
        EngineConfig(workers=2, worker_folder=str(tmp_path / "nowhere"))


def test_a_stranger_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    assert head_line.peer_of(one) == (os.getpid(), True)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert head_line.peer_of(one) == (os.getpid(), False)
    assert head_line._taken(one, None) is None  # type: ignore[arg-type]
    assert other.recv(1) == b""
    other.close()
