"""Processes that compute together: a file of this folder, run by `torchrun` with a number of gloo ranks."""

import os
import subprocess
import sys
from pathlib import Path

LIMIT = 300  # seconds: a rank that fails is ended by torchrun, this is for ranks that wait for each other


def launch(script: str, folder: Path, *arguments: str, ranks: int = 2, load: str = "") -> str:
    """Run a file with some ranks, and return what they printed.

    Args:
        script (`str`): the file's path; it gets `folder` and `arguments`.
        folder (`Path`): where it may write.
        arguments (`str`): more words for it.
        ranks (`int`): how many processes.
        load (`str`): what else to put in front of the path of modules.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    path = [load, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("w") as file:
        done = subprocess.run(
            [*command, script, str(folder), *arguments],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=LIMIT,
        )
    text = log.read_text()
    assert done.returncode == 0, text[-5_000:]
    return text
