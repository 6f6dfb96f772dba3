"""docs/nginx.conf before a real server: what it passes on, what it stops, and that the server outlives it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx (Debian: nginx-light)"),
]
CONFIG = Path(__file__).parents[2] / "docs" / "nginx.conf"
GOOD = {"text_input": "def f", "max_tokens": 4}


class Proxy:
    """nginx with the documented file, on ports of its own."""

    def __init__(self, http_port: int, scratch: Path, **changes: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        text = CONFIG.read_text()
        for before, after in {
            "127.0.0.1:8000": f"127.0.0.1:{http_port}",
            "127.0.0.1:8080": f"127.0.0.1:{self.port}",
            **changes,
        }.items():
            assert before in text
            text = text.replace(before, after)
        (scratch / "nginx.conf").write_text(text)
        user = "user root; " if os.geteuid() == 0 else ""  # who else could not enter pytest's folder
        command = ["nginx", "-p", str(scratch), "-c", str(scratch / "nginx.conf"), "-e", "stderr"]
        self.process = subprocess.Popen([*command, "-g", f"{user}daemon off;"])
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def ask(self, method: str, path: str, body: bytes | str = b"", headers: dict[str, str] | None = None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        said = response.read()
        connection.close()
        return response.status, said

    def raw(self, content: bytes, timeout: float = 20) -> bytes:
        """The first bytes that come back; none where the connection is closed without."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as client:
            try:
                client.sendall(content)
                return client.recv(4096)
            except (ConnectionResetError, BrokenPipeError):
                return b""

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def server(serve_zoo, demo_zoo):
    return serve_zoo(demo_zoo, "--kv-cache-gb", "0.1")


@pytest.fixture(scope="module")
def proxy(server, tmp_path_factory):
    unbounded = {"rate=20r/s": "rate=10000r/s"}
    made = Proxy(server.http_port, tmp_path_factory.mktemp("nginx"), **unbounded)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def server_lives_on(server):
    pid = server.server_pid()
    yield
    assert server.generate("base", "def f")["token_ids"]
    assert server.server_pid() == pid
    assert not any("restarting" in line for line in server.err), server.err


def chunked(path: str, content: bytes) -> bytes:
    """The content in chunks of one byte."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    return head.encode() + b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"


def test_tenants_answer_through_it(server, proxy):
    status, said = proxy.ask("POST", "/v2/models/base/generate", json.dumps(GOOD))
    assert (status, json.loads(said)["text_output"]) == (200, server.post("base", GOOD)[1]["text_output"])
    assert proxy.ask("GET", "/v2/health/live")[0] == 200


def test_tokens_come_as_they_are_made(proxy):
    body = json.dumps(
        {**GOOD, "stream": True, "max_tokens": 400, "sampling_parameters": '{"ignore_eos": true}'}
    )
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
    connection.request("POST", "/v2/models/base/generate_stream", body)
    response = connection.getresponse()
    began = time.monotonic()
    assert response.read1(64).startswith(b"data: ")
    first = time.monotonic() - began
    assert response.read().count(b"data: ") >= 398
    assert first < (time.monotonic() - began) / 2
    connection.close()


@pytest.mark.parametrize("path", ["/v2/models/base/generate", "/v2/models/base/generate_stream"])
def test_chunks_of_one_byte_reach_triton_as_one_body(proxy, path):
    assert proxy.raw(chunked(path, json.dumps(GOOD).encode())).startswith(b"HTTP/1.1 200")
    assert proxy.raw(chunked(path, b"A" * (4 << 20))).startswith(b"HTTP/1.1 413")


def test_nesting_that_ends_triton_does_not_fit(proxy):
    for depth, expected in ((300_000, 413), (32_000, 500)):
        body = '{"text_input": "x", "q": ' + "[" * depth
        assert proxy.ask("POST", "/v2/models/base/generate", body)[0] == expected


def test_shapes_do_not_reach_triton(proxy):
    tensor = {"name": "text_input", "shape": [1, 1152921504606846976], "datatype": "BYTES", "data": ["x"]}
    for model in ("base", "blockzoo", "blockzoo_unary"):
        status, _ = proxy.ask("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}))
        assert status == 404


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        *[
            ("POST", f"/v2/models/{model}/generate", 404)
            for model in ("blockzoo", "blockzoo_unary", "preprocessing", "postprocessing")
        ],
        ("POST", "/v2/models/base/../blockzoo/generate", 404),
        ("POST", "/v2/models/%62lockzoo/generate", 404),
        ("POST", "/v2/models/base%2f..%2fblockzoo/generate", 404),
        ("POST", "/v2/models//blockzoo/generate", 404),
        ("POST", "/v2/models/base/versions/1/generate", 404),
        ("POST", "/v2/models/nobody/generate", 404),
        ("GET", "/v2/models/base/generate", 403),
        ("GET", "/v2/models/base/config", 404),
        ("GET", "/v2", 404),
        ("GET", "/v2/health/ready", 404),
        ("POST", "/v2/health/live", 403),
        ("POST", "/v2/repository/index", 404),
        ("POST", "/v2/repository/models/base/unload", 404),
        ("GET", "/v2/systemsharedmemory/status", 404),
        ("POST", "/v2/logging", 404),
        ("GET", "/v2/models/stats", 404),
        ("GET", "/metrics", 404),
    ],
)
def test_nothing_else_is_passed_on(proxy, method, path, expected):
    assert proxy.ask(method, path, json.dumps(GOOD))[0] == expected


def test_headers_are_bounded_and_kept(proxy):
    path = "/v2/models/base/generate"
    assert proxy.ask("POST", path, json.dumps(GOOD), {"a": "b" * 5000})[0] == 400
    assert proxy.ask("POST", path, json.dumps(GOOD), {f"a{i}": "b" * 200 for i in range(90)})[0] == 400
    assert proxy.ask("POST", path, json.dumps(GOOD), {"Content-Encoding": "gzip"})[0] == 200
    assert proxy.ask("POST", path, json.dumps(GOOD), {"Inference-Header-Content-Length": "7"})[0] == 200


def test_slow_clients_and_many_are_sent_away(server, tmp_path):
    faster = {
        "client_header_timeout 10s": "client_header_timeout 1s",
        "client_body_timeout 10s": "client_body_timeout 1s",
    }
    proxy = Proxy(server.http_port, tmp_path, **faster)
    try:
        head = b"POST /v2/models/base/generate HTTP/1.1\r\nHost: x\r\n"
        for unfinished in (head, head + b"Content-Length: 100\r\n\r\n{"):
            assert proxy.raw(unfinished, timeout=10) == b""  # closed: else it would time out
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(proxy.ask("POST", "/v2/models/base/generate", json.dumps(GOOD))[0])

        clients = [threading.Thread(target=ask) for _ in range(120)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 30
    finally:
        proxy.stop()
