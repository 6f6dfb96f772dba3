"""What one request gets back: engine outputs -> the tensors of its responses.

A request that fails before its first response gets an error, with the status code that Triton has for it. A
stream that fails later ends with an ordinary response whose `error` says why: an error in the middle of a
stream makes an ensemble over a decoupled model count the request as in flight for ever (tritonserver 2.51).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blockzoo.runtime.api.request import RequestOutput, TokenLogprob
from blockzoo.server_config.schema import ParsedRequest
from blockzoo.server_config.tensors import OUTPUTS

_NUMPY = {"STRING": object, "INT32": np.int32, "FP32": np.float32}
_TYPE_OF = {field.name: _NUMPY[field.data_type] for field in OUTPUTS}


@dataclass(frozen=True, slots=True)
class Response:
    """One response: tensors with a leading batch dimension of 1, or an error; `final` ends the request."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    error: str | None = None
    final: bool = False
    status: str = "INTERNAL"  # of an error: a name of `pb_utils.TritonError`


class Answer:
    """Collects (one response in all) or passes on (stream) what the engine says about one request."""

    def __init__(self, request: ParsedRequest) -> None:
        self._stream = request.stream
        self._log_probs = request.params.logprobs is not None
        self._texts = [request.echo]
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._sum_logprobs = 0.0
        self._has_responded = False

    def push(self, output: RequestOutput, problem: str | None = None) -> Response | None:
        """Take the next output; the response to send now, if any.

        Args:
            output: deltas of the engine.
            problem: with the last output, why the request ended before its time (the output's own
                `error` where None).
        """
        self._texts.append(output.text)
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs or ()
        self._sum_logprobs += sum(token.logprob for token in output.logprobs or ())
        if not output.finished:
            if not self._stream:
                return None
            self._has_responded = True
            return Response(self._take_delta())
        problem = problem or output.error
        if problem is not None and not self._has_responded:
            return Response(error=problem, final=True)
        tensors = self._take_delta()
        tensors["finish_reason"] = strings(output.finish_reason or "error")
        tensors["num_prompt_tokens"] = integers([output.num_prompt_tokens])
        tensors["num_cached_tokens"] = integers([output.num_cached_tokens])
        if self._log_probs:
            tensors["cum_log_probs"] = np.array([[self._sum_logprobs]], np.float32)
        if problem is not None:
            tensors["error"] = strings(problem)
        return Response(tensors, final=True)

    def _take_delta(self) -> dict[str, np.ndarray]:
        tensors = {"text_output": strings("".join(self._texts)), "token_ids": integers(self._token_ids)}
        if self._log_probs:
            values = [token.logprob for token in self._logprobs]
            tensors["output_log_probs"] = np.array([[values]], np.float32)  # [1, beam, num_tokens]
        self._texts, self._token_ids, self._logprobs = [], [], []
        return tensors


def send(pb: Any, sender: Any, response: Response) -> None:
    """Send a response; `pb` is the `triton_python_backend_utils` module."""
    flags = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if response.final else 0
    if response.error is not None:
        error = pb.TritonError(response.error, getattr(pb.TritonError, response.status))
        sender.send(pb.InferenceResponse([], error=error), flags=flags)
    elif response.tensors:
        tensors = [pb.Tensor(name, array) for name, array in response.tensors.items()]
        sender.send(pb.InferenceResponse(tensors), flags=flags)
    else:
        sender.send(flags=flags)


def strings(text: str) -> np.ndarray:
    """A STRING tensor [1, 1]."""
    return np.array([[text.encode()]], dtype=object)


def integers(values: Sequence[int]) -> np.ndarray:
    """An INT32 tensor [1, len(values)]."""
    return np.array([values], np.int32).reshape(1, -1)


def pack(tensors: Mapping[str, np.ndarray]) -> str:
    """Output tensors as text; `unpack` gives the same ones back."""
    return json.dumps({name: [array.shape, _values(array)] for name, array in tensors.items()})


def unpack(text: str) -> dict[str, np.ndarray]:
    """The tensors of a packed text."""
    found = {}
    for name, (shape, values) in json.loads(text).items():
        values = [v.encode() for v in values] if _TYPE_OF[name] is object else values
        found[name] = np.array(values, _TYPE_OF[name]).reshape(shape)
    return found


def _values(array: np.ndarray) -> list[object]:
    values = array.reshape(-1).tolist()
    return [v.decode() for v in values] if array.dtype == np.object_ else values
