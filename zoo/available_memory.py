"""How much memory there is to take: the machine's, and that of this process's control group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """Of one version of control groups: its folder, and files in a group's folder."""

    mounts: tuple[str, ...]
    limit: str
    usage: str
    reclaimable: str  # the line of memory.stat: pages of files that can go


_V1 = _Files(
    ("sys/fs/cgroup/memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_V2 = _Files(("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can take before something is swapped out or killed.

    What the kernel counts as available (the page cache can go, so it is more than what is free), or what the
    limits of the control groups around the process leave, where that is less. Linux only.

    Args:
        root: of the file system with /proc and /sys.
    """
    available = _fields(root / "proc/meminfo")["MemAvailable:"] * 1024
    return min([available, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> Iterator[int]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files = _V2
        elif "memory" in controllers.split(","):
            files = _V1
        else:
            continue
        for mount in files.mounts:
            # in a container the path may be that outside: then the mount itself is the group
            group, top = root / mount / path.lstrip("/"), root / mount
            for folder in (group, *group.parents):
                left = _left(folder, files)
                if left is not None:
                    yield left
                if folder == top:
                    break


def _left(folder: Path, files: _Files) -> int | None:
    """Bytes that a group may still take; None where nothing limits it."""
    try:
        limit = (folder / files.limit).read_text().strip()
        if limit == "max":
            return None
        usage = int((folder / files.usage).read_text())
        reclaimable = _fields(folder / "memory.stat").get(files.reclaimable, 0)
    except FileNotFoundError:
        return None
    return max(0, int(limit) - usage + reclaimable)


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) >= 2}
