"""One tritonserver process: start, log, stop, and nothing left behind.

The process gets a session of its own, so that a Ctrl-C reaches the launcher alone and the Python stubs, which
outlive a killed server, can be ended with it. Its shared memory carries a prefix of its own and is removed
with it too.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blockzoo.server_config.documents import WARNING_MARK
from blockzoo.server_config.environment import Tritonserver
from blockzoo.server_config.front import DRAIN_FILE

_SHM = Path("/dev/shm")
# An idle server needs about 2 s to end, but waits its whole exit timeout for idle HTTP connections. Its
# requests have ended by then, so nothing is lost where it is cut short.
_EXIT_GRACE_S = 3.0
_TAIL_LINES = 400
# on a machine without a GPU each ensemble logs one of these as an error
_NOISE = ("unable to create stream", "CudaDriverHelper has not been initialized")
_LOAD_FAILURE = re.compile(r"failed to load '([^']+)' version \d+: \w+: (.*?)(?:\\n|\"$)")
_WARNING = re.compile(rf'W\d{{4}} .*?{WARNING_MARK}(.*?)"?$')


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the server listens."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def client_host(self) -> str:
        """The address for a client on this machine."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    @property
    def http(self) -> str:
        """Base URL of the HTTP endpoint, for a client on this machine."""
        return f"http://{self.client_host}:{self.http_port}"

    @property
    def grpc(self) -> str:
        """host:port of the gRPC endpoint, likewise."""
        return f"{self.client_host}:{self.grpc_port}"


OPERATOR_KEY = "BLOCKZOO_OPERATOR_KEY"
"""Environment variable: who sends its value may use the operators' protocols, as perf_analyzer does for
statistics (`-H triton-grpc-protocol-locked:KEY`). Unset: nobody may."""

_OPERATORS_APIS = "shared-memory,model-repository,logging,trace,statistics"


def server_arguments(
    repository: Path, endpoints: Endpoints, drain_s: float, follows: bool = False
) -> list[str]:
    """The flags of tritonserver that the repository counts on; `follows`: it may change."""
    # a client would read others' tensors, stop models or hush the log: for whoever started this, if anybody
    locked = f"{_OPERATORS_APIS}:locked={os.environ.get(OPERATOR_KEY) or secrets.token_urlsafe(32)}"
    polling = ["--model-control-mode=poll", "--repository-poll-secs=1"] if follows else []
    return [
        *polling,
        f"--model-repository={repository}",
        f"--http-address={endpoints.host}",
        f"--http-port={endpoints.http_port}",
        f"--grpc-address={endpoints.host}",
        f"--grpc-port={endpoints.grpc_port}",
        f"--metrics-address={endpoints.host}",
        f"--metrics-port={endpoints.metrics_port}",
        f"--exit-timeout-secs={max(1, round(drain_s))}",
        f"--http-restricted-api={locked}",
        f"--grpc-restricted-protocol={locked}",
        "--disable-auto-complete-config",  # half a second per Python model
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",
    ]


class TritonProcess:
    """A running tritonserver with its Python stubs.

    Args:
        server: the binary and its environment.
        arguments: of the server.
        control_dir: folder that the engine model watches for the drain file.
        verbose: pass all log lines on, instead of errors alone.

    Must be made in the main thread: the server is told to end when the thread that started it does.
    """

    def __init__(
        self, server: Tritonserver, arguments: list[str], control_dir: Path, verbose: bool = False
    ) -> None:
        self._drain_file = control_dir / DRAIN_FILE
        self._drain_file.unlink(missing_ok=True)
        self._shm_prefix = f"blockzoo-{os.getpid()}-{secrets.token_hex(4)}-"
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._verbose = verbose
        self.forward_errors = False
        """Pass error lines on; before the server serves they are kept for `failure` alone."""
        self._killed = False
        prefix = f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}"
        self._process = subprocess.Popen(
            [*server.command, *arguments, prefix],
            env=server.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        self._log_thread = threading.Thread(target=self._read_log, name="tritonserver-log", daemon=True)
        self._log_thread.start()

    @property
    def running(self) -> bool:
        """Whether the server process lives (its models may not)."""
        return self._process.poll() is None

    def failure(self) -> str:
        """Why the server has ended, from its log."""
        self._log_thread.join(timeout=2)
        lines = list(self._tail)
        for line in lines:
            match = _LOAD_FAILURE.search(line)
            if match:
                return f"the server could not load {match[1]}: {match[2]}"
        errors = [line for line in lines if _is_error(line)] or lines[-10:]
        return "the server ended:\n" + "\n".join(errors[-10:])

    def stop(self, drain_s: float, unfinished: Callable[[], int | None]) -> bool:
        """End the server: new requests are refused, running ones finish within `drain_s`.

        Args:
            unfinished: requests under way, None when that cannot be known (any more).

        Returns:
            Whether all requests had ended in time.
        """
        temporary = self._drain_file.with_suffix(".tmp")
        temporary.write_text(str(drain_s))
        temporary.rename(self._drain_file)
        deadline = time.monotonic() + drain_s + 2.0  # the engine model ends the last ones itself
        left: int | None = None
        while self.running and time.monotonic() < deadline:
            left = unfinished()
            if not left:
                break
            time.sleep(0.1)
        if self.running:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_GRACE_S)
        self.kill()
        return not left

    def kill(self) -> None:
        """End the server and its stubs at once and remove their shared memory."""
        if self._killed:  # the process group's number may have another owner by now
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._killed = True
        self._log_thread.join(timeout=2)
        for region in _SHM.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                line = line.rstrip("\n")
                self._tail.append(line)
                warning = _WARNING.match(line)
                if warning and not self._verbose:
                    print(f"zoo-serve: {warning[1]}", file=sys.stderr, flush=True)
                if self._verbose or (self.forward_errors and _is_error(line)):
                    print(line if self._verbose else line.replace("\\n", "\n"), file=sys.stderr, flush=True)


def _is_error(line: str) -> bool:
    return re.match(r"E\d{4} ", line) is not None and not any(noise in line for noise in _NOISE)


def end_with_parent() -> None:
    """Runs in the child: a launcher that is killed takes the server along, which ends in its orderly way."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
