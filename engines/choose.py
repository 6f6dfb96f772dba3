"""The choice of a backend by name; each is imported only when it is chosen."""

from __future__ import annotations

import logging
from typing import Literal, get_args

from blockzoo.engines.base import EngineError, EngineMaker, Precision
from blockzoo.engines.kv_pages import KVChoice
from blockzoo.zoo.store import Zoo

_LOG = logging.getLogger(__name__)

Backend = Literal["openvino", "reference", "tensorrt"]


def make_engines(
    backend: Backend | None = None,
    precision: Precision | None = None,
    *,
    device: str | None = None,
    num_threads: int | None = None,
    zoo: Zoo | None = None,
    int8_activations: bool | None = None,
    kv_precision: KVChoice | None = None,
) -> EngineMaker:
    """The engine maker of a backend.

    Args:
        backend: None takes openvino.
        precision: None leaves the backend's choice for the machine.
        device: "cpu", "cuda", "cuda:<n>"; None leaves the backend's choice.
        num_threads: CPU threads; None leaves the backend's choice.
        zoo: whose plans the tensorrt backend runs.
        int8_activations: see `OpenVINOEngines`; None takes them where most weights of the zoo are quantized,
            no precision is given, and this CPU is faster so.
        kv_precision: "u8" keeps K and V in 8 bits; "auto" does where the zoo's models were all found to lose
            no more by that than by bf16, and the backend can; others: see `OpenVINOEngines`. None: the
            backend's choice.

    Raises:
        EngineError: the backend, device or precision is not available here.
    """
    backend = backend or "openvino"
    held = kv_precision
    if held == "auto":
        against = _against_u8(backend, zoo)
        held = "u8" if against is None else None
        if against is not None:
            _LOG.warning("KV is not kept in 8 bits: %s", against)
    if backend == "openvino":
        if device not in (None, "cpu"):
            raise EngineError(
                f"device {device!r}: the openvino backend runs on the cpu; use backend reference"
            )
        from blockzoo.engines.openvino import OpenVINOEngines
        from blockzoo.engines.openvino.engine import prefers_int8

        if int8_activations is None:
            int8_activations = precision is None and zoo is not None and _is_quantized(zoo) and prefers_int8()
        return OpenVINOEngines(precision, num_threads, int8_activations=int8_activations, kv_precision=held)
    if int8_activations:
        raise EngineError(f"int8 activations are the openvino backend's; {backend} has none")
    if backend in ("reference", "tensorrt"):
        try:
            from blockzoo.engines.reference import ReferenceEngines
            from blockzoo.engines.tensorrt.engine import TensorRTEngines
        except ModuleNotFoundError as error:
            raise EngineError(
                f"the {backend} backend needs torch ({error}): pip install blockzoo[torch]"
            ) from error
        if backend == "reference":
            return ReferenceEngines(precision, device, num_threads, kv_precision=held)
        if zoo is None:
            raise EngineError("the tensorrt backend runs the plans of a zoo; none was given")
        if held not in (None, precision):
            raise EngineError(
                f"KV in {held} was asked for; the tensorrt backend keeps it in the precision: leave it out"
            )
        return TensorRTEngines(zoo, precision, device)
    raise EngineError(f"backend {backend!r}: expected one of {', '.join(get_args(Backend))}")


def _against_u8(backend: Backend, zoo: Zoo | None) -> str | None:
    """Why KV in 8 bits is not to be had without loss; None where no model loses more by it than by bf16."""
    if backend != "openvino":
        return f"backend {backend} does not choose by itself"
    if zoo is None:
        return "there is no zoo to look into"
    from blockzoo.engines.openvino.engine import against_u8

    for name, model in sorted(zoo.manifest.models.items()):
        unfit = against_u8(zoo.manifest.blocks[key].spec for key in model.chain)
        if unfit is not None:
            return f"{name} has {unfit}"
        found = model.verification.kv if model.verification is not None else None
        if found is None:
            return f"what {name} loses in 8 bits was not measured; zoo-compile does as it verifies a model"
        if not found.excess <= 1:
            return f"{name} loses {found.excess:.2g} times what it loses by bf16 (see zoo-inspect)"
    return None


def _is_quantized(zoo: Zoo) -> bool:
    """Whether quantized blocks are most of a zoo, by their bytes."""
    blocks = zoo.manifest.blocks.values()
    plain = sum(block.num_bytes for block in blocks if not block.is_quantized)
    return plain < sum(block.num_bytes for block in blocks) / 4
