"""Plain `infer` calls: forwards a request to the decoupled engine model and gives back its only response.

Triton refuses `infer` to a decoupled model, and a model's process holds one model, so this is a model of its
own that calls `blockzoo` as any client does, over the server's own gRPC endpoint. (Requests inside Triton
take a thread each, cannot be cancelled, and ended the process under bursts: docs/log.md.) Calls beyond those
under way wait here, in turns of the models, and their time runs meanwhile.

    execute() --handle--> turns --event loop--> EngineStreams --event loop--> response_sender.send

After `handle` the event loop's thread owns a call: no response sender is used from two threads, nor after its
response.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.utils import np_to_triton_dtype

from blockzoo.runtime.api.errors import OverloadedError, RequestError
from blockzoo.server_config.answer import Response, send, strings
from blockzoo.server_config.engine_streams import EngineError, EngineStreams
from blockzoo.server_config.fair_queue import FairTurns
from blockzoo.server_config.schema import TRITON_PARAMETERS, num_bytes, time_limit
from blockzoo.server_config.tensors import OUTPUTS, TELL_ERRORS_INPUT
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.store import Zoo, manifest_stamp

_MAX_CALLS = 128  # under way in the engine model
_WAITING_BYTES = 64 << 20
_POLL_S = 0.1
_CANCEL_CHECKS = 64  # per poll: each is a round trip of about 0.05 ms
_STALL_S = 120.0  # longest silence of the event loop before the process counts as hung
_STATUS = {  # by a name of gRPC or of TritonError
    "INVALID_ARGUMENT": "INVALID_ARG",
    "INVALID_ARG": "INVALID_ARG",
    "RESOURCE_EXHAUSTED": "INVALID_ARG",  # larger than a message may be
    "NOT_FOUND": "NOT_FOUND",
    "UNAVAILABLE": "UNAVAILABLE",
    "CANCELLED": "UNAVAILABLE",  # by a server that ends
}


@dataclass(slots=True, eq=False)
class _Call:
    request_id: str
    sender: Any
    inputs: dict[str, np.ndarray]
    parameters: dict[str, str]
    arrival: float
    deadline: float
    task: asyncio.Task[Response] | None = None  # once its turn has come
    problem: str | None = None  # why it ends before its time


class UnaryFront:
    """Forwards requests from one event loop.

    Args:
        pb: the `triton_python_backend_utils` module.
        zoo: whose models take turns; requests that name none of them share one.
        target: host:port of the server's own gRPC endpoint.
        max_seconds: the longest that a request may take, waiting here included; None: any time.
    """

    def __init__(self, pb: Any, zoo: Path, target: str, max_seconds: float | None = None) -> None:
        self._pb = pb
        self._zoo = zoo
        self._seen: tuple[int, int] | None = None
        self._models: frozenset[str] = frozenset()
        self._max_seconds = math.inf if max_seconds is None else max_seconds
        self._changed = threading.Condition()
        self._calls: dict[_Call, None] = {}  # without a response yet
        self._turns: FairTurns[_Call] = FairTurns(_MAX_CALLS, _WAITING_BYTES)
        self._closing = False
        self._heartbeat = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="blockzoo-unary", daemon=True)
        self._thread.start()
        self._streams = asyncio.run_coroutine_threadsafe(_connect(target), self._loop).result()
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    def handle(self, request: Any) -> None:
        """Take one request; its sender gets exactly one response."""
        sender = request.get_response_sender()
        try:
            # copied: a request's tensors go when execute returns
            inputs = {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}
            if "health" in inputs:
                self._answer_health(sender)
            elif "stream" in inputs and inputs["stream"].any():
                message = "stream is true; this model gives one response: use blockzoo"
                send(self._pb, sender, Response(error=message, final=True, status="INVALID_ARG"))
            else:
                self._enqueue(request, sender, inputs)
        except Exception as error:
            self._send(sender, self._refusal(error))

    def close(self, timeout_s: float) -> None:
        """Let calls finish for up to `timeout_s`; the others are told then."""
        with self._changed:
            self._changed.wait_for(lambda: not self._calls, max(0.0, timeout_s))
            self._closing = True
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _answer_health(self, sender: Any) -> None:
        response = Response({"text_output": strings("ok")}, final=True)
        if time.monotonic() - self._heartbeat > _STALL_S:
            response = Response(
                error="the thread that forwards calls has stopped", final=True, status="UNAVAILABLE"
            )
        send(self._pb, sender, response)

    def _enqueue(self, request: Any, sender: Any, inputs: dict[str, np.ndarray]) -> None:
        parameters = json.loads(request.parameters() or "{}")
        limit = time_limit({"timeout": request.timeout() or parameters.get("timeout")})
        now = time.monotonic()
        deadline = now + min(self._max_seconds, math.inf if limit is None else limit)
        # the engine model refuses those that it does not know
        passed_on = {name: str(value) for name, value in parameters.items() if name not in TRITON_PARAMETERS}
        call = _Call(request.request_id(), sender, inputs, passed_on, now, deadline)
        size = sum(map(num_bytes, inputs.values()))
        owner = self._owner(_text(inputs, "model"))
        with self._changed:
            if self._closing:
                raise OverloadedError("the server is shutting down; send the request elsewhere")
            self._turns.put(owner, _text(inputs, "kv_scope"), size, call)
            self._calls[call] = None
        self._loop.call_soon_threadsafe(self._start)

    def _owner(self, model: str) -> str:
        """A name that a client makes up gets no turn of its own."""
        stamp = manifest_stamp(self._zoo)
        if stamp != self._seen:
            with suppress(ZooError):  # a zoo that cannot be read changes nothing
                self._models, self._seen = frozenset(Zoo.open(self._zoo).manifest.models), stamp
        return model if model in self._models else ""

    # ---- the event loop's thread

    def _start(self) -> None:
        """Forward the calls whose turn it is."""
        while True:
            with self._changed:
                taken = self._turns.take()
                if taken is None:
                    return
                model, call = taken
                if call not in self._calls:  # given up while it waited
                    self._turns.done(model)
                    continue
            call.task = self._loop.create_task(self._ask(call))
            call.task.add_done_callback(partial(self._finish, model, call))

    async def _ask(self, call: _Call) -> Response:
        limit = None
        if call.deadline < math.inf:
            limit = max(1, round((call.deadline - time.monotonic()) * 1e6))
        told = call.inputs | {TELL_ERRORS_INPUT.name: np.ones((1, 1), np.bool_)}
        inputs = [_input(name, array) for name, array in told.items()]
        response = None
        try:
            async with aclosing(
                self._streams.infer(inputs, call.request_id, call.parameters, limit)
            ) as results:
                async for result in results:  # to its end: a stream that has ended is not cancelled
                    arrays = {field.name: result.as_numpy(field.name) for field in OUTPUTS}
                    tensors = {name: array for name, array in arrays.items() if array is not None}
                    response = response or _response(tensors)
        except EngineError as error:
            return Response(error=str(error), final=True, status=_STATUS.get(error.status, "INTERNAL"))
        return response or Response(error="the engine model ended the request without a response", final=True)

    def _finish(self, model: str, call: _Call, task: asyncio.Task[Response]) -> None:
        with self._changed:
            self._turns.done(model)
        if task.cancelled():
            why = call.problem or "the request was cancelled"
            response = Response(error=why, final=True, status="UNAVAILABLE")
        else:
            error = task.exception()
            response = task.result() if error is None else self._refusal(error)
        self._end(call, response)
        self._start()

    async def _watch(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(_POLL_S)
            self._heartbeat = time.monotonic()
            try:
                turn = self._check(turn)
            except Exception as error:  # a bug of ours: calls go on
                self._log(error)

    def _check(self, turn: int) -> int:
        """End calls whose time ends while they wait, or whose client has gone; where to go on next time."""
        now = time.monotonic()
        with self._changed:
            calls = list(self._calls)
        for call in calls:
            if call.task is None and now > call.deadline:  # from there on the engine model sees to it
                limit = call.deadline - call.arrival
                self._give_up(call, f"the request took longer than its time limit of {limit:g} s")
        turn %= max(1, len(calls))
        for call in [*calls[turn:], *calls[:turn]][:_CANCEL_CHECKS]:
            if call.problem is None and call.sender.is_cancelled():
                self._give_up(call, "the request was cancelled")
        return turn + _CANCEL_CHECKS

    def _give_up(self, call: _Call, why: str) -> None:
        call.problem = why
        if call.task is not None:
            call.task.cancel()  # `_finish` follows
        else:
            self._end(call, Response(error=why, final=True, status="UNAVAILABLE"))

    def _end(self, call: _Call, response: Response) -> None:
        self._send(call.sender, response)
        with self._changed:
            del self._calls[call]
            self._changed.notify_all()

    async def _end_all(self) -> None:
        self._watching.cancel()
        with self._changed:
            calls = list(self._calls)
        for call in calls:
            self._give_up(call, "the server is shutting down; send the request elsewhere")
        await asyncio.gather(*(call.task for call in calls if call.task is not None), return_exceptions=True)
        await self._streams.close()

    # ---- any thread

    def _refusal(self, error: BaseException) -> Response:
        if isinstance(error, RequestError):
            status = "UNAVAILABLE" if isinstance(error, OverloadedError) else "INVALID_ARG"
            return Response(error=str(error), final=True, status=status)
        self._log(error)
        return Response(error=f"internal error: {error}", final=True)

    def _send(self, sender: Any, response: Response) -> None:
        with suppress(Exception):  # who asked is gone
            send(self._pb, sender, response)

    def _log(self, error: BaseException) -> None:
        self._pb.Logger.log_error("".join(traceback.format_exception(error)))


def _response(tensors: dict[str, np.ndarray]) -> Response:
    if "error_status" not in tensors:
        return Response(tensors, final=True)
    message, status = (tensors[name].reshape(-1)[0].decode() for name in ("error", "error_status"))
    return Response(error=message, final=True, status=_STATUS.get(status, "INTERNAL"))


async def _connect(target: str) -> EngineStreams:
    return EngineStreams(target)  # belongs to the loop that runs this


def _input(name: str, array: np.ndarray) -> InferInput:
    tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def _text(inputs: Mapping[str, np.ndarray], name: str) -> str:
    """A short text that was sent, or ""; the engine model looks whether it is right."""
    value = inputs[name].reshape(-1)[0] if name in inputs and inputs[name].size else b""
    return value[:256].decode(errors="replace") if isinstance(value, bytes) else ""
