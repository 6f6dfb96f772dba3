"""The choice of a backend by name; each is imported only when it is chosen."""

from __future__ import annotations

from typing import Literal, get_args

from blockzoo.engines.base import EngineError, EngineMaker, Precision
from blockzoo.zoo.store import Zoo

Backend = Literal["openvino", "reference", "tensorrt"]


def make_engines(
    backend: Backend | None = None,
    precision: Precision | None = None,
    *,
    device: str | None = None,
    num_threads: int | None = None,
    zoo: Zoo | None = None,
) -> EngineMaker:
    """The engine maker of a backend.

    Args:
        backend: None takes openvino.
        precision: None leaves the backend's choice for the machine.
        device: "cpu", "cuda", "cuda:<n>"; None leaves the backend's choice.
        num_threads: CPU threads; None leaves the backend's choice.
        zoo: whose plans the tensorrt backend runs.

    Raises:
        EngineError: the backend, device or precision is not available here.
    """
    backend = backend or "openvino"
    if backend == "openvino":
        if device not in (None, "cpu"):
            raise EngineError(
                f"device {device!r}: the openvino backend runs on the cpu; use backend reference"
            )
        from blockzoo.engines.openvino import OpenVINOEngines

        return OpenVINOEngines(precision, num_threads)
    if backend in ("reference", "tensorrt"):
        try:
            from blockzoo.engines.reference import ReferenceEngines
            from blockzoo.engines.tensorrt.engine import TensorRTEngines
        except ModuleNotFoundError as error:
            raise EngineError(
                f"the {backend} backend needs torch ({error}): pip install blockzoo[torch]"
            ) from error
        if backend == "reference":
            return ReferenceEngines(precision, device, num_threads)
        if zoo is None:
            raise EngineError("the tensorrt backend runs the plans of a zoo; none was given")
        return TensorRTEngines(zoo, precision, device)
    raise EngineError(f"backend {backend!r}: expected one of {', '.join(get_args(Backend))}")
