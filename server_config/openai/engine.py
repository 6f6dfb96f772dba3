"""The engine model `blockzoo` as an asynchronous iterator over an answer."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

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


class Engine(Protocol):
    """What generates the answers. Belongs to one event loop."""

    async def close(self) -> None:
        """Cancel everything under way."""

    async def ready(self, names: Iterable[str]) -> list[str]:
        """Those of the models that it serves now. Raises ApiError."""

    async def check(self) -> None:
        """Raises ApiError where it does not serve."""

    async def metrics(self) -> bytes:
        """Its figures as Prometheus reads them. Raises ApiError."""

    def generate(self, request: EngineRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        """Deltas until the one with a `finish_reason`. Raises ApiError."""


class EngineClient:
    """The engine model of one tritonserver. Belongs to one event loop.

    Args:
        target: host:port of its gRPC endpoint.
        metrics: URL of its metrics.
        secret: of the launcher, by which the engine model believes whose requests these are.
    """

    def __init__(self, target: str, metrics: str, secret: str | None = None) -> None:
        self._streams, self._metrics, self._secret = EngineStreams(target), metrics, secret
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

    async def metrics(self) -> bytes:
        """The engine's own metrics out of tritonserver's. Raises ApiError."""
        return await asyncio.to_thread(_read_metrics, self._metrics)

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


def _read_metrics(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            lines = response.read().decode().splitlines(keepends=True)
    except OSError as error:
        raise ApiError(503, f"The metrics cannot be read now: {error}", retry_after=2) from None
    ours = ("blockzoo_", "# HELP blockzoo_", "# TYPE blockzoo_")
    return "".join(line for line in lines if line.startswith(ours)).encode()


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
    outputs = _Outputs(result)
    problem = outputs.text("error")
    if problem is not None:
        raise of_engine(outputs.text("error_status") or "UNKNOWN", problem)
    token_ids, prompt_ids = outputs.integers("token_ids"), outputs.integers("prompt_token_ids")
    prompt = None
    if prompt_ids:
        tops = outputs.tops("prompt_top", len(prompt_ids) - 1)
        prompt = PromptTokens(tuple(prompt_ids), tuple(outputs.reals("prompt_log_probs")), tops)
    return Delta(
        outputs.text("text_output") or "",
        tuple(token_ids),
        tuple(outputs.reals("output_log_probs")),
        outputs.tops("top", len(token_ids)),
        outputs.text("finish_reason"),
        sum(outputs.integers("num_prompt_tokens")),
        sum(outputs.integers("num_cached_tokens")),
        prompt,
    )


class _Outputs:
    """The tensors of one response, whatever their shapes. (`as_numpy` looks through all for each of them.)"""

    def __init__(self, result: Any) -> None:
        response = result.get_response()
        names = [output.name for output in response.outputs]
        self._raw: dict[str, bytes] = dict(zip(names, response.raw_output_contents, strict=True))

    def text(self, name: str) -> str | None:
        """The only text of a tensor, behind its length of 4 bytes; None where there is no such tensor."""
        raw = self._raw.get(name)
        return None if raw is None else raw[4:].decode()

    def integers(self, name: str) -> list[int]:
        """Of an INT32 tensor; [] where there is none."""
        raw = self._raw.get(name)
        return np.frombuffer(raw, "<i4").tolist() if raw else []

    def reals(self, name: str) -> list[float]:
        """Of an FP32 tensor; [] where there is none."""
        raw = self._raw.get(name)
        return np.frombuffer(raw, "<f4").tolist() if raw else []

    def tops(self, name: str, num_tokens: int) -> Tops:
        """The likeliest tokens in the places of `num_tokens`; () where there are none."""
        ids = self.integers(f"{name}_token_ids")
        if not ids:
            return ()
        pairs = list(zip(ids, self.reals(f"{name}_log_probs"), strict=True))
        size = len(pairs) // num_tokens
        return tuple(tuple(pairs[begin : begin + size]) for begin in range(0, len(pairs), size))
