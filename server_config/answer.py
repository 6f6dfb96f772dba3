"""What one request gets back: engine outputs -> the tensors of its responses.

A request that fails before its first response gets an error, with the status code that Triton has for it. A
stream that fails later ends with an ordinary response whose `error` says why: an error in the middle of a
stream makes an ensemble over a decoupled model count the request as in flight for ever (tritonserver 2.51).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blockzoo.runtime.api.request import RequestOutput, TokenLogprob
from blockzoo.server_config.schema import ParsedRequest


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
        self._num_top = request.params.logprobs  # None: no log-probabilities
        self._texts = [request.echo]
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._sum_logprobs = 0.0
        self._num_prompt_top = request.params.prompt_logprobs
        self._prompt: dict[str, np.ndarray] = {}  # tensors about the prompt, not sent yet
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
        if output.prompt_logprobs is not None:
            self._prompt = _prompt_tensors(output, self._num_prompt_top or 0)
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
        if self._num_top is not None:
            tensors["cum_log_probs"] = np.array([[self._sum_logprobs]], np.float32)
        if problem is not None:
            tensors["error"] = strings(problem)
        return Response(tensors, final=True)

    def _take_delta(self) -> dict[str, np.ndarray]:
        tensors = {"text_output": strings("".join(self._texts)), "token_ids": integers(self._token_ids)}
        if self._num_top is not None:
            values = [token.logprob for token in self._logprobs]
            tensors["output_log_probs"] = np.array([[values]], np.float32)  # [1, beam, num_tokens]
        if self._num_top:
            tensors["top_token_ids"], tensors["top_log_probs"] = _tops(self._logprobs, self._num_top)
        tensors |= self._prompt
        self._texts, self._token_ids, self._logprobs, self._prompt = [], [], [], {}
        return tensors


def _tops(tokens: Sequence[TokenLogprob], num_top: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and log-probabilities float32 of the likeliest tokens, [1, tokens, tops]."""
    shape = (1, len(tokens), -1 if tokens else num_top)
    ids = np.array([[token_id for token_id, _ in token.top] for token in tokens], np.int32)
    values = np.array([[value for _, value in token.top] for token in tokens], np.float32)
    return ids.reshape(shape), values.reshape(shape)


def _prompt_tensors(output: RequestOutput, num_top: int) -> dict[str, np.ndarray]:
    assert output.prompt_token_ids is not None, "they come together"
    tokens = [token for token in output.prompt_logprobs or () if token is not None]
    values = np.array([[token.logprob for token in tokens]], np.float32)
    tensors = {"prompt_token_ids": integers(output.prompt_token_ids), "prompt_log_probs": values}
    if num_top:
        tensors["prompt_top_token_ids"], tensors["prompt_top_log_probs"] = _tops(tokens, num_top)
    return tensors


class TellingSender:
    """A response sender whose client reads errors from the outputs `error` and `error_status`.

    Triton's gRPC streams carry no status, and asking it for one (`triton_grpc_error`) ends tritonserver 2.51
    with a segmentation fault after some thousand errors.
    """

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def send(self, *args: Any, **kwargs: Any) -> None:
        """As the sender's."""
        self._sender.send(*args, **kwargs)

    def is_cancelled(self) -> bool:
        """As the sender's."""
        return self._sender.is_cancelled()


def send(pb: Any, sender: Any, response: Response) -> None:
    """Send a response; `pb` is the `triton_python_backend_utils` module."""
    if response.error is not None and isinstance(sender, TellingSender):
        told = {"error": strings(response.error), "error_status": strings(response.status)}
        nothing = {"text_output": strings(""), "token_ids": integers([])}
        response = Response({**nothing, **told}, final=response.final)
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
