"""Text out, for every tenant."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from blockzoo.server_config.repository import ServerSettings
from blockzoo.server_config.text_steps import Postprocessor, Tokenizers, run_step


class TritonPythonModel:
    """Triton's interface to `Postprocessor`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the zoo's tokenizers."""
        self._step = Postprocessor(Tokenizers(ServerSettings.of_model(args).zoo))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests."""
        return run_step(self._step, requests, pb_utils)
