"""What importing the package costs beside Transformers and PyTorch.

    python benchmarks/importing.py [--runs 7]

Claim: `import transformers_emo` adds next to nothing to `import transformers, torch`.

Bar: at most 0.3 seconds.

Every line is run in fresh processes, in turns, after one of each that does not count; medians. Ratio and
difference first, against the line they are compared with. The commands are compared with an empty Python.
"""

import argparse
import statistics
import subprocess
import sys
import time

BASE = "import transformers, torch"
AUTO = "import torch; from transformers import AutoModelForCausalLM"
LINES = {
    "nothing": [sys.executable, "-c", "pass"],
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
    "emo --help": "nothing",
    "emo --version": "nothing",
}


def seconds(command: list[str]) -> float:
    """Seconds of a process, from start to end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Run every line in turns and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    for command in LINES.values():
        seconds(command)
    times = [{name: seconds(command) for name, command in LINES.items()} for _ in range(args.runs)]
    for name, base in PAIRS.items():
        ratio = statistics.median(run[name] / run[base] for run in times)
        extra = statistics.median(run[name] - run[base] for run in times)
        took = statistics.median(run[name] for run in times)
        print(f"{ratio:.2f}  {extra:6.3f} s more, {took:6.3f} s: {name} / {base}")


if __name__ == "__main__":
    main()
