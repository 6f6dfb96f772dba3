"""Memory is shared where it is the same, and not where it only looks so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from blockzoo.runtime.workers.logits_memory import LogitsMemory

_WRITE = """
import pickle, sys
memory = pickle.load(sys.stdin.buffer).open()
memory[:3] = 1, 2, 3
"""


def test_another_process_writes_it() -> None:
    import pickle

    memory = LogitsMemory(1000)
    try:
        done = subprocess.run([sys.executable, "-c", _WRITE], input=pickle.dumps(memory.shared), timeout=200)
        assert done.returncode == 0
        assert memory.array[:4].tolist() == [1, 2, 3, 0]
    finally:
        memory.close()


@pytest.mark.parametrize("change", ["boot_id", "pid", "descriptor", "inode", "device"])
def test_what_is_not_the_same_is_not_taken_for_it(change: str) -> None:
    memory, other = LogitsMemory(10), LogitsMemory(10)
    differs = {
        "boot_id": "another",
        "pid": 1 << 30,
        "descriptor": other.shared.descriptor,
        "inode": other.shared.inode,
        "device": memory.shared.device + 1,
    }
    try:
        assert memory.shared.open() is not None
        assert memory.shared._replace(**{change: differs[change]}).open() is None
    finally:
        memory.close()
        other.close()


def test_no_descriptors_are_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        memory = LogitsMemory(10)
        memory.shared.open()
        memory.close()
        del memory
    assert len(os.listdir("/proc/self/fd")) == before
