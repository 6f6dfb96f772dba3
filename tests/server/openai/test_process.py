"""The endpoint beside a server that is full, fails or ends, and its own process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import openai
import pytest

from blockzoo.server_config.openai.process import OpenAIProcess
from blockzoo.server_config.serve import main

BODY = {"model": "base", "prompt": "x", "max_tokens": 4000, "ignore_eos": True}


def process_of(endpoint) -> int | None:
    """The endpoint's process; None while there is none."""
    parent = str(endpoint.served.process.pid)
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[1] == parent and b"openai.server" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except (OSError, IndexError):
            continue
    return None


def answers(endpoint) -> bool:
    try:
        return endpoint.ask("GET", "/health")[0] == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def endpoint(serve_openai, demo_zoo):
    return serve_openai(demo_zoo, "--max-num-seqs", "2", "--max-waiting", "2")


def test_a_full_server_says_when_to_ask_again(endpoint):
    held = [endpoint.open("POST", "/v1/completions", {**BODY, "stream": True}) for _ in range(4)]
    metrics = endpoint.served.metrics
    endpoint.served.wait_for(
        lambda: metrics()["blockzoo_requests_running"] + metrics()["blockzoo_requests_waiting"] == 4
    )
    for stream in (False, True):
        status, headers, text = endpoint.ask("POST", "/v1/completions", {**BODY, "stream": stream})
        error = json.loads(text)["error"]
        assert (status, headers["retry-after"], error["type"]) == (429, "1", "rate_limit_error")
        assert "4 requests are waiting or running already" in error["message"]
    with pytest.raises(openai.RateLimitError):
        endpoint.client.completions.create(model="base", prompt="x")
    # of several answers one is refused: all end
    assert endpoint.ask("POST", "/v1/completions", {**BODY, "n": 3})[0] == 429
    for connection in held:
        connection.close()
    endpoint.wait_until_idle()


def test_a_dead_endpoint_is_started_again(endpoint):
    first = process_of(endpoint)
    os.kill(first, signal.SIGKILL)
    endpoint.served.wait_for(lambda: process_of(endpoint) not in (None, first) and answers(endpoint))
    asked = {"model": "base", "prompt": "x", "max_tokens": 2, "temperature": 0}
    assert endpoint.client.completions.create(**asked).usage.completion_tokens == 2
    assert any(
        "the OpenAI endpoint failed: its process ended with status -9" in e for e in endpoint.served.err
    )


def test_an_engine_that_dies_ends_streams_and_is_served_again(endpoint):
    connection = endpoint.open("POST", "/v1/completions", {**BODY, "stream": True})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: {")
    assert response.readline() == b"\n"
    os.kill(endpoint.served.model_pid("blockzoo"), signal.SIGKILL)
    rest = response.read().decode()
    connection.close()
    assert json.loads(rest.split("\n\n")[-3].removeprefix("data: "))["error"]["type"] in (
        "server_error",
        "service_unavailable_error",
    )
    assert rest.endswith("data: [DONE]\n\n")
    statuses = set()

    def served_again() -> bool:
        status, _, text = endpoint.ask("POST", "/v1/completions", {**BODY, "max_tokens": 2})
        statuses.add(status)
        assert status == 200 or "error" in json.loads(text)
        return status == 200

    endpoint.served.wait_for(served_again)
    assert statuses <= {200, 500, 503}
    endpoint.served.wait_for(lambda: answers(endpoint))


def test_running_answers_end_with_the_server_and_nothing_is_left(serve_openai, demo_zoo):
    endpoint = serve_openai(demo_zoo, "--drain-seconds", "20")
    pid = process_of(endpoint)
    body = {**BODY, "max_tokens": 300, "stream": True}
    connection = endpoint.open("POST", "/v1/completions", body)
    response = connection.getresponse()
    response.readline()
    endpoint.served.process.send_signal(signal.SIGTERM)
    text = response.read().decode()
    connection.close()
    assert '"finish_reason":"length"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert endpoint.served.stop(None) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_port_in_use_is_told_before_anything_starts(demo_zoo, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = [f"--{kind}-port=0" for kind in ("http", "grpc", "metrics")]
        assert main([str(demo_zoo), *ports, f"--openai-port={port}"]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_first_start_that_fails_is_an_error(tmp_path):
    process = OpenAIProcess(["--no-such-option"], tmp_path, print)
    with pytest.raises(Exception, match="the OpenAI endpoint did not start: its process ended with status 2"):
        process.start()
    process.stop()


def test_async_clients_are_served(endpoint):
    async def main_():
        async with endpoint.async_client() as client:
            return await client.completions.create(
                model="solver", prompt="1 + 1", max_tokens=3, temperature=0
            )

    assert asyncio.run(main_()).usage.completion_tokens == 3
