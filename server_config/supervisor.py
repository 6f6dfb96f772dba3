"""Keeps one server up until a signal comes: probes it, starts it again, waits longer each time that fails.

It never gives up while it runs: what keeps a server from starting (a zoo that is being written, memory that
is short, a port in use) may pass, and nobody else would start it then. Only the first start, where most
causes are in the configuration, ends in an error.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blockzoo.server_config.environment import ServerError
from blockzoo.server_config.follow import Follower
from blockzoo.server_config.launcher import TritonProcess
from blockzoo.server_config.watchdog import UnhealthyError, Watchdog
from blockzoo.zoo.errors import ZooError

_PROBE_EVERY_S = 1.0
_LONGEST_WAIT_S = 60.0
NOT_ALL_SERVED = 3  # exit status of a server that ended well, but left models of its zoo out
_HEALTHY_S = 300.0  # a server that served as long had nothing to do with the failure before


class Backoff:
    """How long to wait before a start: not at all after the first failure, then 1, 2, 4 ... up to 60 s."""

    def __init__(self) -> None:
        self._failures = 0
        self._serving_since: float | None = None

    def serving(self, now: float) -> None:
        """A server began to serve at `now`, in seconds."""
        self._serving_since = now

    def failed(self, now: float) -> float:
        """A server failed, or did not start; the seconds to wait."""
        if self._serving_since is not None and now - self._serving_since >= _HEALTHY_S:
            self._failures = 0
        self._serving_since = None
        self._failures += 1
        # bounded before it is raised to the power: there is no last failure
        return 0.0 if self._failures == 1 else min(_LONGEST_WAIT_S, 2.0 ** min(self._failures - 2, 10))


class StopSignal:
    """Set by SIGINT and SIGTERM, and waited for by the main thread, in which handlers run.

    Python runs a handler between two instructions: a signal that comes right before a wait begins is noted,
    and its handler would run behind the wait. So the note itself, a byte in a pipe, ends it.
    """

    def __init__(self) -> None:
        self._set = False
        self._readable, self._writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals set it, another one then raises KeyboardInterrupt; at the end handlers are as before."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._on_signal) for number in numbers]
        wakeup = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._set:
            raise KeyboardInterrupt
        self._set = True

    def is_set(self) -> bool:
        """Whether a signal came."""
        return self._set

    def wait(self, timeout_s: float) -> bool:
        """Until a signal comes, or the time is over; whether it is set."""
        if not self._set and select.select([self._readable], [], [], timeout_s)[0]:
            os.read(self._readable, 4096)
        return self._set

    def __del__(self) -> None:
        os.close(self._readable)
        os.close(self._writable)


class Supervisor:
    """Runs in the main thread.

    Args:
        start: starts a server process.
        drain_s: seconds that running requests have at the end.
    """

    def __init__(
        self, start: Callable[[], TritonProcess], watchdog: Watchdog, follower: Follower, drain_s: float
    ) -> None:
        self._start = start
        self._watchdog, self._follower = watchdog, follower
        self._drain_s = drain_s
        self._stop = StopSignal()
        self._backoff = Backoff()
        self._told: str | None = None  # last of what went wrong in following the zoo

    def run(self, on_ready: Callable[[], None]) -> int:
        """Serve; the exit status. Raises ServerError, ZooError when the first start fails."""
        with self._stop.listening():
            return self._run(on_ready)

    def _run(self, on_ready: Callable[[], None]) -> int:
        self._process = self._start()
        try:
            self._wait_until_serving()
            if not self._stop.is_set():
                on_ready()
            while not self._stop.wait(_PROBE_EVERY_S):
                problem = self._watchdog.problem() if self._process.running else self._process.failure()
                if problem is None:
                    self._follow()
                else:
                    self._restart(problem)
            if not self._process.running:
                say("stopping: no server was up")
                return 1
            say("stopping: running requests finish first, a second signal ends them")
            drained = self._process.stop(self._drain_s, self._watchdog.unfinished)
            left_out = self._follower.left_out
            if left_out:
                say(f"not all models were served; left out: {', '.join(sorted(left_out))}")
            return 1 if not drained else NOT_ALL_SERVED if left_out else 0
        except KeyboardInterrupt:
            return 130
        finally:
            self._process.kill()

    def _restart(self, problem: str) -> None:
        """Until a server serves again, or a signal comes."""
        began = time.monotonic()
        while not self._stop.is_set():
            self._process.kill()
            wait = self._backoff.failed(time.monotonic())
            say(f"{problem}\nrestarting the server" + (f" in {wait:g} s" if wait else ""))
            if self._stop.wait(wait):
                return
            try:
                self._process = self._start()
                self._wait_until_serving()
            except (ZooError, OSError) as error:
                problem = str(error)
                continue
            if not self._stop.is_set():
                say(f"serving again after {time.monotonic() - began:.1f} s")
            return

    def _follow(self) -> None:
        """Take over what has changed in the zoo."""
        try:
            change = self._follower.follow()
        except (ZooError, OSError) as error:  # it is tried again, and told once
            if str(error) != self._told:
                say(f"the change of the zoo is not served: {error}")
            self._told = str(error)
            return
        if change is not None:
            self._told = None
            self._watchdog.tenant = change.tenants[0] if change.tenants else ""
            for message in change.messages:
                say(message)

    def _settle(self) -> None:
        """Learn which models the engine serves. Raises ServerError."""
        try:
            self._follower.settle()
        except (OSError, UnhealthyError) as error:
            raise ServerError(f"the server started, but its engine does not answer: {error}") from None
        if not self._follower.tenants:
            raise ServerError("no model is served:\n" + "\n".join(self._follower.left_out.values()))
        self._watchdog.tenant = self._follower.tenants[0]

    def _wait_until_serving(self) -> None:
        while not self._watchdog.ready():
            if not self._process.running:
                raise ServerError(self._process.failure())
            if self._stop.wait(0.1):
                return
        self._settle()
        self._watchdog.self_test()
        self._process.forward_errors = True
        self._backoff.serving(time.monotonic())


def say(message: str) -> None:
    """Tell whoever runs the server."""
    print(f"zoo-serve: {message}", file=sys.stderr, flush=True)
