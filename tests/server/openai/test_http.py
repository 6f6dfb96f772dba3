"""Bounds on bodies, connections and clients that do not read, on a server in this process."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager, closing

import h11
import pytest
import uvicorn
from patience import PATIENCE_S

from blockzoo.server_config.openai import http, server
from blockzoo.server_config.openai.errors import ApiError
from blockzoo.server_config.openai.fields import MAX_DEPTH, parse_json
from blockzoo.server_config.openai.http import Endpoint
from blockzoo.server_config.openai.server import BoundedProtocol


@asynccontextmanager
async def serving(app):
    """The application on a loopback port, with the protocol of the endpoint."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_level="error",
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=16 << 10,
    )
    running = uvicorn.Server(config)
    task = asyncio.create_task(running._serve([listener]))
    while not running.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        running.should_exit = True
        await task
        listener.close()


async def talk(port, data):
    """What the server says to some bytes until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with closing(writer):
        writer.write(data)
        try:
            return await asyncio.wait_for(reader.read(), PATIENCE_S)
        except ConnectionResetError:
            return b""


def read_all(client):
    while client.recv(1 << 16):
        pass


async def echo(exchange, body):
    await exchange.json(body)


def anyone(exchange):
    pass


def post(body, *headers):
    lines = ["POST / HTTP/1.1", "Host: x", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


JSON = "Content-Type: application/json; charset=utf-8"


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (post(b"{}", "Content-Length: 2"), 415, "expected application/json"),
        (post(b"{}", "Content-Type: text/plain", "Content-Length: 2"), 415, "is 'text/plain'"),
        (post(b"", JSON, f"Content-Length: {http.MAX_BODY_BYTES + 1}"), 413, "at most 8388608 bytes"),
        (post(b"", JSON, "Content-Length: " + "9" * 19), 413, "at most 8388608 bytes"),
        (post(b"{", JSON, "Content-Length: 1"), 400, "not valid JSON"),
        (post(b"[1]", JSON, "Content-Length: 3"), 400, "a JSON list; expected an object"),
        (post(b"", JSON), 400, "not valid JSON"),
    ],
)
def test_bodies_that_are_none_are_answered_with_an_error(data, status, message):
    async def main():
        async with serving(Endpoint(echo, anyone, has_body=True)) as port:
            return await talk(port, data)

    head, _, body = asyncio.run(main()).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert message in json.loads(body)["error"]["message"]


def test_a_body_in_chunks_is_counted():
    async def main():
        async with serving(Endpoint(echo, anyone, has_body=True)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(b"", JSON, "Transfer-Encoding: chunked"))
            with closing(writer):
                for _ in range(9):
                    writer.write(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
                return await asyncio.wait_for(reader.readline(), PATIENCE_S)

    assert asyncio.run(main()).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(http, "BODY_SECONDS", 0.2)

    async def main():
        async with serving(Endpoint(echo, anyone, has_body=True)) as port:
            return await talk(port, post(b'{"a":', JSON, "Content-Length: 100"))

    assert asyncio.run(main()).startswith(b"HTTP/1.1 408 ")


def test_the_guard_comes_before_the_body():
    def nobody(exchange):
        raise ApiError(401, "who are you?")

    async def main():
        async with serving(Endpoint(echo, nobody, has_body=True)) as port:
            return await talk(port, post(b"", JSON, "Content-Length: 100"))

    said = asyncio.run(main())
    assert said.startswith(b"HTTP/1.1 401 ")
    assert b"www-authenticate: Bearer" in said


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'{"a": ' * 200_000, "nested too deeply"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1e999}', "a number that is too large"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": -Infinity}', "-Infinity is no JSON"),
        (b'{"a": "\\ud800"}', "lone surrogates"),
        (b'{"\\ud800": 1}', "lone surrogates"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"\x00", "not valid JSON"),
    ],
)
def test_json_that_is_none_or_too_much(data, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse_json(data)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300


def test_json_within_bounds_is_itself():
    value: object = "é"
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    assert parse_json(json.dumps({"a": value}).encode()) == {"a": value}


def test_heads_have_a_time_and_a_size(monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.3)

    async def main():
        async with serving(Endpoint(echo, anyone, has_body=True)) as port:
            silent = await talk(port, b"")
            slow = await talk(port, b"POST / HT")
            long = await talk(port, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 40_000)
            whole = b'{"a":1}'
            # a second head on the same connection has as long
            request = post(whole, JSON, f"Content-Length: {len(whole)}").replace(
                b"Connection: close\r\n", b""
            )
            again = await talk(port, request + b"POST / HT")
            return silent, slow, long, again

    silent, slow, long, again = asyncio.run(main())
    assert (silent, slow) == (b"", b"")
    assert long.startswith(b"HTTP/1.1 400 ")
    assert again.count(b"HTTP/1.1 ") == 1


def test_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)

    async def main():
        async with serving(Endpoint(echo, anyone, has_body=True)) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            await asyncio.sleep(0.1)
            refused = await talk(port, post(b"{}", JSON, "Content-Length: 2"))
            held[0][1].close()
            await asyncio.sleep(0.1)
            served = await talk(port, post(b"{}", JSON, "Content-Length: 2"))
            for _, writer in held[1:]:
                writer.close()
            return refused, served

    refused, served = asyncio.run(main())
    assert refused == b""
    assert served.startswith(b"HTTP/1.1 200 ")


def failed(error):
    return f"data: {json.dumps(error.body())}\n\n".encode()


def test_a_client_that_does_not_read_is_cut_off_and_costs_no_memory(monkeypatch):
    monkeypatch.setattr(http, "STALLED_SECONDS", 0.5)
    monkeypatch.setattr(http, "_LOOK_EVERY_S", 0.1)
    made, ended = [], asyncio.Event()

    async def endless(exchange, body):
        async def events():
            try:
                while True:
                    made.append(1)
                    yield b"x" * 10_000
            finally:
                ended.set()

        await exchange.events(events(), failed)

    async def main():
        async with serving(Endpoint(endless, anyone)) as port:
            client = socket.create_connection(("127.0.0.1", port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.wait_for(ended.wait(), PATIENCE_S)
            client.settimeout(PATIENCE_S)
            loop = asyncio.get_running_loop()
            with pytest.raises(ConnectionResetError):
                await loop.run_in_executor(None, read_all, client)
            client.close()

    asyncio.run(main())
    assert len(made) * 10_000 < 16 << 20  # what fits into the buffers of two sockets


def test_a_failure_of_ours_is_a_500_or_ends_the_stream(capsys):
    async def early(exchange, body):
        raise KeyError("secret")

    async def late(exchange, body):
        async def events():
            yield b'data: {"a":1}\n\n'
            raise ApiError(500, "the engine failed")

        await exchange.events(events(), failed)

    async def main(handler):
        async with serving(Endpoint(handler, anyone)) as port:
            return await talk(port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    said = asyncio.run(main(early))
    assert said.startswith(b"HTTP/1.1 500 ")
    assert b"Internal error: KeyError" in said
    assert b"secret" not in said
    assert "KeyError: 'secret'" in capsys.readouterr().err

    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(asyncio.run(main(late)))
    connection.receive_data(b"")
    events = [connection.next_event() for _ in range(20)]
    text = b"".join(event.data for event in events if isinstance(event, h11.Data)).decode()
    first, second, rest = text.split("\n\n")
    assert (first, rest) == ('data: {"a":1}', "")
    assert json.loads(second.removeprefix("data: "))["error"]["message"] == "the engine failed"
