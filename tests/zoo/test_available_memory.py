"""Available memory: of the machine, and of control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockzoo.runtime.serve.config import EngineConfig
from blockzoo.zoo.available_memory import available_memory

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def machine(root: Path, cgroup: str = "0::/\n") -> Path:
    meminfo = (
        f"MemTotal: {16 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {8 << 20} kB\nHugePages_Free: 0\n"
    )
    return write(root, {"proc/meminfo": meminfo, "proc/self/cgroup": cgroup})


def group(folder: str, limit: str, usage: int, inactive: int, version: int) -> dict[str, str]:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    stat = f"anon 1\n{names[2]} {inactive}\nactive_file 7\n"
    return {
        f"{folder}/{names[0]}": f"{limit}\n",
        f"{folder}/{names[1]}": f"{usage}\n",
        f"{folder}/memory.stat": stat,
    }


def test_what_is_available_counts_and_not_what_is_free(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path)) == 8 * GIB


def test_this_machine() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    assert 0 < available_memory() <= total


@pytest.mark.parametrize(
    ("version", "cgroup", "mount"),
    [
        (1, "9:name=systemd:/\n4:cpu,memory:/pod/one\n0::/\n", "sys/fs/cgroup/memory"),
        (2, "0::/pod/one\n", "sys/fs/cgroup"),
        (2, "1:cpu:/\n0::/pod/one\n", "sys/fs/cgroup/unified"),
    ],
)
def test_the_tightest_group_around_the_process_counts(
    tmp_path: Path, version: int, cgroup: str, mount: str
) -> None:
    machine(tmp_path, cgroup)
    none = "max" if version == 2 else "9223372036854771712"
    write(tmp_path, group(f"{mount}/pod/one", none, GIB, 0, version))
    assert available_memory(tmp_path) == 8 * GIB
    write(tmp_path, group(f"{mount}/pod", str(4 * GIB), 2 * GIB, GIB // 2, version))
    assert available_memory(tmp_path) == 5 * GIB // 2
    write(tmp_path, group(f"{mount}/pod/one", str(2 * GIB), 2 * GIB, GIB, version))
    assert available_memory(tmp_path) == GIB
    write(tmp_path, group(f"{mount}/pod/one", str(2 * GIB), 3 * GIB, 0, version))
    assert available_memory(tmp_path) == 0


def test_a_container_sees_its_group_as_the_top(tmp_path: Path) -> None:
    machine(tmp_path, "4:memory:/docker/0123\n")
    write(tmp_path, group("sys/fs/cgroup/memory", str(3 * GIB), GIB, 0, 1))
    assert available_memory(tmp_path) == 2 * GIB


def test_the_pool_takes_a_quarter_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((4 * GIB, GIB), (64 * GIB, 2 * GIB)):
        monkeypatch.setattr("blockzoo.runtime.serve.config.available_memory", lambda size=available: size)
        assert EngineConfig().resolved_kv_bytes() == expected
        assert EngineConfig(kv_cache_bytes=77).resolved_kv_bytes() == 77
