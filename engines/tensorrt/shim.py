"""One face over the two TensorRT libraries: `tensorrt` (data-centre GPUs) and `tensorrt_rtx` (RTX GPUs).

Both have the same Python API. They differ in what they compile for: `tensorrt` only for the GPU of the
machine, `tensorrt_rtx` for named targets too, on a machine without any GPU.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blockzoo.engines.base import EngineError
from blockzoo.zoo.manifest import TensorRTLibrary

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX compiles for without such a GPU at hand."""

TITLES: dict[TensorRTLibrary, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_INSTALL = (
    "install one: `pip install blockzoo[tensorrt]` (TensorRT-RTX: any machine, RTX and L4/L40 GPUs), or "
    "NVIDIA's `tensorrt` for A100/H100/H200/B200; see docs/tensorrt.md"
)
_SCRATCH = re.compile(r"Total Activation Memory: (\d+)")  # some versions add the unit
_LEAST_TENSORRT = 10, 15  # reads RMSNormalization and RotaryEmbedding from ONNX


@dataclass(frozen=True, slots=True)
class TensorRT:
    """A TensorRT library that can be imported.

    Attributes:
        library: its import name.
        version: of the library, as it says itself.
        module: the imported module.
    """

    library: TensorRTLibrary
    version: str
    module: Any

    @property
    def title(self) -> str:
        """Name and version for messages."""
        return f"{TITLES[self.library]} {self.version}"

    def logger(self, on_scratch: Callable[[int], None] | None = None) -> _Log:
        """A logger that keeps errors and warnings, and hears the scratch bytes of each profile built."""
        return _make_logger(self.module, on_scratch)


class _Log:
    """What TensorRT said: `native` is handed to the library, `messages` holds errors and warnings."""

    def __init__(self, native: Any, messages: list[str]) -> None:
        self.native, self.messages = native, messages

    def text(self) -> str:
        """The last messages, for an error of ours."""
        return "; ".join(self.messages[-3:]) or "it gave no reason"


def _make_logger(module: Any, on_scratch: Callable[[int], None] | None) -> _Log:
    messages: list[str] = []

    class Native(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= module.ILogger.Severity.WARNING:
                messages.append(message)
            elif on_scratch is not None and (found := _SCRATCH.match(message)):
                on_scratch(int(found[1]))

    return _Log(Native(), messages)


def load_tensorrt(library: TensorRTLibrary | None = None) -> TensorRT:
    """The library of that name, or the first that is installed (`tensorrt` before `tensorrt_rtx`).

    Raises:
        EngineError: none is installed, it is too old, or it cannot be loaded (its stub on PyPI has no code).
    """
    reasons = []
    names: tuple[TensorRTLibrary, ...] = (library,) if library else ("tensorrt", "tensorrt_rtx")
    for name in names:
        try:
            module = importlib.import_module(name)
            version = str(module.__version__)
        except (ImportError, OSError, AttributeError) as error:
            reasons.append(f"{name}: {error}")
            continue
        if name == "tensorrt" and tuple(map(int, version.split(".")[:2])) < _LEAST_TENSORRT:
            reasons.append(f"tensorrt is {version}, at least {'.'.join(map(str, _LEAST_TENSORRT))} is needed")
            continue
        return TensorRT(name, version, module)
    raise EngineError(f"no TensorRT library can be loaded ({'; '.join(reasons)}); {_INSTALL}")


def library_for(target: str, native: str | None) -> TensorRT:
    """The installed library that compiles for `target` on a machine whose GPU is `native` (None: no GPU).

    Raises:
        EngineError: the target is not known, or no library here compiles for it.
    """
    if not re.fullmatch(r"sm\d{2,3}", target):
        raise EngineError(f"target {target!r}: expected native or one of {', '.join(RTX_TARGETS)}, ...")
    if target == native:
        return load_tensorrt("tensorrt_rtx") if target in RTX_TARGETS else load_tensorrt("tensorrt")
    if target not in RTX_TARGETS:
        here = f"this machine has {native}" if native else "this machine has no GPU"
        raise EngineError(
            f"target {target} is compiled by NVIDIA's tensorrt on a machine with such a GPU only; {here} "
            f"(without one, TensorRT-RTX compiles for {', '.join(RTX_TARGETS)})"
        )
    return load_tensorrt("tensorrt_rtx")


def native_target(device: Any = None) -> str | None:
    """The compute capability of a GPU of this machine ("sm90"), or None without torch or a GPU.

    Args:
        device: a torch device; None: the first GPU.
    """
    try:
        import torch
    except ModuleNotFoundError:
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
