"""zoo-serve --workers: streams go on when a worker is killed; workers outlive an engine, but no server."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from over_workers import SERVED, check_streams_outlive, running

from blockzoo.build.pipeline import CompileOptions, compile_models


def workers_of(server: Any) -> list[int]:
    """Process ids of the workers, which are children of the engine's process."""
    engine = server.model_pid("blockzoo")
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == engine and b"runtime.workers.worker" in command:
                found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_a_zoo_over_workers(serve_zoo, demo_zoo, demo_family, tmp_path) -> None:
    zoo = tmp_path / "zoo"
    shutil.copytree(demo_zoo, zoo)
    server = serve_zoo(zoo, *SERVED)
    first = workers_of(server)
    assert len(first) == 2
    check_streams_outlive(server, first[0])
    assert len(workers_of(server)) == 2

    compile_models({"late": demo_family["base-sharded"]}, zoo, CompileOptions(verify=False, profile=False))
    server.wait_for(lambda: server.post("late", {"text_input": "The", "max_tokens": 1})[0] == 200)
    texts = [server.generate(name, "The river")["text_output"] for name in ("late", "base")]
    assert texts[0] == texts[1]

    second = workers_of(server)
    assert not set(second) & set(first)
    os.kill(server.model_pid("blockzoo"), signal.SIGKILL)
    server.wait_for(lambda: sum("serving again after" in line for line in server.err) == 2)
    assert not workers_of(server), "it goes on with those of the engine before"
    assert running(second) == second
    assert server.generate("late", "The river")["text_output"] == texts[0]
    assert server.stop() == 0
    server.wait_for(lambda: not running(second))
