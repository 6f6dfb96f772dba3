"""Engines, and servers, whose blocks are in two workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.workers.group import WorkerGroup

SETTINGS: dict[str, Any] = {
    "precision": "f32",
    "kv_cache_bytes": 32 << 20,
    "num_threads": 1,
    "max_num_batched_tokens": 256,
    "kv_sharing": "scope",
}
SERVED = ("--workers", "2", "--threads", "1", "--precision", "f32", "--kv-cache-gb", "0.05")
"""The same of zoo-serve."""
_BODY = {"text_input": "The river", "max_tokens": 400, "sampling_parameters": '{"ignore_eos": true}'}


def check_streams_outlive(server: Any, pid: int) -> None:
    """Kill a worker under streams of a server: they give what they give when nothing happens."""

    def text(name: str) -> str:
        events = server.stream(name, _BODY)
        assert not [event for event in events if "error" in event]
        return "".join(event["text_output"] for event in events)

    quiet = {name: text(name) for name in ("base", "solver", "notes")}
    answers: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda name=name: answers.update({name: text(name)})) for name in quiet
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert answers == quiet
    server.wait_for(lambda: any("serving again after" in line for line in server.err))


@contextmanager
def over_two(zoo: Path) -> Iterator[LLMEngine]:
    """One that ends with the block."""
    engine = LLMEngine(zoo, EngineConfig(workers=2, **SETTINGS))
    yield engine
    engine.close()


def group_of(engine: LLMEngine) -> WorkerGroup:
    """Its workers."""
    assert engine._zoo.workers is not None
    return engine._zoo.workers.group


def running(pids: list[int]) -> list[int]:
    """Those of some processes that have not ended."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":  # whoever is to reap it may not be there
            found.append(pid)
    return found
