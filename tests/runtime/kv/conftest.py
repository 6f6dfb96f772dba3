"""The tests of the KV cache have a module of their own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for kv_world
