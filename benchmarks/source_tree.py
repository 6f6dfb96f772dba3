"""Lets the package be imported from this source tree where it is not installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path


def use_source_tree() -> None:
    """Make the top-level folders importable as `blockzoo`, unless it is installed."""
    if importlib.util.find_spec("blockzoo") is None:
        package = types.ModuleType("blockzoo")
        package.__path__ = [str(Path(__file__).resolve().parents[1])]
        sys.modules["blockzoo"] = package
