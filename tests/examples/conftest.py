"""Examples are scripts and no package: their folders are put where they stand when they are run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emo_tiny"))
