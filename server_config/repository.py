"""A zoo -> a Triton model repository.

    blockzoo          the engine: text or token ids in, text and token ids out, one response per step
    blockzoo_unary    the same for plain `infer` calls, which Triton refuses to decoupled models
    preprocessing     text -> token ids; one optional text input per tenant says which tokenizer and model
    postprocessing    engine text -> client text; token ids -> text
    <tenant>          preprocessing -> blockzoo -> postprocessing: configuration only, no process

Two Python models are two processes, so the engine lives in `blockzoo` alone and the ensembles share it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from blockzoo.server_config.tensors import (
    HEALTH_INPUT,
    INPUT_IDS,
    INPUTS,
    MODEL,
    OUTPUTS,
    REQUEST_ID,
    SAMPLING_INPUTS,
    TEXT_INPUT,
    TEXT_OUTPUT,
    TensorField,
)
from blockzoo.zoo.errors import ZooError
from blockzoo.zoo.names import RESERVED_NAMES
from blockzoo.zoo.store import Zoo

ENGINE, UNARY, PREPROCESSING, POSTPROCESSING = RESERVED_NAMES
_POSTPROCESSING_INPUTS = (
    TensorField("text", "STRING"),
    TensorField("token_ids", "INT32", (-1,)),
    MODEL,
    REQUEST_ID,
    HEALTH_INPUT,
)
_VALID_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
# Clients of the TensorRT-LLM backend send a batch dimension. No model has dynamic batching: bursts of some
# 1,500 requests within a second were seen to hang Triton's batcher for good (2.51).
_ONE_BY_ONE = "max_batch_size: 1\n"
_DECOUPLED = "model_transaction_policy { decoupled: true }\n"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What the models of a repository are told, as their parameter `settings`.

    Attributes:
        zoo: absolute path.
        engine: fields of `EngineConfig` that differ from its defaults.
        drain_s: seconds that running requests have when the model is unloaded.
        control_dir: folder shared with the launcher; None without one.
        publish: absolute paths of files with documents to publish.
        grpc: host:port at which the server's models reach its own gRPC endpoint.
    """

    zoo: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    drain_s: float = 30.0
    control_dir: str | None = None
    publish: tuple[str, ...] = ()
    grpc: str = "127.0.0.1:8001"

    @classmethod
    def of_model(cls, args: Mapping[str, str]) -> ServerSettings:
        """Read them from what Triton gives to `TritonPythonModel.initialize`."""
        config = json.loads(args["model_config"])
        settings = json.loads(config["parameters"]["settings"]["string_value"])
        return cls(**settings | {"publish": tuple(settings["publish"])})


def write_repository(folder: Path, settings: ServerSettings) -> tuple[str, ...]:
    """Write the model repository of `settings.zoo` into `folder`, which must be new or empty.

    Returns:
        The names of the models served, sorted.

    Raises:
        ZooError: the zoo cannot be read, a name does not suit Triton, or the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ZooError(f"{folder} is not empty; name a new folder for the model repository")
    return update_repository(folder, settings)


def update_repository(
    folder: Path,
    settings: ServerSettings,
    tenants: Sequence[str] | None = None,
    inputs: Sequence[str] = (),
) -> tuple[str, ...]:
    """Bring a model repository, perhaps one that a server looks through, in line with its zoo.

    Files appear complete and only where they change, so that Triton loads again what has to be. Scratch files
    lie beside the folder.

    Args:
        tenants: models to serve; None: all of the zoo.
        inputs: tenants that `preprocessing` has inputs for, besides those.

    Returns:
        The names of the models served, sorted.

    Raises:
        ZooError: the zoo cannot be read, or a name does not suit Triton.
    """
    if tenants is None:
        zoo = Zoo.open(settings.zoo)
        tenants = tuple(zoo.manifest.models)
        if not tenants:
            raise ZooError(f"{zoo.path} holds no models; add one with zoo-compile")
    tenants = tuple(sorted(tenants))
    for name in tenants:
        check_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in configurations(tenants, settings, sorted({*tenants, *inputs})).items():
        _write_model(folder / name, text)
    for stale in {path.name for path in folder.iterdir()} - {*tenants, *RESERVED_NAMES}:
        shutil.rmtree(folder / stale)
    return tenants


def _write_model(folder: Path, text: str) -> None:
    config = folder / "config.pbtxt"
    if config.exists():
        if config.read_text() != text:
            unfinished = folder.parent.with_name(f"{folder.name}.unfinished")
            unfinished.write_text(text)
            unfinished.rename(config)
        return
    unfinished = folder.parent.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    version = unfinished / "1"
    version.mkdir(parents=True)
    (unfinished / "config.pbtxt").write_text(text)
    if folder.name in RESERVED_NAMES:
        source = resources.files("blockzoo.server_config") / "models" / folder.name / "1" / "model.py"
        (version / "model.py").write_bytes(source.read_bytes())
    unfinished.rename(folder)


def check_name(name: str) -> None:
    """Refuse a name that cannot be a Triton model beside ours. Raises ZooError."""
    if name in RESERVED_NAMES:
        raise ZooError(f"model {name!r} has the name of a server model; compile it under another name")
    if not _VALID_NAME.fullmatch(name):
        raise ZooError(
            f"model {name!r} cannot be a Triton model name; compile it under one of at most 128 letters, "
            "digits, '.', '_' and '-' that does not begin with '.' or '-'"
        )


def configurations(
    tenants: Sequence[str], settings: ServerSettings, inputs: Sequence[str] | None = None
) -> dict[str, str]:
    """The text of each model's config.pbtxt; `inputs`: tenants that preprocessing knows, None: the same."""
    known = tenants if inputs is None else inputs
    tenant_inputs = [*(TensorField(tenant_input(tenant), "STRING") for tenant in known), HEALTH_INPUT]
    return {
        ENGINE: _python_model(ENGINE, INPUTS, (*OUTPUTS, REQUEST_ID), _ONE_BY_ONE + _DECOUPLED, settings),
        UNARY: _python_model(UNARY, INPUTS, OUTPUTS, _ONE_BY_ONE, settings),
        PREPROCESSING: _python_model(PREPROCESSING, tenant_inputs, (INPUT_IDS, MODEL), _ONE_BY_ONE, settings),
        POSTPROCESSING: _python_model(
            POSTPROCESSING, _POSTPROCESSING_INPUTS, (TEXT_OUTPUT,), _ONE_BY_ONE, settings
        ),
        **{tenant: _ensemble(tenant) for tenant in tenants},
    }


def tenant_input(tenant: str) -> str:
    """The preprocessing input that takes the text of one tenant."""
    return f"text_input@{tenant}"


def _python_model(
    name: str,
    inputs: Iterable[TensorField],
    outputs: Iterable[TensorField],
    batching: str,
    settings: ServerSettings,
) -> str:
    # every input is optional: a missing one gets our own error, and a health request needs none
    return (
        f'name: "{name}"\nbackend: "python"\n{batching}'
        f"{_tensors('input', inputs, optional=True)}{_tensors('output', outputs)}"
        "instance_group [ { count: 1 kind: KIND_CPU } ]\n"  # one engine; and a stream's texts stay in order
        f"{_parameter('settings', json.dumps(asdict(settings)))}"
    )


def _ensemble(tenant: str) -> str:
    inputs = _tensors("input", [TEXT_INPUT]) + _tensors("input", SAMPLING_INPUTS, optional=True)
    sampling = {tensor.name: tensor.name for tensor in SAMPLING_INPUTS}
    passed_on = {tensor.name: tensor.name for tensor in OUTPUTS if tensor is not TEXT_OUTPUT}
    steps = (
        _step(PREPROCESSING, {tenant_input(tenant): "text_input"}, {"input_ids": "_ids", "model": "_model"}),
        _step(
            ENGINE,
            {"input_ids": "_ids", "model": "_model", "text_input": "text_input", **sampling},
            {"text_output": "_text", REQUEST_ID.name: "_request", **passed_on},
        ),
        _step(
            POSTPROCESSING,
            {"text": "_text", REQUEST_ID.name: "_request"},
            {"text_output": "text_output"},
        ),
    )
    return (
        f'name: "{tenant}"\nplatform: "ensemble"\n{_ONE_BY_ONE}'
        f"{inputs}{_tensors('output', OUTPUTS)}"
        f"ensemble_scheduling {{\n  step [\n{','.join(steps)}  ]\n}}\n"
    )


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    maps = [
        f'      {kind} {{ key: "{key}" value: "{value}" }}\n'
        for kind, mapping in (("input_map", inputs), ("output_map", outputs))
        for key, value in mapping.items()
    ]
    return f'    {{\n      model_name: "{model}"\n      model_version: -1\n{"".join(maps)}    }}\n'


def _tensors(kind: str, tensors: Iterable[TensorField], optional: bool = False) -> str:
    return "".join(
        f'{kind} {{ name: "{t.name}" data_type: TYPE_{t.data_type} dims: {list(t.dims)}'
        f"{' optional: true' if optional else ''} }}\n"
        for t in tensors
    )


def _parameter(key: str, value: str) -> str:
    # a JSON string is a valid pbtxt string, once the value is ASCII
    return f'parameters {{ key: "{key}" value: {{ string_value: {json.dumps(value)} }} }}\n'
