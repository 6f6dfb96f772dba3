"""Text -> token ids, for every tenant."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from blockzoo.server_config.beacon import Beacon
from blockzoo.server_config.repository import ServerSettings
from blockzoo.server_config.text_steps import Preprocessor, Tokenizers


class TritonPythonModel:
    """Triton's interface to `Preprocessor`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the zoo's tokenizers."""
        self._step = Preprocessor(Tokenizers.of_model(args), pb_utils)
        self._beacon = Beacon(ServerSettings.of_model(args).control_dir, args["model_name"])

    def execute(self, requests: list[Any]) -> None:
        """Queue requests; responses follow from other threads."""
        self._beacon.taken += len(requests)
        for request in requests:
            self._step.handle(request)

    def finalize(self) -> None:
        """Let what waits finish."""
        self._step.close(10.0)
