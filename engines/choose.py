"""The choice of a backend by name; each is imported only when it is chosen."""

from __future__ import annotations

from typing import Literal, get_args

from blockzoo.engines.base import EngineError, EngineMaker, Precision

Backend = Literal["openvino", "reference"]


def make_engines(
    backend: Backend | None = None,
    precision: Precision | None = None,
    *,
    device: str | None = None,
    num_threads: int | None = None,
) -> EngineMaker:
    """The engine maker of a backend.

    Args:
        backend: None takes openvino.
        precision: None leaves the backend's choice for the machine.
        device: of the reference backend: "cpu", "cuda", "cuda:<n>"; None leaves its choice.
        num_threads: CPU threads; None leaves the backend's choice.

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
    if backend == "reference":
        try:
            from blockzoo.engines.reference import ReferenceEngines
        except ModuleNotFoundError as error:
            raise EngineError(
                f"the reference backend needs torch ({error}): pip install blockzoo[torch]"
            ) from error
        return ReferenceEngines(precision, device, num_threads)
    raise EngineError(f"backend {backend!r}: expected one of {', '.join(get_args(Backend))}")
