"""The supervisor never gives up, waits longer each time, and ends at once when it is told to."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from blockzoo.server_config import supervisor
from blockzoo.server_config.environment import ServerError
from blockzoo.server_config.supervisor import Backoff, Supervisor
from blockzoo.zoo.errors import ZooError


class Process:
    """A server process that serves for some probes and then is gone."""

    def __init__(self, probes: float = 0) -> None:
        self.probes, self.killed, self.stopped, self.forward_errors = probes, 0, 0, False

    @property
    def running(self) -> bool:
        self.probes -= 1
        return self.probes >= 0 and not self.killed

    def failure(self) -> str:
        return "the server ended"

    def kill(self) -> None:
        self.killed += 1

    def stop(self, drain_s, unfinished) -> bool:
        self.stopped += 1
        return True


class Dog:
    """Finds every server well."""

    tenant = ""

    def ready(self) -> bool:
        return True

    def self_test(self) -> None:
        pass

    def problem(self) -> None:
        return None

    def unfinished(self) -> int:
        return 0


class Followed:
    """What the engine serves of a zoo."""

    def __init__(self, follow=lambda: None) -> None:
        self.follow, self.tenants, self.left_out = follow, ("chat",), {}

    def settle(self) -> None:
        pass


class Run:
    """A supervisor over scripted starts, whose waits are recorded instead of waited for."""

    def __init__(self, monkeypatch, *starts, follow=lambda: None) -> None:
        self.starts, self.started, self.waits = list(starts), [], []
        self.followed = Followed(follow)
        self.supervisor = Supervisor(self.start, Dog(), self.followed, 1.0)
        self.is_ready = 0
        monkeypatch.setattr(self.supervisor._stop, "wait", self.wait)

    def start(self):
        if not self.starts:  # the script is over
            self.supervisor._stop._on_signal(signal.SIGTERM, None)
            return Process(2)
        made = self.starts.pop(0)
        if isinstance(made, Exception):
            raise made
        self.started.append(made)
        return made

    def wait(self, seconds: float) -> bool:
        if seconds != supervisor._PROBE_EVERY_S or self.is_ready > 1:
            self.waits.append(seconds)
        return self.supervisor._stop.is_set()

    def run(self) -> int:
        def ready() -> None:
            self.is_ready += 1

        return self.supervisor.run(ready)


def test_waits_double_up_to_a_minute_and_begin_anew_after_a_healthy_time():
    backoff = Backoff()
    backoff.serving(0.0)
    assert [backoff.failed(float(now)) for now in range(10)] == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    backoff.serving(1000.0)
    assert backoff.failed(1299.0) == 60
    backoff.serving(2000.0)
    assert [backoff.failed(2300.0), backoff.failed(2301.0)] == [0, 1]
    assert {backoff.failed(2302.0) for _ in range(5000)} == {2, 4, 8, 16, 32, 60}


def test_a_server_that_keeps_dying_is_started_again_and_again(monkeypatch, capsys):
    run = Run(monkeypatch, *(Process() for _ in range(50)))
    run.run()
    assert len(run.started) == 50
    assert all(process.killed for process in run.started)
    said = capsys.readouterr().err
    assert said.count("the server ended\nrestarting the server") == 50
    assert said.count("serving again") == 49
    assert "restarting the server in 60 s" in said


def test_a_start_that_fails_is_tried_again(monkeypatch, capsys):
    errors = [ZooError("manifest.json: not JSON"), ServerError("could not load"), OSError("no memory")]
    run = Run(monkeypatch, Process(), *errors, Process(3))
    run.run()
    said = capsys.readouterr().err
    for error, wait in zip(errors, ("1", "2", "4"), strict=True):
        assert f"{error}\nrestarting the server in {wait} s" in said
    assert said.count("serving again") == 1


@pytest.mark.parametrize("error", [ZooError("no zoo"), ServerError("could not load blockzoo")])
def test_the_first_start_fails_with_its_error(monkeypatch, error):
    with pytest.raises(type(error), match=str(error)):
        Run(monkeypatch, error).run()


def test_a_first_server_that_does_not_come_up_is_an_error(monkeypatch):
    run = Run(monkeypatch, Process())
    monkeypatch.setattr(Dog, "ready", lambda self: False)
    with pytest.raises(ServerError, match="the server ended"):
        run.run()
    assert run.started[0].killed


def test_a_zoo_that_cannot_be_followed_ends_nothing(monkeypatch, capsys):
    def follow() -> None:
        raise OSError("No space left on device")

    run = Run(monkeypatch, Process(5), follow=follow)
    run.run()
    said = capsys.readouterr().err
    assert said.count("the change of the zoo is not served: No space left on device") == 1


WAITS = """
import os, random, signal, sys, time
from blockzoo.server_config.supervisor import StopSignal

number, waiter = signal.Signals[sys.argv[1]], os.getpid()
readable, writable = os.pipe()
if not os.fork():  # the one that sends
    os.close(writable)
    while os.read(readable, 1):
        moment = time.monotonic() + random.uniform(0, 1e-4)
        while time.monotonic() < moment:
            pass
        os.kill(waiter, number)
    os._exit(0)
for _ in range(2000):
    stop = StopSignal()
    with stop.listening():
        os.write(writable, b"!")
        assert stop.wait(3600)
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_wait_at_once_whenever_it_comes(number):
    """In a process of its own: who tests is not to be hit."""
    subprocess.run([sys.executable, "-c", WAITS, number], check=True, timeout=100)


def test_a_server_that_left_models_out_says_so_at_its_end(monkeypatch, capsys):
    run = Run(monkeypatch, Process(1))
    run.followed.left_out = {"hurt": "model hurt: its file is corrupt"}
    assert run.run() == supervisor.NOT_ALL_SERVED == 3
    assert "not all models were served; left out: hurt" in capsys.readouterr().err


def test_a_server_that_serves_no_model_is_an_error(monkeypatch):
    run = Run(monkeypatch, Process(1))
    run.followed.left_out, run.followed.tenants = {"hurt": "model hurt: its file is corrupt"}, ()
    with pytest.raises(ServerError, match="no model is served:\nmodel hurt: its file is corrupt"):
        run.run()
