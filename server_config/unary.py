"""Plain `infer` calls: forwards a request to the decoupled engine model and gives back its only response.

Triton refuses `infer` to a decoupled model, and a model's process holds one model, so this is a model of its
own that calls `blockzoo` inside the server. Calls beyond those under way wait here, in turns of the models,
and their time runs meanwhile. A call that is cancelled while it waits ends; later the cancellation does not
reach the inner request, and its time limit bounds it.

Triton's stub (2.51) makes the arrays of an inner response's tensors without holding Python's lock: beside any
other thread that corrupts the heap, and the process died after some 100 to 1,000 calls. Errors are plain
strings there, so the engine model sends the answer packed as one. Triton's count of failed requests of
`blockzoo` therefore holds those that this model forwards too.
"""

from __future__ import annotations

import json
import math
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from blockzoo.runtime.api.errors import OverloadedError, RequestError
from blockzoo.server_config.answer import Response, send, strings, unpack
from blockzoo.server_config.control import INTERNAL, PACKED, internal_mark
from blockzoo.server_config.fair_queue import FairQueue
from blockzoo.server_config.schema import num_bytes, time_limit
from blockzoo.server_config.tensors import OUTPUTS
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.store import Zoo, manifest_stamp

_ENGINE_MODEL = "blockzoo"
_MAX_CALLS = 128  # each waits in a thread
_WAITING_BYTES = 64 << 20
_POLL_S = 0.1
_CANCEL_CHECKS = 64  # per poll: each is a round trip of about 0.05 ms
_STATUSES = ("INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "INTERNAL")


@dataclass(slots=True, eq=False)
class _Call:
    request_id: str
    sender: Any
    inputs: dict[str, np.ndarray]
    parameters: dict[str, Any]
    arrival: float
    deadline: float


class UnaryFront:
    """Forwards requests, each from a thread of its own.

    Args:
        pb: the `triton_python_backend_utils` module.
        zoo: whose models take turns; requests that name none of them share one.
        secret: of the launcher; with a mark made of it the engine model tells the status of errors.
        max_seconds: the longest that a request may take, waiting here included; None: any time.
    """

    def __init__(
        self, pb: Any, zoo: Path, secret: str | None = None, max_seconds: float | None = None
    ) -> None:
        self._pb = pb
        self._mark = None if secret is None else internal_mark(secret)
        self._zoo = zoo
        self._seen: tuple[int, int] | None = None
        self._models: frozenset[str] = frozenset()
        self._max_seconds = math.inf if max_seconds is None else max_seconds
        self._lock = threading.Lock()
        self._waiting: dict[_Call, None] = {}
        self._queue = FairQueue("blockzoo-unary", _MAX_CALLS, _WAITING_BYTES)
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._run, name="blockzoo-unary-watch", daemon=True)
        self._watch.start()

    def handle(self, request: Any) -> None:
        """Take one request; its sender gets exactly one response."""
        sender = request.get_response_sender()
        try:
            # copied: a request's tensors go when execute returns
            inputs = {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}
            if "health" in inputs:
                send(self._pb, sender, Response({"text_output": strings("ok")}, final=True))
            elif "stream" in inputs and inputs["stream"].any():
                message = "stream is true; this model gives one response: use blockzoo"
                send(self._pb, sender, Response(error=message, final=True, status="INVALID_ARG"))
            else:
                self._enqueue(request, sender, inputs)
        except Exception as error:
            self._fail(sender, error)

    def close(self, timeout_s: float) -> None:
        """Let calls finish for up to `timeout_s`; those that still wait then are told."""
        self._queue.drain(timeout_s)
        self._queue.close()
        self._closing.set()
        self._watch.join()

    def _enqueue(self, request: Any, sender: Any, inputs: dict[str, np.ndarray]) -> None:
        parameters = json.loads(request.parameters() or "{}")
        limit = time_limit({"timeout": request.timeout() or parameters.get("timeout")})
        now = time.monotonic()
        deadline = now + min(self._max_seconds, math.inf if limit is None else limit)
        call = _Call(request.request_id(), sender, inputs, parameters, now, deadline)
        size = sum(map(num_bytes, inputs.values()))
        scope = _text(inputs, "kv_scope")
        work = partial(self._forward, call)
        with self._lock:
            self._queue.put(self._owner(_text(inputs, "model")), scope, size, work)
            self._waiting[call] = None

    def _owner(self, model: str) -> str:
        """A name that a client makes up gets no turn of its own."""
        stamp = manifest_stamp(self._zoo)
        if stamp != self._seen:
            with suppress(ZooError):  # a zoo that cannot be read changes nothing
                self._models, self._seen = frozenset(Zoo.open(self._zoo).manifest.models), stamp
        return model if model in self._models else ""

    def _forward(self, call: _Call) -> None:
        """A thread of the queue."""
        with self._lock:
            if self._waiting.pop(call, call) is call:  # given up while it waited
                return
        try:
            send(self._pb, call.sender, self._ask(call))
        except BaseException as error:
            self._fail(call.sender, error)

    def _ask(self, call: _Call) -> Response:
        pb = self._pb
        parameters = {k: v for k, v in call.parameters.items() if k != "timeout"}
        if call.deadline < math.inf:
            parameters["timeout"] = max(1, round((call.deadline - time.monotonic()) * 1e6))
        if self._mark is not None:
            parameters[INTERNAL] = self._mark
        inner = pb.InferenceRequest(
            model_name=_ENGINE_MODEL,
            request_id=call.request_id,
            inputs=[pb.Tensor(name, array) for name, array in call.inputs.items()],
            requested_output_names=[field.name for field in OUTPUTS],
            parameters=parameters,
        )
        for response in inner.exec(decoupled=True):
            if response.has_error():
                status, _, message = response.error().message().partition(":")
                if status == PACKED:
                    return Response(unpack(message), final=True)
                if status not in _STATUSES:  # of Triton, or of an engine that does not know us
                    status, message = "INVALID_ARG", response.error().message()
                return Response(error=message, final=True, status=status)
            if response.output_tensors():  # of an engine that does not know us
                tensors = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
                return Response(tensors, final=True)
        return Response(error="the engine model ended the request without a response", final=True)

    def _run(self) -> None:
        """End calls whose time ends while they wait, or whose client has gone; all of them at the end."""
        turn = 0
        while not self._closing.wait(_POLL_S):
            now = time.monotonic()
            with self._lock:
                calls = list(self._waiting)
            for call in calls:
                if now > call.deadline:
                    limit = call.deadline - call.arrival
                    self._give_up(call, f"the request took longer than its time limit of {limit:g} s")
            for call in [*calls[turn:], *calls[:turn]][:_CANCEL_CHECKS]:
                if call in self._waiting and call.sender.is_cancelled():
                    self._give_up(call, "the request was cancelled")
            turn = (turn + _CANCEL_CHECKS) % max(1, len(calls))
        for call in list(self._waiting):
            self._give_up(call, "the server is shutting down; send the request elsewhere")

    def _give_up(self, call: _Call, why: str) -> None:
        with self._lock:
            if self._waiting.pop(call, call) is call:  # a thread has taken it
                return
        self._fail(call.sender, OverloadedError(why))

    def _fail(self, sender: Any, error: BaseException) -> None:
        response = Response(error=f"internal error: {error}", final=True)
        if isinstance(error, RequestError):
            status = "UNAVAILABLE" if isinstance(error, OverloadedError) else "INVALID_ARG"
            response = Response(error=str(error), final=True, status=status)
        else:
            self._pb.Logger.log_error("".join(traceback.format_exception(error)))
        with suppress(Exception):  # who asked is gone
            send(self._pb, sender, response)


def _text(inputs: Mapping[str, np.ndarray], name: str) -> str:
    """A short text that was sent, or ""; the engine model looks whether it is right."""
    value = inputs[name].reshape(-1)[0] if name in inputs and inputs[name].size else b""
    return value[:256].decode(errors="replace") if isinstance(value, bytes) else ""
