"""The endpoint's process, as the launcher keeps it: started, watched, started again, ended.

A thread owns it, since a child is told to end when the thread that started it does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from blockzoo.server_config.control import SECRET_VARIABLE
from blockzoo.server_config.environment import ServerError
from blockzoo.server_config.launcher import end_with_parent
from blockzoo.server_config.supervisor import Backoff

_POLL_S = 0.2
_START_S = 60.0
_SILENT_S = 30.0  # without a heartbeat a process counts as hung
_GRACE_S = 8.0


class OpenAIProcess:
    """Keeps one process up between `start` and `stop`.

    Args:
        arguments: of `blockzoo.server_config.openai.server`.
        folder: a file in it tells that the process is well.
        secret: of the launcher.
        say: tells whoever runs the server.
    """

    def __init__(
        self, arguments: Sequence[str], folder: Path, say: Callable[[str], None], secret: str = ""
    ) -> None:
        self._heartbeat = folder / "openai.heartbeat"
        module = "blockzoo.server_config.openai.server"
        self._command = [sys.executable, "-m", module, *arguments, f"--heartbeat={self._heartbeat}"]
        self._say = say
        self._environment = {**os.environ, SECRET_VARIABLE: secret}
        self._stop = threading.Event()
        self._settled = threading.Event()
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="openai-process", daemon=True)

    def start(self) -> None:
        """Start it and wait until it serves. Raises ServerError where it does not."""
        self._thread.start()
        self._settled.wait()
        if self._problem is not None:
            raise ServerError(f"the OpenAI endpoint did not start: {self._problem}")

    def stop(self) -> None:
        """End it; answers under way have a few seconds."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        backoff = Backoff()
        while not self._stop.is_set():
            self._heartbeat.unlink(missing_ok=True)
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=self._environment,
                preexec_fn=end_with_parent,
            )
            backoff.serving(time.monotonic())
            try:
                problem = self._watch(process)
            finally:
                _end(process)
            if problem is None:
                return
            if not self._settled.is_set():  # the first start: the cause is most likely in the configuration
                self._problem = problem
                self._settled.set()
                return
            wait = backoff.failed(time.monotonic())
            later = f" in {wait:g} s" if wait else ""
            self._say(f"the OpenAI endpoint failed: {problem}; starting it again{later}")
            self._stop.wait(wait)

    def _watch(self, process: subprocess.Popen[bytes]) -> str | None:
        """Until the process fails, and why; None when it is to stop."""
        began = time.monotonic()
        while not self._stop.wait(_POLL_S):
            status = process.poll()
            if status is not None:
                return f"its process ended with status {status}"
            try:
                silent = time.time() - self._heartbeat.stat().st_mtime
            except FileNotFoundError:
                if time.monotonic() - began > _START_S:
                    return f"it was not up within {_START_S:.0f} s"
                continue
            self._settled.set()
            if silent > _SILENT_S:
                return f"its process has been silent for {silent:.0f} s"
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with suppress(ProcessLookupError):  # what it started, too
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
