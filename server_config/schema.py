"""What the tensors of a generation request mean: Triton inputs -> a prompt and SamplingParams.

Defaults are those of the TensorRT-LLM backend. Knows nothing of Triton's Python API: arrays in, one frozen
object out, every refusal an `InvalidRequestError` or `UnknownModelError` that says what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, cast, get_args

import numpy as np

from blockzoo.runtime.api.errors import InvalidRequestError, UnknownModelError
from blockzoo.runtime.api.request import MAX_WORDS, GuidedDecoding, GuideKind, KVReuse, SamplingParams
from blockzoo.runtime.text.prompt import MAX_DOCUMENTS
from blockzoo.server_config.tensors import HEALTH_INPUT, INPUTS, RELOAD_INPUT

MAX_TEXT_BYTES = 1 << 20
MAX_SCOPE_CHARS = 256
MAX_NAME_CHARS = 128

# what Triton itself puts among a request's parameters; every other one is a misspelled input
TRITON_PARAMETERS = frozenset(
    (
        "id",
        "timeout",
        "priority",
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "binary_data_output",
        "triton_enable_empty_final_response",
    )
)

_SAMPLING_FIELD_OF = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "random_seed": "seed",
    "stop_words": "stop",
    "bad_words": "bad_words",
    "min_length": "min_tokens",
}
_GUIDES: dict[str, GuideKind] = {
    "json": "json",
    "json_schema": "json_schema",
    "regex": "regex",
    "lark_grammar": "lark",
}
_JSON_KEYS = tuple(f.name for f in fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A generation request, checked as far as it can be without the engine.

    Attributes:
        model: a name of the zoo.
        prompt: text, or token ids.
        params: how to sample.
        stream: a response for each step that gives tokens (mostly one) instead of one in all.
        echo: text to put before the answer ("" where none is wanted).
        kv_scope: see `EngineThread.submit`.
        kv_reuse: see `EngineThread.submit`.
        documents: texts put before the prompt, see `LLMEngine.prepare`.
        timeout_s: the client's own limit, from Triton's `timeout` parameter; None without one.
    """

    model: str
    prompt: str | list[int]
    params: SamplingParams
    stream: bool
    echo: str
    kv_scope: str | None
    kv_reuse: KVReuse | None
    documents: tuple[str, ...]
    timeout_s: float | None


def parse_request(
    inputs: Mapping[str, np.ndarray],
    parameters: Mapping[str, Any],
    end_ids: Mapping[str, tuple[int, ...]],
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> ParsedRequest:
    """Read one request.

    Args:
        inputs: the tensors that were sent, of any shape; STRING tensors hold bytes.
        parameters: the request's parameters. Triton's generate endpoint turns JSON keys that name no
            input into parameters, so unknown ones are refused here.
        end_ids: models served, with their end-of-sequence token ids.
        left_out: models that are not, and why.

    Raises:
        InvalidRequestError, UnknownModelError.
    """
    _refuse_unknown(parameters)
    model = _model(inputs, end_ids, left_out)
    _refuse_unsupported(inputs, end_ids[model])
    text = _text(inputs, "text_input")
    stream = _flag(inputs, "stream")
    prompt = _prompt(inputs, text)
    # the backend echoes the prompt in its only response, never in a stream
    echo = "" if stream or _flag(inputs, "exclude_input_in_output") else text or ""
    kv_reuse = _text(inputs, "kv_reuse")
    if kv_reuse not in (None, "", *get_args(KVReuse)):
        raise InvalidRequestError(f"kv_reuse is {kv_reuse!r}; expected {' or '.join(get_args(KVReuse))}")
    reuse = cast("KVReuse | None", kv_reuse or None)
    kv_scope = _text(inputs, "kv_scope")
    if kv_scope is not None and len(kv_scope) > MAX_SCOPE_CHARS:
        raise InvalidRequestError(f"kv_scope has {len(kv_scope)} characters; at most {MAX_SCOPE_CHARS}")
    params = _sampling_params(inputs)
    documents = _words(inputs, "documents", MAX_DOCUMENTS) if "documents" in inputs else ()
    timeout = time_limit(parameters)
    return ParsedRequest(model, prompt, params, stream, echo, kv_scope or None, reuse, documents, timeout)


def num_bytes(array: np.ndarray) -> int:
    """What was sent for a tensor."""
    return sum(map(len, array.reshape(-1))) if array.dtype == object else array.nbytes


def checked_text(value: bytes, name: str) -> str:
    """Text of a STRING element. Raises InvalidRequestError when it is too long or not UTF-8."""
    if len(value) > MAX_TEXT_BYTES:
        raise InvalidRequestError(f"{name} has {len(value)} bytes; expected at most {MAX_TEXT_BYTES}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{name} is not UTF-8 (byte 0x{value[error.start]:02x} at {error.start}); encode it as UTF-8"
        ) from None


def time_limit(parameters: Mapping[str, Any]) -> float | None:
    """Seconds of Triton's parameter `timeout`; None where it is not set. Raises InvalidRequestError."""
    microseconds = parameters.get("timeout")
    if microseconds in (None, 0):
        return None
    try:
        seconds = float(microseconds) / 1e6
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequestError(f"timeout is {microseconds!r}; expected a number of microseconds")
    return seconds


def did_you_mean(name: str, known: tuple[str, ...]) -> str:
    """The nearest known name as a question, or all of them."""
    close = get_close_matches(name[:MAX_NAME_CHARS], known, 1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"


def _refuse_unknown(parameters: Mapping[str, Any]) -> None:
    for name in parameters:
        if name not in TRITON_PARAMETERS:
            known = tuple(field.name for field in INPUTS if field not in (HEALTH_INPUT, RELOAD_INPUT))
            raise InvalidRequestError(f"there is no input {name!r:.200}; {did_you_mean(name, known)}")


def _model(
    inputs: Mapping[str, np.ndarray], end_ids: Mapping[str, tuple[int, ...]], left_out: Mapping[str, str]
) -> str:
    models = tuple(sorted(end_ids))
    name = _text(inputs, "model")
    if not name and len(models) == 1:
        return models[0]
    if not name:
        raise InvalidRequestError(f"model is missing; name one of {', '.join(models)}")
    if name not in end_ids and name in left_out:
        raise UnknownModelError(f"model {name!r} is left out: {left_out[name]}")
    if name not in end_ids:
        raise UnknownModelError(f"there is no model {name!r:.200}; {did_you_mean(name, models)}")
    return name


def _prompt(inputs: Mapping[str, np.ndarray], text: str | None) -> str | list[int]:
    if "input_ids" in inputs:
        ids = inputs["input_ids"].reshape(-1).tolist()
        if not ids:
            raise InvalidRequestError("input_ids is empty; send at least one token")
        return ids
    if text is None:
        raise InvalidRequestError("the prompt is missing; send text_input, or input_ids")
    if not text:
        raise InvalidRequestError("text_input is empty; send at least one character")
    return text


def _refuse_unsupported(inputs: Mapping[str, np.ndarray], end_ids: tuple[int, ...]) -> None:
    """Name every input of the TensorRT-LLM schema that is set to what this server does not do."""
    for name in ("beam_width", "num_return_sequences"):
        value = _scalar(inputs, name)
        if value is not None and value != 1:
            raise InvalidRequestError(f"{name} is {value}; this server generates one sequence: leave it at 1")
    for name in ("return_context_logits", "return_generation_logits"):
        if _flag(inputs, name):
            raise InvalidRequestError(f"{name} is true; logits are not returned: use return_log_probs")
    end_id = _scalar(inputs, "end_id")
    if end_id not in (None, -1) and end_id not in end_ids:
        expected = ", ".join(map(str, end_ids)) or "none"
        raise InvalidRequestError(
            f"end_id is {end_id}; the model ends at its own token ({expected}): leave it out, use stop_words"
        )
    # without padding pad_id, and without beams length_penalty, change nothing: any sane value is honoured
    length_penalty = _scalar(inputs, "length_penalty")
    if length_penalty is not None and not math.isfinite(length_penalty):
        raise InvalidRequestError(f"length_penalty is {length_penalty}; expected a finite number")


def _sampling_params(inputs: Mapping[str, np.ndarray]) -> SamplingParams:
    given = _sampling_parameters(inputs)
    for name, field in _SAMPLING_FIELD_OF.items():
        if name not in inputs:
            continue
        if field in given:
            raise InvalidRequestError(f"{name} and sampling_parameters[{field!r}] are both set; send one")
        given[field] = _words(inputs, name) if name.endswith("_words") else _scalar(inputs, name)
    guided = _guided(inputs)
    if guided is not None:
        if "guided" in given:
            raise InvalidRequestError("guided_decoding_guide and sampling_parameters['guided'] are both set")
        given["guided"] = guided
    # as in the backend: 0 is off, and where nothing asks for sampling the likeliest token is taken
    for field in ("top_p", "top_k"):
        if given.get(field) == 0:
            del given[field]
    if not given.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        given["temperature"] = 0.0
    if _flag(inputs, "return_log_probs"):
        given.setdefault("logprobs", 0)
    return SamplingParams(**given)


def _guided(inputs: Mapping[str, np.ndarray]) -> GuidedDecoding | None:
    kind, guide = _text(inputs, "guided_decoding_guide_type"), _text(inputs, "guided_decoding_guide")
    if not kind:
        if guide:
            raise InvalidRequestError(
                f"guided_decoding_guide_type is missing; expected one of {', '.join(_GUIDES)}"
            )
        return None
    if kind not in _GUIDES:
        raise InvalidRequestError(
            f"guided_decoding_guide_type is {kind!r:.200}; {did_you_mean(kind, tuple(_GUIDES))}"
        )
    return GuidedDecoding(_GUIDES[kind], "" if kind == "json" else guide or "")


def _sampling_parameters(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    text = _text(inputs, "sampling_parameters")
    if not text:
        return {}
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"sampling_parameters is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise InvalidRequestError(
            f"sampling_parameters is a JSON {type(given).__name__}; expected an object such as "
            '{"temperature": 0.7}'
        )
    for key in given:
        if key not in _JSON_KEYS:
            raise InvalidRequestError(
                f"sampling_parameters has the unknown key {key!r:.200}; {did_you_mean(key, _JSON_KEYS)}"
            )
    return given


def _scalar(inputs: Mapping[str, np.ndarray], name: str) -> Any:
    """The only element of a tensor as a Python value; None when it was not sent."""
    array = inputs.get(name)
    if array is None:
        return None
    if array.size != 1:
        raise InvalidRequestError(f"{name} has {array.size} elements; expected 1")
    value = array.reshape(-1)[0]
    if array.dtype == np.float32:
        return float(str(value))  # 0.7 as it was written, not 0.699999988
    return value.item() if isinstance(value, np.generic) else value


def _flag(inputs: Mapping[str, np.ndarray], name: str) -> bool:
    return bool(_scalar(inputs, name))


def _text(inputs: Mapping[str, np.ndarray], name: str) -> str | None:
    value = _scalar(inputs, name)
    return None if value is None else checked_text(value, name)


def _words(inputs: Mapping[str, np.ndarray], name: str, limit: int = MAX_WORDS) -> tuple[str, ...]:
    """Clients of the backend send one empty word for none."""
    if inputs[name].size > limit:  # before any is looked at
        raise InvalidRequestError(f"{name} has {inputs[name].size} texts; expected at most {limit}")
    words = (checked_text(word, name) for word in inputs[name].reshape(-1).tolist())
    return tuple(word for word in words if word)
