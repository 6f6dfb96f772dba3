"""The engine of the whole server, behind one decoupled model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from blockzoo.runtime import EngineConfig, EngineThread
from blockzoo.server_config.abandoned import AbandonedListener
from blockzoo.server_config.beacon import Beacon
from blockzoo.server_config.control import SECRET_VARIABLE
from blockzoo.server_config.documents import pass_warnings_on, publish_documents
from blockzoo.server_config.front import EngineFront
from blockzoo.server_config.repository import ServerSettings


class TritonPythonModel:
    """Triton's interface to `EngineFront`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the zoo."""
        settings = ServerSettings.of_model(args)
        control_dir = None if settings.control_dir is None else Path(settings.control_dir)
        pass_warnings_on(pb_utils)
        engine = EngineThread(settings.zoo, EngineConfig(**settings.engine))
        try:
            publish_documents(engine, settings.publish)
        except BaseException:
            engine.close()  # else its thread keeps the process
            raise
        self._front = EngineFront(engine, pb_utils, control_dir, os.environ.get(SECRET_VARIABLE))
        if control_dir is not None:
            AbandonedListener(control_dir, self._front.abandon)
        self._drain_s = settings.drain_s
        self._beacon = Beacon(settings.control_dir, args["model_name"])

    def execute(self, requests: list[Any]) -> None:
        """Queue requests; responses follow from another thread."""
        self._beacon.taken += len(requests)
        for request in requests:
            self._front.handle(request)

    def finalize(self) -> None:
        """Let running requests finish."""
        self._front.close(self._drain_s)
