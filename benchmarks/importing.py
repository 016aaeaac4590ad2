"""What importing the package costs beside Transformers and PyTorch.

    python benchmarks/importing.py [--runs 7]

Claim: `import transformers_emo` adds next to nothing to `import transformers, torch`.

Bar: at most 0.3 seconds.

Every line is run in fresh processes, in turns, after one of each that does not count; medians. Ratio and
difference first, against the line they are compared with; MB are the largest size of the process. The
commands are compared with an empty Python.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

BASE = "import transformers, torch"
AUTO = "import torch; from transformers import AutoModelForCausalLM"
LINES = {
    "an empty program": [sys.executable, "-c", "pass"],
    BASE: [sys.executable, "-c", BASE],
    AUTO: [sys.executable, "-c", AUTO],
    "Transformers' OLMoE": [sys.executable, "-c", f"{BASE}; from transformers import OlmoeForCausalLM"],
    "import transformers_emo": [sys.executable, "-c", f"{BASE}; import transformers_emo"],
    "the auto-classes with EMO": [sys.executable, "-c", f"import transformers_emo; {AUTO}"],
    "the network": [sys.executable, "-c", f"{BASE}; from transformers_emo import EmoForCausalLM"],
    "emo --help": [sys.executable, "-m", "transformers_emo", "--help"],
    "emo --version": [sys.executable, "-m", "transformers_emo", "--version"],
}
PAIRS = {
    "import transformers_emo": BASE,
    "the auto-classes with EMO": AUTO,
    "the network": "Transformers' OLMoE",
    "emo --help": "an empty program",
    "emo --version": "an empty program",
}


class Run(NamedTuple):
    """What a process took, from start to end."""

    seconds: float
    megabytes: float  # at its largest


def run(command: list[str]) -> Run:
    """Run a command in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    # What a child inherits of its parent's peak is that of this small process.
    return Run(time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6)


def main() -> None:
    """Run every line in turns and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    for command in LINES.values():
        run(command)
    turns = [{name: run(command) for name, command in LINES.items()} for _ in range(args.runs)]
    for name, base in PAIRS.items():
        ratio = statistics.median(turn[name].seconds / turn[base].seconds for turn in turns)
        extra = statistics.median(turn[name].seconds - turn[base].seconds for turn in turns)
        took, grew = (statistics.median(each) for each in zip(*(turn[name] for turn in turns), strict=True))
        base_grew = statistics.median(turn[base].megabytes for turn in turns)
        print(
            f"{ratio:.2f}  times as long as {base}: {name}, {took:.3f} s, {extra:.3f} s more  "
            f"({grew:.0f} MB / {base_grew:.0f} MB)"
        )


if __name__ == "__main__":
    main()
