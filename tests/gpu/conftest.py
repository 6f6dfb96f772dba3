"""Runs from the source tree where nothing is installed; the benchmarks' random chains are used here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.source_tree import use_source_tree

use_source_tree()
