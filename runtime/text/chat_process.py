"""The processes in which chat templates are rendered: started when needed, reused, replaced when they end."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockzoo.runtime.api.errors import InvalidRequestError, OverloadedError, PromptTooLongError, RequestError
from blockzoo.runtime.text.chat_worker import CPU_SECONDS, MAX_OUTPUT_CHARS, MEMORY_BYTES

MAX_PROCESSES = 4
WAIT_SECONDS = 20.0
"""For a process to be free, or for an earlier text of the same template."""
_MAX_ANSWER_BYTES = 6 * MAX_OUTPUT_CHARS + 4096  # a character may be written as \\uXXXX


class RenderProcesses:
    """At most MAX_PROCESSES of `chat_worker`. Thread-safe."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(MAX_PROCESSES)
        self._idle: list[subprocess.Popen[bytes]] = []
        self._all: set[subprocess.Popen[bytes]] = set()

    def render(
        self,
        template: str,
        messages: list[dict[str, Any]],
        special_tokens: Mapping[str, str],
        variables: Mapping[str, Any],
    ) -> str:
        """As `chat_worker.render`. Raises RequestError: it failed, or used up its time or memory."""
        request = {
            "text": template,
            "messages": messages,
            "special_tokens": special_tokens,
            "variables": variables,
        }
        line = json.dumps(request).encode() + b"\n"
        if not self._free.acquire(timeout=WAIT_SECONDS):
            raise OverloadedError("all processes that render chat templates are busy; try again later")
        try:
            return _text_of(self._ask(line))
        finally:
            self._free.release()

    def close(self) -> None:
        """End all processes."""
        for process in tuple(self._all):
            self._end(process)

    def _ask(self, line: bytes) -> dict[str, Any]:
        try:
            process, fresh = self._idle.pop(), False
        except IndexError:
            process, fresh = self._start(), True
        written = False
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line)
            process.stdin.flush()
            written = True
            read = process.stdout.readline(_MAX_ANSWER_BYTES)
            if read.endswith(b"\n"):
                answer: dict[str, Any] = json.loads(read)
                if answer.get("error") == "memory":
                    self._end(process)
                else:
                    self._idle.append(process)
                return answer
        except BrokenPipeError:
            pass
        except BaseException:
            self._end(process)
            raise
        code = self._end(process)
        if not fresh and not written:  # it ended while it was idle
            return self._ask(line)
        return {"error": "ended", "message": str(code)}

    def _start(self) -> subprocess.Popen[bytes]:
        script = str(Path(__file__).with_name("chat_worker.py"))
        environment = {"TZ": os.environ["TZ"]} if "TZ" in os.environ else {}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", script, *(path for path in sys.path if path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise RequestError(f"the process that renders chat templates does not start: {error}") from error
        self._all.add(process)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        self._all.discard(process)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(1.0)  # of itself: its input has ended
        process.kill()
        return process.wait()


def _text_of(answer: dict[str, Any]) -> str:
    if isinstance(answer.get("text"), str):
        return str(answer["text"])
    kind, said = answer.get("error"), answer.get("message")
    if kind == "raised":
        raise InvalidRequestError(f"the chat template refuses these messages: {said}")
    if kind == "failed":
        raise InvalidRequestError(
            f"the chat template fails on these messages ({said}): it may expect other roles or fields"
        )
    if kind == "syntax":
        raise InvalidRequestError(
            f"the model's chat template is no valid template ({said}): mend chat_template.jinja in the "
            "model's folder and compile the model again"
        )
    if kind == "length":
        raise PromptTooLongError(
            f"the chat template makes more than {MAX_OUTPUT_CHARS} characters of these messages; send less"
        )
    if kind == "memory":
        raise InvalidRequestError(
            f"the chat template needs more than {MEMORY_BYTES >> 20} MiB for these messages; send less"
        )
    if said in (str(-signal.SIGPROF), str(-signal.SIGALRM)):
        raise InvalidRequestError(
            f"the chat template takes more than {CPU_SECONDS:g} s for these messages; send less"
        )
    raise InvalidRequestError(f"the process that renders the chat template ended with code {said}; send less")


_of_process: dict[int, RenderProcesses] = {}


def render_processes() -> RenderProcesses:
    """Those of this process; a fork starts its own."""
    return _of_process.setdefault(os.getpid(), RenderProcesses())


@atexit.register
def _close() -> None:
    if os.getpid() in _of_process:
        _of_process[os.getpid()].close()
