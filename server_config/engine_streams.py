"""Requests to the engine model `blockzoo` from another process of this machine: a gRPC stream each.

Closing the iterator over a request's responses, or cancelling the task that waits for it, cancels the stream,
which frees the request in the engine's next step.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import grpc
import tritonclient.grpc.aio as triton

from blockzoo.server_config.repository import ENGINE

_CHANNEL = [
    ("grpc.max_receive_message_length", 256 << 20),  # a long answer in one response
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.lb_policy_name", "pick_first"),
    ("grpc.enable_http_proxy", 0),
    # a server that was started again is found within as many milliseconds
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class EngineError(Exception):
    """What the engine model, or the way to it, answered instead.

    `status` is a name of a gRPC status or of a TritonError. Triton's streams themselves carry none: who wants
    that of a refusal asks with the input `tell_errors`.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class EngineStreams:
    """A connection to one tritonserver, which is made again where it breaks. Belongs to one event loop.

    Args:
        target: host:port of its gRPC endpoint.
    """

    def __init__(self, target: str) -> None:
        self._client = triton.InferenceServerClient(target, channel_args=_CHANNEL)

    async def close(self) -> None:
        """Cancel everything under way."""
        await self._client.close()

    async def is_ready(self, name: str) -> bool:
        """Whether the server serves a model now. Raises EngineError."""
        try:
            return await self._client.is_model_ready(name, client_timeout=5.0)
        except triton.InferenceServerException as error:
            raise EngineError("UNAVAILABLE", str(error.message())) from None

    async def infer(
        self,
        inputs: list[Any],
        request_id: str = "",
        parameters: Mapping[str, str] | None = None,
        limit_us: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """The results of one request. Raises EngineError.

        Args:
            limit_us: time that the engine gives it, in microseconds.
            timeout_s: seconds after which it is given up here.
        """

        async def one_request() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": ENGINE,
                "inputs": inputs,
                "request_id": request_id,
                "parameters": parameters,
                "timeout": limit_us,
            }

        responses = self._client.stream_infer(one_request(), stream_timeout=timeout_s)
        try:
            async for result, error in responses:
                if error is not None:  # of Triton itself, or of a model process that died
                    raise EngineError("UNKNOWN", str(error.message()))
                yield result
        except grpc.aio.AioRpcError as error:
            raise EngineError(error.code().name, error.details() or error.code().name) from None
        except triton.InferenceServerException as error:
            raise EngineError("INTERNAL", str(error.message())) from None
        finally:
            responses.cancel()
