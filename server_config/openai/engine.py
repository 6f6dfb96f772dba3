"""The engine model `blockzoo` as an asynchronous iterator over an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton

from blockzoo.runtime.api.request import SamplingParams
from blockzoo.server_config.engine_streams import EngineError, EngineStreams
from blockzoo.server_config.openai.errors import ApiError, of_engine

_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One answer to generate; the fields are those of the engine model's inputs."""

    model: str
    prompt: str | list[int]
    params: SamplingParams
    stream: bool
    kv_scope: str | None = None
    kv_reuse: str | None = None
    documents: tuple[str, ...] = ()
    tenant: str | None = None
    """Whose share of the engine it takes; None: the model's."""
    weight: float = 1.0
    """Of the tenant."""


Tops = tuple[tuple[tuple[int, float], ...], ...]
"""The likeliest tokens in the places of some, with their log-probabilities."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Of a prompt, all its tokens; and log-probabilities and `tops` of all but the first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: Tops


@dataclass(frozen=True, slots=True)
class Delta:
    """What was added to an answer; of a request without `stream` all of it.

    Attributes:
        text: that is safe to show; it may lag behind the tokens.
        token_ids: generated.
        logprobs: of each token; () where they were not asked for.
        tops: the likeliest tokens in each token's place with their log-probabilities, likewise.
        finish_reason: "stop" or "length" with the last one, else None.
        num_prompt_tokens, num_cached_tokens: with the last one, else 0.
        prompt: with the first one, where its log-probabilities were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: Tops
    finish_reason: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt: PromptTokens | None = None


class EngineClient:
    """Talks to one tritonserver. Belongs to one event loop.

    Args:
        target: host:port of its gRPC endpoint.
        secret: of the launcher, by which the engine model believes whose requests these are.
    """

    def __init__(self, target: str, secret: str | None = None) -> None:
        self._streams, self._secret = EngineStreams(target), secret
        self._looking = asyncio.Semaphore(16)

    async def close(self) -> None:
        """Cancel everything under way."""
        await self._streams.close()

    async def ready(self, names: Iterable[str]) -> list[str]:
        """Those of the models that it serves now. Raises ApiError."""
        names = list(names)
        try:
            found = await asyncio.gather(*map(self._is_ready, names))
        except EngineError as error:
            raise ApiError(503, f"The engine cannot be reached now: {error}", retry_after=2) from None
        return [name for name, is_ready in zip(names, found, strict=True) if is_ready]

    async def _is_ready(self, name: str) -> bool:
        async with self._looking:
            return await self._streams.is_ready(name)

    async def check(self) -> None:
        """Ask the engine model how it is. Raises ApiError where it does not serve."""
        async with aclosing(self._infer([_tensor("health", "BOOL", [True])], timeout_s=5.0)) as results:
            async for _ in results:
                pass

    async def generate(self, request: EngineRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        """Deltas until the one with a `finish_reason`. Raises ApiError."""
        finished = False
        told = None
        if request.tenant is not None and self._secret is not None:
            told = {"secret": self._secret, "tenant": request.tenant, "weight": str(request.weight)}
        async with aclosing(self._infer(_inputs(request), request_id, told)) as results:
            async for result in results:  # to its end: a stream that has ended is not cancelled
                delta = _delta(result)
                finished = delta.finish_reason is not None
                yield delta
        if not finished:
            raise ApiError(500, "The engine ended the request without a last response.")

    async def _infer(
        self,
        inputs: list[Any],
        request_id: str = "",
        parameters: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        answers = self._streams.infer(inputs, request_id, parameters, timeout_s=timeout_s)
        try:
            async with aclosing(answers) as results:
                async for result in results:
                    yield result
        except EngineError as error:
            raise of_engine(error.status, str(error)) from None


def _inputs(request: EngineRequest) -> list[Any]:
    changed = {name: value for name, value in asdict(request.params).items() if value != _DEFAULTS[name]}
    # where nothing asks for sampling the engine model takes the likeliest token, as its schema has it
    parameters = json.dumps({**changed, "temperature": request.params.temperature})
    texts = {
        "model": request.model,
        "sampling_parameters": parameters,
        "kv_scope": request.kv_scope,
        "kv_reuse": request.kv_reuse,
    }
    inputs = [_tensor(name, "BYTES", [text.encode()]) for name, text in texts.items() if text is not None]
    if isinstance(request.prompt, str):
        inputs.append(_tensor("text_input", "BYTES", [request.prompt.encode()]))
    else:
        inputs.append(_tensor("input_ids", "INT32", request.prompt))
    if request.documents:
        inputs.append(_tensor("documents", "BYTES", [text.encode() for text in request.documents]))
    flags = {"tell_errors": True, "stream": request.stream, "exclude_input_in_output": True}
    return inputs + [_tensor(name, "BOOL", [value]) for name, value in flags.items()]


def _tensor(name: str, kind: str, values: Sequence[Any]) -> Any:
    array = np.array([values], {"BYTES": object, "INT32": np.int32, "BOOL": np.bool_}[kind])
    tensor = triton.InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return tensor


def _delta(result: Any) -> Delta:
    def last(name: str) -> Any:
        array = result.as_numpy(name)
        return None if array is None else array.reshape(-1)[-1]

    problem, status, reason = last("error"), last("error_status"), last("finish_reason")
    if problem is not None:
        raise of_engine("UNKNOWN" if status is None else status.decode(), problem.decode())
    logprobs, prompt_ids = result.as_numpy("output_log_probs"), result.as_numpy("prompt_token_ids")
    prompt = None
    if prompt_ids is not None:
        values = result.as_numpy("prompt_log_probs").reshape(-1).tolist()
        prompt = PromptTokens(tuple(prompt_ids[0].tolist()), tuple(values), _tops(result, "prompt_top"))
    return Delta(
        last("text_output").decode(),
        tuple(result.as_numpy("token_ids").reshape(-1).tolist()),
        () if logprobs is None else tuple(logprobs.reshape(-1).tolist()),
        _tops(result, "top"),
        None if reason is None else reason.decode(),
        int(last("num_prompt_tokens") or 0),
        int(last("num_cached_tokens") or 0),
        prompt,
    )


def _tops(result: Any, name: str) -> Tops:
    ids = result.as_numpy(f"{name}_token_ids")
    if ids is None:
        return ()
    pairs = zip(ids[0].tolist(), result.as_numpy(f"{name}_log_probs")[0].tolist(), strict=True)
    return tuple(tuple(zip(tokens, values, strict=True)) for tokens, values in pairs)
