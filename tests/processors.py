"""Runs the tests of kernels and network for every instruction set that this machine can run.

    python tests/processors.py [options of pytest]

`make test-processors` does so. What cannot be run here is named.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

from transformers_emo.modeling_emo.kernels.instruction_sets import instruction_sets
from transformers_emo.modeling_emo.kernels.native_library import runnable_sets

TESTS = Path(__file__).parent / "modeling_emo"


def main() -> int:
    """Run them; 1 if a test failed anywhere."""
    running, failed = runnable_sets(), []
    for name in reversed(running):
        print(f"\n{name}:", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", str(TESTS), *sys.argv[1:]]
        if subprocess.run(command, env=os.environ | {"EMO_KERNELS": name}, check=False).returncode:
            failed.append(name)
    others = [each.name for each in instruction_sets(platform.machine()) if each.name not in running]
    passed = [name for name in running if name not in failed]
    print(f"\nPassed: {', '.join(passed) or 'none'}. Failed: {', '.join(failed) or 'none'}.")
    print(f"This machine cannot run, or has no library of: {', '.join(others) or 'none'}.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
