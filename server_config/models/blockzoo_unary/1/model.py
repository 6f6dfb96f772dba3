"""`blockzoo` for clients that want one response from a plain `infer` call."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from blockzoo.server_config.beacon import Beacon
from blockzoo.server_config.repository import ServerSettings
from blockzoo.server_config.unary import UnaryFront


class TritonPythonModel:
    """Triton's interface to `UnaryFront`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the threads that wait for answers."""
        self._front = UnaryFront(pb_utils)
        self._beacon = Beacon(ServerSettings.of_model(args).control_dir, args["model_name"])

    def execute(self, requests: list[Any]) -> None:
        """Pass requests on; responses follow from other threads."""
        self._beacon.taken += len(requests)
        for request in requests:
            self._front.handle(request)

    def finalize(self) -> None:
        """Wait for the answers still to come."""
        self._front.close()
