"""Extracting a subset and writing one back, against copying as many bytes.

    python benchmarks/extraction.py [--quick] [--layers 4] [--folder DIR] [--experts 64]

Claim: extracting a subset and writing it back take about as long as copying the files that they write.

Takes the synthetic checkpoint of `benchmarks/loading.py` (EMO's true width, bfloat16) and prints ratios of
elapsed time, every file written to the disk before the clock stops and the page cache of what is read dropped
before it starts; the disk decides most of it, so the copy is timed beside each. MB are how far the process
grows meanwhile.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from loading import make_checkpoint
from processes import resident
from transformers_emo import extract_subset, select_experts, write_back


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, where the system lets us."""
    for file in folder.iterdir():
        if file.is_file() and hasattr(os, "posix_fadvise"):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Run(NamedTuple):
    """What a run took."""

    seconds: float
    megabytes: float

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.megabytes:.0f} MB"


def timed(run: Callable[[], object], *read: Path) -> Run:
    """A run from a cold disk to a quiet one."""
    for folder in read:
        forget(folder)
    before = resident(peak=False, forget=True)
    start = time.perf_counter()
    run()
    os.sync()
    seconds = time.perf_counter() - start
    return Run(seconds, resident(peak=True) - before)


def weights(folder: Path) -> list[Path]:
    """The files of weights."""
    return sorted(folder.glob("*.safetensors"))


def copy(folder: Path, out: Path) -> None:
    """Copy the files of weights as they are."""
    out.mkdir()
    for file in weights(folder):
        shutil.copyfile(file, out / file.name)


def main() -> None:
    """Extract, copy what came of it, write back, copy the whole."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    parser.add_argument("--experts", type=int, default=64)
    args = parser.parse_args()
    if args.quick:
        args.layers = 1
    with tempfile.TemporaryDirectory(dir=args.folder and args.folder.parent) as temporary:
        here = Path(temporary)
        full = args.folder or here / "full"
        make_checkpoint(full, args.layers)
        subset = select_experts(full, None, args.experts, method="random")
        small = here / "small"
        extracting = timed(lambda: extract_subset(full, subset, small, progress=False), full)
        copying = timed(lambda: copy(small, here / "copy"), small)
        size = sum(file.stat().st_size for file in weights(small)) / 1e9
        print(
            f"{extracting.seconds / copying.seconds:.2f}  times the time of copying as much: extracting "
            f"{args.experts} experts  ({extracting} / {copying})"
        )
        print(f"{60 * size / extracting.seconds:.1f} GB a minute, extracting")
        shutil.rmtree(here / "copy")
        writing = timed(lambda: write_back(full, small, out=here / "updated", progress=False), full, small)
        shutil.rmtree(here / "updated")
        copying = timed(lambda: copy(full, here / "copy"), full)
        print(
            f"{writing.seconds / copying.seconds:.2f}  times the time of copying the full model: "
            f"writing them back  ({writing} / {copying})"
        )


if __name__ == "__main__":
    main()
