"""What goes wrong under load: killed processes, a full disk, damaged files, slow clients, the end.

Every request gets an answer that is right or an error, none hangs, and the server heals in time.
FAULTS_JSON names the file for the report.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from guests import make_variants, zoo_compile
from processes import held_by_role, save_json
from traffic import WELL, Answers, Guest, Sent, Traffic, make_prompts

from blockzoo.zoo.store import Zoo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HEALED_WITHIN_S = 45.0  # about 4 s on an idle machine; with the wait before a start
TENANTS = ("base", "notes", "solver")
OPTIONS = ("--precision", "f32", "--enable-lora", "--kv-cache-gb", "0.04", "--max-model-len", "1024")


@pytest.fixture(scope="module")
def variants(demo_family, tmp_path_factory):
    return make_variants(demo_family["notes"], tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def answers(demo_zoo, variants, tmp_path_factory):
    known = tmp_path_factory.mktemp("known") / "zoo"
    shutil.copytree(demo_zoo, known)
    zoo_compile(known, *(f"{name}={folder}@base" for name, folder in variants.items()))
    return Answers(known, [*TENANTS, *variants], make_prompts(16))


@pytest.fixture
def zoo(demo_zoo, tmp_path):
    return Path(shutil.copytree(demo_zoo, tmp_path / "zoo"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What each test tried and what came of it, written at the end."""
    faults: dict[str, dict] = {}
    yield faults
    save_json("FAULTS_JSON", tmp_path_factory.mktemp("report") / "faults.json", {"faults": faults})


@pytest.fixture
def load(answers):
    """Start clients; those of a test that failed are stopped too."""
    with ExitStack() as running:

        def start(server, **settings) -> Traffic:
            traffic = Traffic(server, answers, TENANTS, pause_s=0.2, **settings)
            return running.enter_context(traffic)

        yield start


def summary(traffic: Traffic, **more) -> dict:
    said = Counter(f"{s.outcome}: {s.said[:120]}" for s in traffic.not_well())
    slowest = round(max(sent.ended - sent.began for sent in traffic.sent), 2)
    outcomes = dict(traffic.outcomes())
    return {**more, "requests": len(traffic.sent), "outcomes": outcomes, "slowest_s": slowest, "said": said}


def never(traffic: Traffic, *outcomes: str) -> None:
    found = [sent for sent in traffic.sent if sent.outcome in outcomes]
    assert not found, found[:3]


def healed(server, times: int) -> None:
    """Until the server serves again for that many times."""
    server.wait_for(lambda: sum("serving again" in line for line in server.err) >= times, HEALED_WITHIN_S)


def at_rest(server) -> bool:
    metrics = server.metrics()
    return all(metrics[f"blockzoo_{n}"] == 0 for n in ("requests_running", "requests_waiting", "pages_used"))


def wait_until(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)


def test_each_process_is_killed_in_turn(serve_zoo, zoo, load, report):
    """The models, the server, at last the launcher, which takes all along."""
    server = serve_zoo(zoo, *OPTIONS)
    traffic = load(server, clients=6)
    outages: list[tuple[float, float]] = []
    took = {}
    for victim in ("blockzoo", "blockzoo_unary", "preprocessing", "postprocessing", "tritonserver"):
        time.sleep(3)
        killed_at = time.monotonic()
        os.kill(server.processes()[victim], signal.SIGKILL)
        healed(server, len(outages) + 1)
        outages.append((killed_at, time.monotonic()))
        took[victim] = round(time.monotonic() - killed_at, 1)
    time.sleep(3)
    assert len(server.shared_memory()) == 4, "one region per Python model, none of a killed server"
    pids = server.processes()
    ended_at = time.monotonic()
    server.process.kill()
    del pids["launcher"]  # a zombie until it is waited for
    wait_until(  # it ends in its orderly way, which has 30 s for what runs
        lambda: not server.shared_memory() and not any(Path(f"/proc/{p}").exists() for p in pids.values()), 45
    )
    traffic.stop()
    server.stop(None)
    report["kill -9 of each process in turn"] = summary(traffic, seconds_until_served_again=took)

    def excused(sent: Sent) -> bool:
        ends = [*outages, (ended_at, float("inf"))]
        return any(sent.ended >= began and sent.began <= over for began, over in ends)

    never(traffic, "hung", "wrong")
    assert [sent for sent in traffic.not_well() if not excused(sent)] == []
    assert traffic.outcomes()["right"] > 50


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file of all that is left there."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(b"x" * size)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (folder / "probe").write_bytes(b"x")
    (folder / "probe").unlink(missing_ok=True)
    return filler


def test_a_full_disk(serve_zoo, demo_zoo, load, variants, small_disk, report):
    """The zoo and the server's own files on it: what is served goes on, what was refused works later."""
    zoo, scratch = small_disk / "zoo", small_disk / "tmp"
    shutil.copytree(demo_zoo, zoo)
    scratch.mkdir()
    guests = {"guest": Guest(None, True)}
    server = serve_zoo(zoo, *OPTIONS, scratch=scratch)
    traffic = load(server, clients=4, guests=guests, variants=list(variants))
    kept = (zoo / "manifest.json").read_bytes()
    filler = fill(small_disk)
    refused = zoo_compile(zoo, f"guest={variants['variant0']}@base", check=False)
    assert (refused.returncode, "No space left on device" in refused.stderr) == (1, True), refused.stderr
    assert (zoo / "manifest.json").read_bytes() == kept
    time.sleep(2)

    filler.unlink()
    guests["guest"] = Guest(None, False)
    zoo_compile(zoo, f"guest={variants['variant0']}@base")
    server.wait_for(lambda: any("added guest" in line for line in server.err), 30)
    server.wait_for(lambda: server.post("guest", {"text_input": "x", "max_tokens": 1})[0] == 200, 30)
    guests["guest"] = Guest("variant0", True)
    time.sleep(2)

    filler = fill(small_disk)
    guests["guest"] = Guest("variant0", False)
    zoo_compile(zoo, "--remove", "guest")  # there is always room for that
    server.wait_for(lambda: any("removed guest" in line for line in server.err), 30)
    server.wait_for(lambda: server.post("guest", {"text_input": "x", "max_tokens": 1})[0] == 404, 30)
    guests["guest"] = Guest(None, True)
    time.sleep(2)
    never(traffic, "hung", "wrong", "error", "cut")

    filler = fill(small_disk)
    killed_at = time.monotonic()
    os.kill(server.server_pid(), signal.SIGKILL)
    time.sleep(5)
    filler.unlink()
    healed(server, 1)
    since = time.monotonic()
    time.sleep(3)
    traffic.stop()
    server.wait_for(lambda: at_rest(server), 30)
    report["full disk"] = summary(traffic, seconds_until_served_again=round(since - killed_at, 1))
    never(traffic, "hung", "wrong")
    assert [s for s in traffic.not_well() if s.ended < killed_at or s.began > since] == []
    assert server.stop() == 0


def damage(file: Path) -> None:
    """Change a byte of its weights; whoever has the file open keeps the old one."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x55
    shutil.copy(file, file.with_name("whole"))
    damaged = file.with_name("damaged")
    damaged.write_bytes(content)
    damaged.rename(file)


def mend(file: Path) -> None:
    file.with_name("whole").rename(file)


def test_damaged_blocks_while_serving_and_reloading(
    serve_zoo, zoo, load, answers, variants, tmp_path, report
):
    """What is loaded goes on; a LoRA that comes damaged is told by name and hurts nobody else."""
    server = serve_zoo(zoo, *OPTIONS)
    traffic = load(server, clients=4)
    manifest = Zoo.open(zoo).manifest
    served = zoo / "blocks" / f"{manifest.models['solver'].chain[-2]}.safetensors"
    damage(served)
    time.sleep(3)

    ahead = tmp_path / "ahead"
    shutil.copytree(zoo, ahead)
    mend(ahead / "blocks" / served.name)
    zoo_compile(ahead, f"guest={variants['variant1']}@base")
    added = Zoo.open(ahead).manifest.models["guest"].adapters.values()
    files = [ahead / "blocks" / f"{key}.safetensors" for key in added]
    damage(files[0])
    for file in files:
        shutil.copy(file, zoo / "blocks")
    shutil.copy(ahead / "manifest.json", zoo / "manifest.new")
    (zoo / "manifest.new").rename(zoo / "manifest.json")
    server.wait_for(lambda: any("guest" in line for line in server.err), 30)
    probe = {"text_input": "x", "model": "guest", "max_tokens": 2}
    said = [server.post("blockzoo", probe) for _ in range(5)]
    assert all(
        (status == 400 and "guest" in answer["error"]) or files[0].name in answer["error"]
        for status, answer in said
    ), said
    time.sleep(3)

    mend(files[0])
    shutil.copy(files[0], zoo / "blocks" / "new")
    (zoo / "blocks" / "new").rename(zoo / "blocks" / files[0].name)
    mend(served)
    os.utime(zoo / "manifest.json")
    server.wait_for(lambda: server.post("blockzoo", probe)[0] == 200, 30)
    # Triton has its ensemble a moment later
    server.wait_for(lambda: server.post("guest", {"text_input": "x", "max_tokens": 1})[0] == 200, 30)
    once = Traffic(server, answers, [], guests={"guest": Guest("variant1", True)}, seed=3)
    for i in range(8):
        once.burst(1, i)
    traffic.stop()
    report["damaged blocks"] = summary(traffic, said=said[0][1]["error"])
    assert once.outcomes() == {"right": 8}, once.sent
    assert traffic.not_well() == []
    assert not any("restarting" in line for line in server.err)
    assert server.stop() == 0


def _connect(server) -> socket.socket:
    """With a window so small that the server cannot send far ahead."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", server.http_port))
    return client


def test_slow_clients(serve_zoo, zoo, load, report):
    """A byte a second in, nothing read out: others are served as ever, and all comes back at the end."""
    server = serve_zoo(zoo, *OPTIONS)
    traffic = load(server, clients=4)
    time.sleep(5)
    before, pids = held_by_role(server), server.processes()
    began, seconds, count = time.monotonic(), 20, 30
    body = json.dumps(
        {"text_input": "x", "max_tokens": 900, "stream": True, "sampling_parameters": '{"ignore_eos": true}'}
    )
    with ExitStack() as clients:
        slow = [clients.enter_context(_connect(server)) for _ in range(count)]
        for i in range(count):
            head = f"POST /v2/models/{TENANTS[i % 3]}/generate_stream HTTP/1.1\r\nHost: x\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            clients.enter_context(_connect(server)).sendall((head + body).encode())
        for i in range(seconds):
            assert not any("restarting" in line for line in server.err), server.err
            for client in list(slow):
                try:
                    client.sendall(head[i : i + 1].encode())
                except OSError:  # Triton's HTTP threads close some, with all processes well: see the docs
                    slow.remove(client)
            time.sleep(1)
        over = time.monotonic()
    time.sleep(2)
    traffic.stop()
    server.wait_for(lambda: at_rest(server), 120)
    server.wait_for(lambda: held_by_role(server)["tritonserver"].files <= before["tritonserver"].files, 30)
    beside = [sent for sent in traffic.sent if began <= sent.began <= over]
    counts = {"slow_senders": count, "of_these_closed": count - len(slow), "readers_that_stop": count}
    report["slow clients"] = summary(traffic, **counts, beside=len(beside))
    assert len(slow) > count / 2
    assert server.processes() == pids, "a process was replaced"
    assert {sent.outcome for sent in traffic.sent} <= WELL, traffic.not_well()[:3]
    assert any(sent.outcome == "right" for sent in beside)  # how many hangs on what else the machine does
    assert not any("restarting" in line for line in server.err)
    assert server.stop() == 0


def test_sigterm_under_load(serve_zoo, zoo, load, report):
    """What runs is finished, what comes later is told, nothing hangs."""
    server = serve_zoo(zoo, *OPTIONS)
    traffic = load(server, clients=30)
    time.sleep(5)
    told_at = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.stop(None, timeout=60) == 0
    took = time.monotonic() - told_at
    traffic.stop()
    running = [s for s in traffic.sent if s.began < told_at - 0.5 and s.ended > told_at]
    refused = Counter("shutting down" in s.said for s in traffic.sent if s.outcome == "error")
    report["SIGTERM"] = summary(traffic, seconds=round(took, 1), running=len(running), told=refused[True])
    never(traffic, "hung", "wrong")
    assert running
    assert [s for s in running if s.outcome not in WELL] == []
    assert [s for s in traffic.not_well() if s.ended < told_at] == []
    assert server.shared_memory() == []
