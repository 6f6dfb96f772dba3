"""Text out, for every tenant."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from blockzoo.server_config.abandoned import AbandonedTeller
from blockzoo.server_config.beacon import Beacon
from blockzoo.server_config.repository import ServerSettings
from blockzoo.server_config.text_steps import Postprocessor, Tokenizers


class TritonPythonModel:
    """Triton's interface to `Postprocessor`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the zoo's tokenizers."""
        control_dir = ServerSettings.of_model(args).control_dir
        tell = AbandonedTeller(control_dir).tell
        self._step = Postprocessor(Tokenizers.of_model(args), pb_utils, tell)
        self._beacon = Beacon(control_dir, args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests."""
        self._beacon.taken += len(requests)
        return [self._step.respond(request) for request in requests]
