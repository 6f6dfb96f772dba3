"""Plain `infer` calls: forwards a request to the decoupled engine model and gives back its only response.

Triton refuses `infer` to a decoupled model, and a model's process holds one model, so this is a model of its
own that calls `blockzoo` inside the server. A cancelled call runs to its end (the cancellation does not reach
the inner request); `max_tokens` and the `timeout` parameter bound it.
"""

from __future__ import annotations

import json
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from blockzoo.server_config.answer import strings
from blockzoo.server_config.tensors import OUTPUTS

_ENGINE_MODEL = "blockzoo"
_MAX_CALLS = 128  # each waits in a thread; further requests queue here


class UnaryFront:
    """Forwards requests, each from a thread of its own.

    Args:
        pb: the `triton_python_backend_utils` module.
    """

    def __init__(self, pb: Any) -> None:
        self._pb = pb
        self._threads = ThreadPoolExecutor(_MAX_CALLS, "blockzoo-unary")

    def handle(self, request: Any) -> None:
        """Take one request; its sender gets exactly one response."""
        pb = self._pb
        sender = request.get_response_sender()
        try:
            # copied: a request's tensors go when execute returns
            inputs = {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}
            if "health" in inputs:
                self._send(sender, [pb.Tensor("text_output", strings("ok"))])
                return
            if "stream" in inputs and inputs["stream"].any():
                self._fail(
                    sender, "stream is true; this model gives one response: use blockzoo", "INVALID_ARG"
                )
                return
            inner = pb.InferenceRequest(
                model_name=_ENGINE_MODEL,
                request_id=request.request_id(),
                inputs=[pb.Tensor(name, array) for name, array in inputs.items()],
                requested_output_names=[field.name for field in OUTPUTS],
                timeout=request.timeout(),
                parameters=json.loads(request.parameters() or "{}"),
            )
            self._threads.submit(self._forward, sender, inner)
        except Exception as error:
            self._fail_internally(sender, error)

    def close(self) -> None:
        """Wait for the calls under way."""
        self._threads.shutdown(wait=True)

    def _forward(self, sender: Any, inner: Any) -> None:
        try:
            for response in inner.exec(decoupled=True):
                if response.has_error():
                    # the status is lost on the way (it reads INTERNAL), and refusals are what comes here
                    self._fail(sender, response.error().message(), "INVALID_ARG")
                    return
                if response.output_tensors():
                    self._send(sender, response.output_tensors())
                    return
            self._fail(sender, "the engine model ended the request without a response", "INTERNAL")
        except Exception as error:
            self._fail_internally(sender, error)

    def _send(self, sender: Any, tensors: list[Any]) -> None:
        pb = self._pb
        sender.send(pb.InferenceResponse(tensors), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _fail(self, sender: Any, message: str, status: str) -> None:
        pb = self._pb
        error = pb.TritonError(message, getattr(pb.TritonError, status))
        sender.send(pb.InferenceResponse([], error=error), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _fail_internally(self, sender: Any, error: Exception) -> None:
        self._pb.Logger.log_error(traceback.format_exc())
        self._fail(sender, f"internal error: {error}", "INTERNAL")
