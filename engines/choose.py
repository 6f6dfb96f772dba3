"""The choice of a backend by name; each is imported only when it is chosen."""

from __future__ import annotations

from typing import Literal, get_args

from blockzoo.engines.base import EngineError, EngineMaker, Precision
from blockzoo.engines.kv_pages import KVChoice
from blockzoo.zoo.store import Zoo

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
            no more by that than by bf16, and the backend can; None: in the precision.

    Raises:
        EngineError: the backend, device or precision is not available here.
    """
    backend = backend or "openvino"
    in_u8: Literal["u8"] | None = None
    if kv_precision == "u8" or (kv_precision == "auto" and backend == "openvino" and _bears_u8(zoo)):
        in_u8 = "u8"
    if backend == "openvino":
        if device not in (None, "cpu"):
            raise EngineError(
                f"device {device!r}: the openvino backend runs on the cpu; use backend reference"
            )
        from blockzoo.engines.openvino import OpenVINOEngines
        from blockzoo.engines.openvino.engine import prefers_int8

        if int8_activations is None:
            int8_activations = precision is None and zoo is not None and _is_quantized(zoo) and prefers_int8()
        return OpenVINOEngines(precision, num_threads, int8_activations=int8_activations, kv_precision=in_u8)
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
            return ReferenceEngines(precision, device, num_threads, kv_precision=in_u8)
        if zoo is None:
            raise EngineError("the tensorrt backend runs the plans of a zoo; none was given")
        if in_u8:
            raise EngineError("KV in u8 was asked for; the tensorrt backend does not read it: leave it out")
        return TensorRTEngines(zoo, precision, device)
    raise EngineError(f"backend {backend!r}: expected one of {', '.join(get_args(Backend))}")


def _bears_u8(zoo: Zoo | None) -> bool:
    """Whether all models of a zoo were verified with KV in 8 bits, and lost no more than by bf16."""
    if zoo is None:
        return False
    checks = [model.verification for model in zoo.manifest.models.values()]
    return all(check is not None and check.kv is not None and check.kv.excess <= 1 for check in checks)


def _is_quantized(zoo: Zoo) -> bool:
    """Whether quantized blocks are most of a zoo, by their bytes."""
    blocks = zoo.manifest.blocks.values()
    plain = sum(block.num_bytes for block in blocks if block.dtype not in ("i8", "i4"))
    return plain < sum(block.num_bytes for block in blocks) / 4
