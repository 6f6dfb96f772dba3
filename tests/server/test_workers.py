"""zoo-serve --workers: streams go on when a worker is killed, and no worker outlives the server."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from blockzoo.build.pipeline import CompileOptions, compile_models

OPTIONS = ("--workers", "2", "--threads", "1", "--precision", "f32", "--kv-cache-gb", "0.05")


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


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_a_zoo_over_workers(serve_zoo, demo_zoo, demo_family, tmp_path) -> None:
    zoo = tmp_path / "zoo"
    shutil.copytree(demo_zoo, zoo)
    server = serve_zoo(zoo, *OPTIONS)
    first = workers_of(server)
    assert len(first) == 2
    body = {"text_input": "The river", "max_tokens": 400, "sampling_parameters": '{"ignore_eos": true}'}
    quiet = {name: server.stream(name, body) for name in ("base", "solver", "notes")}

    answers: dict[str, list[dict[str, Any]]] = {}
    threads = [
        threading.Thread(target=lambda name=name: answers.update({name: server.stream(name, body)}))
        for name in quiet
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    os.kill(first[0], signal.SIGKILL)
    for thread in threads:
        thread.join()

    def text(events: list[dict[str, Any]]) -> str:
        assert not [event for event in events if "error" in event]
        return "".join(event["text_output"] for event in events)

    assert {name: text(events) for name, events in answers.items()} == {
        name: text(events) for name, events in quiet.items()
    }
    server.wait_for(lambda: any("serving again after" in line for line in server.err))
    assert len(workers_of(server)) == 2

    compile_models({"late": demo_family["base-sharded"]}, zoo, CompileOptions(verify=False, profile=False))
    server.wait_for(lambda: server.post("late", {"text_input": "The", "max_tokens": 1})[0] == 200, 20)
    texts = [server.generate(name, "The river")["text_output"] for name in ("late", "base")]
    assert texts[0] == texts[1]

    second = workers_of(server)
    assert not set(second) & set(first)
    os.kill(server.model_pid("blockzoo"), signal.SIGKILL)
    server.wait_for(lambda: gone(second), 20)
    server.wait_for(lambda: sum("serving again after" in line for line in server.err) == 2, 60)
    third = workers_of(server)
    assert len(third) == 2
    assert server.generate("late", "The river")["text_output"]
    assert server.stop() == 0
    assert gone(third)
