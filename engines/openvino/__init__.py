"""OpenVINO engines: the embedded default on CPUs."""

from blockzoo.engines.openvino.engine import OpenVINOEngine, OpenVINOEngines

__all__ = ["OpenVINOEngine", "OpenVINOEngines"]
