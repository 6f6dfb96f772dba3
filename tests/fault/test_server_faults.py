"""Killed processes, signals, clients that vanish: the served zoo heals, ends in order and leaks nothing."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from patience import PATIENCE_S, wait_for

TENANTS = ("base", "notes", "solver")


def long_request(max_tokens: int, **inputs) -> dict:
    return {
        "text_input": "x",
        "stream": True,
        "max_tokens": max_tokens,
        "sampling_parameters": '{"ignore_eos": true}',
        **inputs,
    }


def answers(server) -> bool:
    try:
        return server.post("base", {"text_input": "x", "max_tokens": 2})[0] == 200
    except (OSError, http.client.HTTPException):
        return False


@pytest.fixture(scope="module")
def server(serve_zoo, demo_zoo):
    """It is killed in parts, and ends with the last test that takes it."""
    return serve_zoo(demo_zoo)


def num_heals(server) -> int:
    return sum("serving again" in line for line in server.err)


@pytest.mark.parametrize(
    "victim", ["blockzoo", pytest.param("preprocessing", marks=pytest.mark.slow), "tritonserver"]
)
def test_a_killed_process_is_replaced(server, victim):
    healed, before = num_heals(server), server.generate("base", "def f(x):")
    stream = server.open("blockzoo", long_request(4000, model="base"))
    response = stream.getresponse()
    response.read1(10)

    killed_at = time.monotonic()
    pid = server.server_pid() if victim == "tritonserver" else server.model_pid(victim)
    os.kill(pid, signal.SIGKILL)
    if victim != "preprocessing":  # where a stream may just have ended before the restart
        with pytest.raises((OSError, http.client.HTTPException)):
            response.read()
    stream.close()
    server.wait_for(lambda: num_heals(server) > healed)
    assert answers(server)
    assert time.monotonic() - killed_at < PATIENCE_S  # about 4 s on an idle machine
    assert server.generate("base", "def f(x):")["text_output"] == before["text_output"]

    regions = server.shared_memory()
    assert len(regions) == 4, "one region per Python model, none of the killed server"


@pytest.mark.slow
def test_a_server_killed_again_and_again_comes_back_each_time(serve_zoo, demo_zoo):
    server = serve_zoo(demo_zoo)
    for times in range(1, 5):
        os.kill(server.server_pid(), signal.SIGKILL)
        server.wait_for(lambda: num_heals(server) == times)  # noqa: B023
        assert answers(server)
    assert any("restarting the server in 2 s" in line for line in server.err)
    os.kill(server.server_pid(), signal.SIGKILL)
    server.wait_for(lambda: any("restarting the server in 8 s" in line for line in server.err))
    assert server.stop() == 1
    assert server.shared_memory() == []


def test_sigterm_lets_streams_finish(server):
    streams = [
        server.open("blockzoo", long_request(300, model=tenant))
        if i % 2
        else server.open(tenant, long_request(300))
        for i, tenant in enumerate([*TENANTS, *TENANTS, "base", "base"])
    ]
    responses = [stream.getresponse() for stream in streams]
    for response in responses:
        response.read1(10)
    # an idle connection must not hold up the end
    idle = http.client.HTTPConnection("127.0.0.1", server.http_port)
    idle.request("GET", "/v2/health/ready")
    idle.getresponse().read()

    server.process.send_signal(signal.SIGTERM)
    with ThreadPoolExecutor(len(responses)) as pool:
        texts = list(pool.map(lambda response: response.read().decode(), responses))
    assert server.stop(None) == 0
    idle.close()
    for stream in streams:
        stream.close()
    for text in texts:
        assert text.count("token_ids") in (299, 300), "the first event may have been read before"
        assert '"finish_reason":"length"' in text
    assert server.shared_memory() == []


def test_requests_that_outlast_the_drain_time_are_told(serve_zoo, demo_zoo):
    server = serve_zoo(demo_zoo, "--drain-seconds", "0.2")
    stream = server.open("blockzoo", long_request(4000, model="base"))
    response = stream.getresponse()
    response.read1(10)
    server.process.send_signal(signal.SIGINT)
    last = response.read().decode().strip().split("\n\n")[-1]
    stream.close()
    server.stop(None)
    event = json.loads(last.removeprefix("data: "))
    assert (event["finish_reason"], event["error"]) == ("abort", "the server is shutting down")


def test_a_killed_launcher_takes_its_server_along(serve_zoo, demo_zoo):
    server = serve_zoo(demo_zoo)
    processes = [server.server_pid(), server.model_pid("blockzoo"), server.model_pid("postprocessing")]
    server.process.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    wait_for(lambda: not server.shared_memory())
    server.stop(None)


CLIENT = """
import json, sys, urllib.request
body = {"text_input": "x", "model": "base", "stream": True, "max_tokens": 1900,
        "sampling_parameters": '{"ignore_eos": true}'}
url = f"http://127.0.0.1:{sys.argv[1]}/v2/models/blockzoo/generate_stream"
with urllib.request.urlopen(url, json.dumps(body).encode()) as response:
    for line in response:
        print("token", flush=True)
"""


@pytest.fixture(scope="module")
def small_server(serve_zoo, demo_zoo):
    return serve_zoo(demo_zoo, "--max-num-seqs", "4", "--kv-cache-gb", "0.02", "--max-model-len", "2048")


def test_a_client_killed_in_mid_stream_frees_its_pages(small_server):
    server = small_server
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(server.http_port)], stdout=subprocess.PIPE)
    client.stdout.readline()
    client.kill()
    client.wait()
    client.stdout.close()
    server.wait_for(lambda: server.metrics().get('blockzoo_requests_total{finish_reason="abort"}') == 1)
    metrics = server.metrics()
    assert (metrics["blockzoo_requests_running"], metrics["blockzoo_pages_used"]) == (0, 0)


def test_mixed_valid_invalid_and_vanishing_clients(small_server):
    """Four clients; every valid answer is right, and nothing stays in use."""
    server = small_server
    prompts = [(tenant, f"def f{i}(x):") for tenant in TENANTS for i in range(4)]
    expected = {job: server.generate(*job, 12)["text_output"] for job in prompts}
    counts = {"valid": 0, "refused": 0, "vanished": 0}
    lock = threading.Lock()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            tenant, text = rng.choice(prompts)
            kind = rng.choice(list(counts))
            if kind == "valid":
                assert server.generate(tenant, text, 12)["text_output"] == expected[tenant, text]
            elif kind == "refused":
                bad = rng.choice([{"max_tokens": -1}, {"text_input": ""}, {"top_p": 9.0}, {"bogus": 1}])
                assert server.post(tenant, {"text_input": text, "max_tokens": 4, **bad})[0] == 400
            else:
                model = rng.choice(["blockzoo", tenant])
                extra = {"model": tenant} if model == "blockzoo" else {}
                connection = server.open(model, long_request(rng.randint(5, 60), **extra))
                if rng.random() < 0.5:
                    response = connection.getresponse()
                    response.read1(10)
                    response.close()
                connection.close()
            with lock:
                counts[kind] += 1

    with ThreadPoolExecutor(4) as pool:
        for finished in [pool.submit(client, seed) for seed in range(4)]:
            finished.result()
    assert min(counts.values()) > 5, counts

    def at_rest() -> bool:
        metrics = server.metrics()
        in_use = ("requests_running", "requests_waiting", "pages_used")
        return all(metrics[f"blockzoo_{name}"] == 0 for name in in_use)

    server.wait_for(at_rest)
    metrics = server.metrics()
    ended = sum(value for name, value in metrics.items() if name.startswith("blockzoo_requests_total{"))
    assert ended == metrics["blockzoo_requests_arrived_total"]
    assert (
        metrics["blockzoo_pages_free"] + metrics["blockzoo_pages_cached"] == metrics["blockzoo_pages_total"]
    )
    assert server.stop() == 0
    assert server.err == ["zoo-serve: stopping: running requests finish first, a second signal ends them\n"]
