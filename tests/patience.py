"""Waiting for what must happen, for as long as a slow and busy machine may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 120.0
"""Ends a hang: nothing that a test waits for takes so long, however busy the machine is."""


def wait_for(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """Poll until the condition holds; its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {timeout_s:g} s"
        time.sleep(0.002)
    return value
