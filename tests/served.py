"""zoo-serve as a user starts it: a process whose lines are read as they come."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from patience import PATIENCE_S


def free_port() -> int:
    """Of loopback, and none that the system gives others who ask for any before it is taken."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)  # below those of Linux
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Served:
    """A zoo-serve process.

    Attributes:
        out, err: the lines that it wrote, also while it runs.
    """

    def __init__(self, zoo: Path, *options: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blockzoo.server_config.serve", str(zoo), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(pipe,), daemon=True)
            for lines, pipe in ((self.out, self.process.stdout), (self.err, self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def wait_until_told(self, timeout_s: float = PATIENCE_S) -> None:
        """Until it has said how to ask."""
        self.wait_for(lambda: any("curl" in line for line in self.out), timeout_s)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
        """Poll until the condition holds; its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self.process.poll() is None, f"zoo-serve ended: {''.join(self.err)}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s; log: {''.join(self.err)}"
            time.sleep(0.02)
        return value

    def stop(self, number: int | None = signal.SIGTERM, timeout: float = PATIENCE_S) -> int:
        """Send a signal (None: it was sent) and wait; the exit status."""
        if number is not None and self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()
        return status
