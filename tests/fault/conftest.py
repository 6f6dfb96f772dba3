"""The server tests' fixture and client, and what the runs under load have in common."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for traffic and guests
_path = Path(__file__).parents[1] / "server" / "conftest.py"
_spec = importlib.util.spec_from_file_location("served_zoo", _path)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
serve_zoo = _module.serve_zoo
