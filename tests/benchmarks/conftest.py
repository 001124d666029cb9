"""Benchmarks are scripts beside one another: their folder goes last on the path, as running one puts it first."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
