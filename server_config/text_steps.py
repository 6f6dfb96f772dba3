"""The steps before and after the engine in a tenant's ensemble: text -> token ids, and text out.

Both also serve on their own: `preprocessing` tokenizes, `postprocessing` turns token ids into text.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blockzoo.runtime.api.errors import InvalidRequestError, OverloadedError, RequestError
from blockzoo.runtime.serve.model_files import reason
from blockzoo.runtime.text.prompt import check_size
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.server_config.answer import Response, integers, send, strings
from blockzoo.server_config.fair_queue import FairQueue
from blockzoo.server_config.repository import ServerSettings, tenant_input
from blockzoo.server_config.schema import checked_text, did_you_mean, time_limit
from blockzoo.server_config.tensors import REQUEST_ID
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.heap import trim_heap
from blockzoo.zoo.manifest import ModelRecord
from blockzoo.zoo.store import Zoo, manifest_stamp

Tensors = Mapping[str, np.ndarray]
_PREFIX = tenant_input("")
_SHORT_BYTES, _SHORT_WAITING, _LONG_WAITING = 1 << 16, 64 << 20, 128 << 20  # as in front.py
_LOOK_EVERY_S, _MAX_LOOKED_AT = 0.1, 4096
_OK = {"text_output": strings("ok")}


class ServedText(NamedTuple):
    """What the steps need of a model: its tokenizer, and the most tokens that a prompt can have."""

    tokenizer: Tokenizer
    max_tokens: int


class Tokenizers:
    """The tokenizer of each model of a zoo, as it is on disk now; equal ones are loaded once.

    Models whose tokenizer is damaged are answered with the reason.

    Args:
        path: of the zoo.
        max_model_len: of the engine, where it is set.

    Raises:
        ZooError: it cannot be read.
    """

    def __init__(self, path: str, max_model_len: int | None = None) -> None:
        self._path = Path(path)
        self._max_model_len = max_model_len
        self._loaded: dict[Path, Tokenizer] = {}
        self._of_model: dict[str, ServedText] = {}
        self._damaged: dict[str, str] = {}
        self._read()

    @classmethod
    def of_model(cls, args: Mapping[str, str]) -> Tokenizers:
        """Those that Triton's arguments to `TritonPythonModel.initialize` name."""
        settings = ServerSettings.of_model(args)
        return cls(settings.zoo, settings.engine.get("max_model_len"))

    def _read(self) -> None:
        self._seen = manifest_stamp(self._path)
        zoo = Zoo.open(self._path)
        loaded: dict[Path, Tokenizer] = {}
        of_model, damaged = {}, {}
        for name, record in zoo.manifest.models.items():
            try:
                folder = zoo.tokenizer_dir(name)
                loaded[folder] = loaded.get(folder) or self._loaded.get(folder) or Tokenizer.load(folder)
            except ZooError as error:
                damaged[name] = reason(error, zoo.path)
            else:
                of_model[name] = ServedText(loaded[folder], self._max_tokens(record))
        self._loaded, self._of_model, self._damaged = loaded, of_model, damaged

    def _max_tokens(self, model: ModelRecord) -> int:
        """At least what the engine takes, which knows it exactly."""
        return min(model.config.max_length, self._max_model_len or model.config.max_length)

    def __getitem__(self, model: str) -> ServedText:
        if manifest_stamp(self._path) != self._seen:
            with suppress(ZooError):  # a zoo that cannot be read changes nothing
                self._read()
        if model in self._damaged:
            raise InvalidRequestError(f"model {model!r} is left out: {self._damaged[model]}")
        if model not in self._of_model:
            names = tuple(sorted(self._of_model))
            raise InvalidRequestError(f"there is no model {model!r:.200}; {did_you_mean(model, names)}")
        return self._of_model[model]


class Preprocessor:
    """`text_input@<tenant>` -> `input_ids` and `model`, tokenized in turns of the tenants.

    Args:
        pb: the `triton_python_backend_utils` module.
    """

    def __init__(self, tokenizers: Tokenizers, pb: Any) -> None:
        self._tokenizers, self._pb = tokenizers, pb
        self._short = FairQueue("blockzoo-short", 2, _SHORT_WAITING)
        self._long = FairQueue("blockzoo-long", 1, _LONG_WAITING)

    def handle(self, request: Any) -> None:
        """Take one request; its sender gets exactly one response, here or later."""
        sender = request.get_response_sender()
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if "health" in inputs:
                send(
                    self._pb, sender, Response({"input_ids": integers([]), "model": strings("")}, final=True)
                )
                return
            names = [name for name in inputs if name.startswith(_PREFIX)]
            if len(names) != 1:
                raise InvalidRequestError(f"send one {_PREFIX}<model>; {len(names)} were sent")
            if inputs[names[0]].size != 1:
                raise InvalidRequestError(f"text_input has {inputs[names[0]].size} elements; expected 1")
            text = checked_text(inputs[names[0]].reshape(-1)[0], "text_input")
            if not text:
                raise InvalidRequestError("text_input is empty; send at least one character")
            model, deadline = names[0].removeprefix(_PREFIX), _deadline(request)
            is_short = len(text) <= _SHORT_BYTES
            waiting, work = (self._short, self._tokenize) if is_short else (self._long, self._tokenize_long)
            waiting.put(model, None, len(text), partial(work, sender, model, text, deadline))
        except BaseException as error:
            _fail(self._pb, sender, error)

    def close(self, timeout_s: float) -> None:
        """Let what waits finish for up to `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for waiting in (self._short, self._long):
            waiting.drain(deadline - time.monotonic())
            waiting.close()

    def _tokenize(self, sender: Any, model: str, text: str, deadline: float) -> None:
        """A thread of the queue."""
        try:
            if sender.is_cancelled():
                raise InvalidRequestError("the request was cancelled")
            if time.monotonic() > deadline:
                raise InvalidRequestError("the request took longer than its timeout")
            served = self._tokenizers[model]
            check_size(served.tokenizer, [text], served.max_tokens)
            ids = served.tokenizer.encode(text)
        except BaseException as error:  # a tokenizer that panics raises no Exception
            _fail(self._pb, sender, error)
            return
        with suppress(Exception):  # who asked is gone
            send(
                self._pb, sender, Response({"input_ids": integers(ids), "model": strings(model)}, final=True)
            )

    def _tokenize_long(self, sender: Any, model: str, text: str, deadline: float) -> None:
        """The same of a long text, which takes some 200 times its size meanwhile."""
        self._tokenize(sender, model, text, deadline)
        trim_heap()


class Postprocessor:
    """`text` -> `text_output` as it is; or `token_ids` of `model` -> `text_output`.

    In an ensemble the engine's text goes through unchanged. It is made where stop words are looked for; to
    make it here again would take a detokenizer's state per request, in a process that never hears of the end
    of a request that was aborted.

    Args:
        pb: the `triton_python_backend_utils` module.
        tell_abandoned: called with the engine's id of a stream whose client has gone.
    """

    def __init__(self, tokenizers: Tokenizers, pb: Any, tell_abandoned: Callable[[str], None]) -> None:
        self._tokenizers, self._pb = tokenizers, pb
        self._tell_abandoned = tell_abandoned
        self._next_look: dict[bytes, float] = {}  # at streams, by their id

    def respond(self, request: Any) -> Any:
        """The response to one request, returned from `execute`: senders cost a round trip per token."""
        pb = self._pb
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if REQUEST_ID.name in inputs:
                self._look_at_client(request, inputs[REQUEST_ID.name].reshape(-1)[0])
            outputs = self.answer(inputs)
            return pb.InferenceResponse([pb.Tensor(name, array) for name, array in outputs.items()])
        except BaseException as error:  # a tokenizer that panics raises no Exception
            message, status = _explain(pb, error)
            return pb.InferenceResponse([], error=pb.TritonError(message, getattr(pb.TritonError, status)))

    def _look_at_client(self, request: Any, stream: bytes) -> None:
        now = time.monotonic()
        if now < self._next_look.get(stream, now):
            return
        if len(self._next_look) >= _MAX_LOOKED_AT:  # most of them have ended
            self._next_look.clear()
        self._next_look[stream] = now + _LOOK_EVERY_S
        if request.is_cancelled():  # a round trip of some 0.05 ms
            self._tell_abandoned(stream.decode("ascii", "replace"))

    def answer(self, inputs: Tensors) -> dict[str, np.ndarray]:
        """Its tensors. Raises InvalidRequestError."""
        if "health" in inputs:
            return _OK
        if "text" in inputs:
            return {"text_output": inputs["text"]}
        if not {"token_ids", "model"} <= inputs.keys():
            raise InvalidRequestError("send token_ids and model, or text")
        served = self._tokenizers[checked_text(inputs["model"].reshape(-1)[0], "model")]
        if inputs["token_ids"].size > served.max_tokens:
            raise InvalidRequestError(
                f"token_ids has {inputs['token_ids'].size} tokens; expected at most {served.max_tokens}"
            )
        tokenizer = served.tokenizer
        ids = inputs["token_ids"].reshape(-1).tolist()
        wrong = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
        if wrong:
            raise InvalidRequestError(f"token_ids has {wrong[0]}; expected 0 to {tokenizer.vocab_size - 1}")
        return {"text_output": strings(tokenizer.decode(ids, skip_special_tokens=True))}


def _deadline(request: Any) -> float:
    """When the client's time ends. Raises InvalidRequestError."""
    parameters = json.loads(request.parameters() or "{}")
    limit = time_limit({"timeout": request.timeout() or parameters.get("timeout")})
    return math.inf if limit is None else time.monotonic() + limit


def _fail(pb: Any, sender: Any, error: BaseException) -> None:
    message, status = _explain(pb, error)
    with suppress(Exception):  # who asked is gone
        send(pb, sender, Response(error=message, final=True, status=status))


def _explain(pb: Any, error: BaseException) -> tuple[str, str]:
    """What to tell a client of an error: message and status."""
    if isinstance(error, RequestError):
        return str(error), "UNAVAILABLE" if isinstance(error, OverloadedError) else "INVALID_ARG"
    pb.Logger.log_error("".join(traceback.format_exception(error)))  # a bug of ours: the server goes on
    return f"internal error: {error}", "INTERNAL"
