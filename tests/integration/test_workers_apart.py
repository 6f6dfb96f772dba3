"""Workers on two nodes of a Ray, one of them in a network namespace of its own, of which the link is cut.

Needs root, who may make namespaces.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SPACE, NEAR, FAR = "blockzoo-test", "bz-near", "bz-far"
HERE, THERE = "10.177.0.1", "10.177.0.2"
MAKE = (
    f"ip netns add {SPACE}",
    f"ip link add {NEAR} type veth peer name {FAR}",
    f"ip link set {FAR} netns {SPACE}",
    f"ip addr add {HERE}/24 dev {NEAR}",
    f"ip link set {NEAR} up",
    f"ip netns exec {SPACE} ip addr add {THERE}/24 dev {FAR}",
    f"ip netns exec {SPACE} ip link set {FAR} up",
    f"ip netns exec {SPACE} ip link set lo up",
)
FIRST_NODE = """
import sys
import ray
options = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
ray.init(_node_ip_address=sys.argv[1], _temp_dir=sys.argv[2], **options)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
DRIVER = """
import json, subprocess, sys, time
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams

zoo, address, here, near = sys.argv[1:]
settings = {"precision": "f32", "kv_cache_bytes": 32 << 20, "num_threads": 1}


def answers(engine, max_tokens, cut_at=0):
    found = {model: [] for model in engine.models}
    for model in engine.models:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        engine.add_request(model, model, list(range(5, 90)), params)
    step = 0
    while engine.has_unfinished():
        step += 1
        if step == cut_at:
            subprocess.run(["ip", "link", "set", near, "down"], check=True)
        for output in engine.step():
            assert output.error is None, output.error
            found[output.request_id] += output.token_ids
    return found


def say(**what):
    print(json.dumps(what), flush=True)


expected = answers(LLMEngine(zoo, EngineConfig(**settings)), 30)
engine = LLMEngine(zoo, EngineConfig(workers=2, ray_address=address, worker_interface=here, **settings))
group = engine._zoo.workers.group
say(addresses=[worker.address for worker in group._workers], equal=answers(engine, 30) == expected)
sys.stdin.readline()  # there is another node
start = time.monotonic()
equal = answers(engine, 30, cut_at=5) == expected
say(addresses=[worker.address for worker in group._workers], equal=equal, seconds=time.monotonic() - start)
engine.close()
"""


@pytest.fixture
def link() -> Iterator[None]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root, and ip of iproute2")
    pytest.importorskip("ray", reason="the extra cluster is not installed")
    try:
        for command in MAKE:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr}")
        yield
    finally:
        for command in (f"ip link del {NEAR}", f"ip netns del {SPACE}"):
            subprocess.run(command.split(), capture_output=True)


def node(address: str, own: str, environment: dict[str, str], *prefix: str) -> subprocess.Popen[bytes]:
    """Another node of a Ray."""
    sizes = ["--num-cpus=1", f"--object-store-memory={100 << 20}"]
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--address={address}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        [*prefix, *command, f"--node-ip-address={own}", *sizes],
        **quiet,
        start_new_session=True,
        env=environment,
    )


def told(lines: Iterable[str]) -> dict[str, Any]:
    """What the driver says next; Ray says this and that between."""
    return next(json.loads(line) for line in lines if line.startswith("{"))


@pytest.mark.timeout(400)
def test_a_machine_is_cut_off(demo_zoo: Path, link: None) -> None:
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    temporary = "/tmp/bz-test"  # sockets are in it, whose paths have at most 107 bytes
    processes: list[subprocess.Popen[Any]] = []
    first = subprocess.Popen([sys.executable, "-c", FIRST_NODE, HERE, temporary], env=environment, **pipes)
    try:
        assert first.stdout is not None
        address = first.stdout.readline().strip()
        processes.append(node(address, THERE, environment, "ip", "netns", "exec", SPACE))
        arguments = [str(demo_zoo), address, HERE, NEAR]
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments], env=environment, start_new_session=True, **pipes
        )
        processes.append(driver)
        assert driver.stdin is not None
        assert driver.stdout is not None
        with driver.stdin, driver.stdout:
            before = told(driver.stdout)
            assert before["equal"]
            hosts = sorted(each.split(":")[1].strip("/") for each in before["addresses"])
            assert hosts == [HERE, THERE]
            processes.append(node(address, HERE, environment))
            driver.stdin.write("\n")
            driver.stdin.flush()
            after = told(driver.stdout)
            assert after["equal"]
            assert all(HERE in each for each in after["addresses"])
            assert driver.wait(60) == 0
    finally:
        for process in processes:  # without a link they would take their time
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        first.communicate(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)
