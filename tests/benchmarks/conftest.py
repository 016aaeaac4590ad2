"""Benchmarks are scripts and no package, and import each other: their folder is put where it stands then."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
