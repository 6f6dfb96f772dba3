"""OpenVINO engines: the embedded default on CPUs."""

import sys

# importing openvino would report the import to an analytics service from a thread of its own; without
# this package it uses a stub that does nothing
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

from blockzoo.engines.openvino.engine import OpenVINOEngine, OpenVINOEngines  # noqa: E402

__all__ = ["OpenVINOEngine", "OpenVINOEngines"]
