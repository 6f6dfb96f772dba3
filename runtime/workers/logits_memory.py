"""Memory for logits, which a worker shares with the head where both run on one machine.

Who is told of it opens the head's descriptor of it and looks whether that is the same memory: so it is found
out, and not guessed from names or addresses, whether there is one machine.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SharedLogits(NamedTuple):
    """Memory of another process, as it can be found.

    Attributes:
        boot_id: of the kernel that has it.
        pid, descriptor: the process, and its descriptor of it.
        device, inode: of what is behind that.
        num_floats: its size.
    """

    boot_id: str
    pid: int
    descriptor: int
    device: int
    inode: int
    num_floats: int

    def open(self) -> np.ndarray | None:
        """The memory, float32 [num_floats]; None where it is not to be had from here."""
        if self.boot_id != boot_id():
            return None
        try:
            opened = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", os.O_RDWR)
        except OSError:  # another namespace or user's
            return None
        try:
            found = os.fstat(opened)
            if (found.st_dev, found.st_ino) != (self.device, self.inode):
                return None
            return np.frombuffer(mmap.mmap(opened, 4 * self.num_floats), np.float32)
        finally:
            os.close(opened)


class LogitsMemory:
    """Of the head, for one worker. It takes no memory before it is written, and leaves no file.

    Attributes:
        array: float32 [num_floats].
        shared: how a worker finds it.
    """

    def __init__(self, num_floats: int) -> None:
        self._descriptor = os.memfd_create("blockzoo-logits")
        os.ftruncate(self._descriptor, 4 * num_floats)
        self.array = np.frombuffer(mmap.mmap(self._descriptor, 4 * num_floats), np.float32)
        found = os.fstat(self._descriptor)
        self.shared = SharedLogits(
            boot_id(), os.getpid(), self._descriptor, found.st_dev, found.st_ino, num_floats
        )

    def close(self) -> None:
        """No worker finds it any more."""
        os.close(self._descriptor)


def boot_id() -> str:
    """Of the kernel that runs here, since it was started: the same for all processes of a machine alone."""
    return _BOOT_ID.read_text().strip()
