"""`blockzoo` for clients that want one response from a plain `infer` call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from blockzoo.server_config.beacon import Beacon
from blockzoo.server_config.repository import ServerSettings
from blockzoo.server_config.unary import UnaryFront


class TritonPythonModel:
    """Triton's interface to `UnaryFront`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the thread that waits for answers."""
        settings = ServerSettings.of_model(args)
        limit = settings.engine.get("max_request_seconds")
        self._front = UnaryFront(pb_utils, Path(settings.zoo), settings.grpc, limit)
        self._drain_s = settings.drain_s
        self._beacon = Beacon(settings.control_dir, args["model_name"])

    def execute(self, requests: list[Any]) -> None:
        """Pass requests on; responses follow from other threads."""
        self._beacon.taken += len(requests)
        for request in requests:
            self._front.handle(request)

    def finalize(self) -> None:
        """Wait for the answers still to come."""
        self._front.close(self._drain_s)
