"""The process of the OpenAI endpoint: uvicorn, with bounds on what a connection may do before its request."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from blockzoo.server_config.control import SECRET_VARIABLE
from blockzoo.server_config.openai.app import OpenAIApp
from blockzoo.server_config.openai.engine import Engine, EngineClient
from blockzoo.server_config.openai.keys import Keyring

MAX_CONNECTIONS = 2048
HEADER_SECONDS = 30.0
"""In which a connection must have sent the head of its next request."""
_MAX_HEADER_BYTES = 16 << 10
_GRACE_S = 5


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that ends connections which are too many or too slow, and can be cut off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "abort": self._abort}
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, and give it its time."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._abort()
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch_head()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_SECONDS, self._close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self.transport.close()

    def _abort(self) -> None:
        # else the system goes on sending what it holds, for minutes
        reset = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        self.transport.abort()


class _Server(uvicorn.Server):
    """Says by the time of a file that it is up and that its loop turns."""

    def __init__(self, config: uvicorn.Config, heartbeat: Path | None) -> None:
        super().__init__(config)
        self._heartbeat = heartbeat

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._heartbeat is not None and counter % 10 == 0:
            self._heartbeat.touch()
        return await super().on_tick(counter)


def _say(message: str) -> None:
    print(f"zoo-serve: {message}", file=sys.stderr, flush=True)


def _engine(args: argparse.Namespace) -> Callable[[], Engine]:
    """What connects to the engine."""
    if args.replicas is None:
        return partial(EngineClient, args.grpc, args.metrics, os.environ.get(SECRET_VARIABLE))
    from blockzoo.server_config.replicas.client import ReplicaClient, join

    join(args.ray_address)
    return partial(ReplicaClient, args.replicas)


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal comes; the exit status."""
    parser = argparse.ArgumentParser(prog="blockzoo.server_config.openai.server")
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--grpc", help="host:port of tritonserver")
    parser.add_argument("--metrics", help="URL of its metrics")
    parser.add_argument("--replicas", help="instead: name of the Ray Serve application of replicas")
    parser.add_argument("--ray-address", help="of the Ray that runs it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--api-keys", type=Path, help="file of keys that requests must come with")
    parser.add_argument("--generation-config", choices=("auto", "none"), default="auto")
    parser.add_argument("--heartbeat", type=Path, help="file whose time says that the process is well")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.api_keys is not None and SECRET_VARIABLE not in os.environ:
        parser.error(f"{SECRET_VARIABLE} is not set: the engine would not believe whose requests these are")
    keys = None if args.api_keys is None else Keyring(args.api_keys, _say)
    config = uvicorn.Config(
        OpenAIApp(args.zoo, _engine(args), keys, defaults=args.generation_config == "auto").application(),
        host=args.host,
        port=args.port,
        loop="asyncio",
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_GRACE_S,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
    )
    server = _Server(config, args.heartbeat)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
