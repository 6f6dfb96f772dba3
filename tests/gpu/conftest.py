"""The benchmarks' random chains are used here too; nothing need be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
