"""The steps before and after the engine in a tenant's ensemble: text -> token ids, and text out.

Both also serve on their own: `preprocessing` tokenizes, `postprocessing` turns token ids into text.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from blockzoo.runtime.api.errors import InvalidRequestError, RequestError
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.server_config.answer import integers, strings
from blockzoo.server_config.repository import tenant_input
from blockzoo.server_config.schema import checked_text, did_you_mean
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.store import Zoo, manifest_stamp

Tensors = Mapping[str, np.ndarray]
Step = Callable[[Tensors], Tensors]
_PREFIX = tenant_input("")


class Tokenizers:
    """The tokenizer of each model of a zoo, as it is on disk now; equal ones are loaded once.

    Args:
        path: of the zoo.

    Raises:
        ZooError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._loaded: dict[Path, Tokenizer] = {}
        self._of_model: dict[str, Tokenizer] = {}
        self._read()

    def _read(self) -> None:
        self._seen = manifest_stamp(self._path)
        zoo = Zoo.open(self._path)
        folders = {name: zoo.tokenizer_dir(name) for name in zoo.manifest.models}
        loaded = {folder: self._loaded.get(folder) or Tokenizer.load(folder) for folder in folders.values()}
        self._loaded = loaded
        self._of_model = {name: loaded[folder] for name, folder in folders.items()}

    def __getitem__(self, model: str) -> Tokenizer:
        if manifest_stamp(self._path) != self._seen:
            with suppress(ZooError):  # a zoo that cannot be read changes nothing
                self._read()
        if model not in self._of_model:
            names = tuple(sorted(self._of_model))
            raise InvalidRequestError(f"there is no model {model!r}; {did_you_mean(model, names)}")
        return self._of_model[model]


class Preprocessor:
    """`text_input@<tenant>` -> `input_ids` and `model`."""

    def __init__(self, tokenizers: Tokenizers) -> None:
        self._tokenizers = tokenizers

    def __call__(self, inputs: Tensors) -> dict[str, np.ndarray]:
        """One request. Raises InvalidRequestError."""
        names = [name for name in inputs if name.startswith(_PREFIX)]
        if len(names) != 1:
            raise InvalidRequestError(f"send one {_PREFIX}<model>; {len(names)} were sent")
        model = names[0].removeprefix(_PREFIX)
        text = checked_text(inputs[names[0]].reshape(-1)[0], "text_input")
        if not text:
            raise InvalidRequestError("text_input is empty; send at least one character")
        return {"input_ids": integers(self._tokenizers[model].encode(text)), "model": strings(model)}


class Postprocessor:
    """`text` -> `text_output` as it is; or `token_ids` of `model` -> `text_output`.

    In an ensemble the engine's text goes through unchanged. It is made where stop words are looked for; to
    make it here again would take a detokenizer's state per request, in a process that never hears of the end
    of a request that was aborted.
    """

    def __init__(self, tokenizers: Tokenizers) -> None:
        self._tokenizers = tokenizers

    def __call__(self, inputs: Tensors) -> dict[str, np.ndarray]:
        """One request. Raises InvalidRequestError."""
        if "text" in inputs:
            return {"text_output": inputs["text"]}
        if not {"token_ids", "model"} <= inputs.keys():
            raise InvalidRequestError("send token_ids and model, or text")
        tokenizer = self._tokenizers[checked_text(inputs["model"].reshape(-1)[0], "model")]
        ids = inputs["token_ids"].reshape(-1).tolist()
        wrong = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
        if wrong:
            raise InvalidRequestError(f"token_ids has {wrong[0]}; expected 0 to {tokenizer.vocab_size - 1}")
        return {"text_output": strings(tokenizer.decode(ids, skip_special_tokens=True))}


def run_step(
    step: Callable[[Tensors], Mapping[str, np.ndarray]], requests: Iterable[Any], pb: Any
) -> list[Any]:
    """Answer the requests of one `execute` call, each by its own response or error."""
    return [_respond(step, request, pb) for request in requests]


def _respond(step: Step, request: Any, pb: Any) -> Any:
    try:
        outputs = step({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in outputs.items()])
    except RequestError as error:
        return pb.InferenceResponse([], error=pb.TritonError(str(error), pb.TritonError.INVALID_ARG))
    except Exception as error:  # a bug of ours: this request ends, the server goes on
        pb.Logger.log_error(traceback.format_exc())
        return pb.InferenceResponse(
            [], error=pb.TritonError(f"internal error: {error}", pb.TritonError.INTERNAL)
        )
