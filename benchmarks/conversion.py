"""Converting a training checkpoint and back, against copying files.

    python benchmarks/conversion.py [--quick] [--layers 4] [--folder DIR] [--runs 1]

Claim: converting costs little more than writing the files, and memory for a few tensors.

Takes the synthetic model of `benchmarks/loading.py` (EMO's true width) as a training checkpoint in float32,
and prints ratios of time, every file written to the disk before the clock stops and the page cache of what is
read dropped before it starts. The disk decides most of it, so each run stands between copies of its longer
side.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from extraction import timed
from loading import make_checkpoint
from processes import in_own_process
from transformers_emo.conversion import convert_olmo_core, convert_to_olmo_core


def convert(source: Path, out: Path, dtype: str) -> dict[str, float]:
    """Convert in this process; seconds, and megabytes of memory beyond those before."""
    run: Callable[[], object]
    if (source / "model_and_optim").exists():
        read = source / "model_and_optim"
        run = lambda: convert_olmo_core(source, out, dtype=dtype, progress=False)  # noqa: E731
    else:
        read = source
        run = lambda: convert_to_olmo_core(source, out, progress=False)  # noqa: E731
    return timed(run, read)._asdict()


def measure(what: str, source: Path, out: Path, dtype: str, longer: Path, runs: int) -> None:
    """Print the time of a conversion by that of copying a folder; the last one's result stays."""
    copy = out.with_name("copy")

    def copying() -> float:
        seconds = timed(lambda: shutil.copytree(longer, copy), longer).seconds
        shutil.rmtree(copy)
        return seconds

    ratios, peaks = [], []
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        copies = [copying()] if longer.exists() else []
        found = in_own_process(__file__, ["--convert", source, out, dtype])
        copies.append(copying())
        ratios.append(found["seconds"] / statistics.mean(copies))
        peaks.append(found["megabytes"] / 1e3)
    size = sum(file.stat().st_size for file in longer.rglob("*") if file.is_file()) / 1e9
    print(
        f"{statistics.median(ratios):.2f}  times the time of copying {size:.1f} GB: {what}; "
        f"{max(peaks):.2f} GB of memory",
        flush=True,
    )


def main() -> None:
    """Convert to a training checkpoint, and from it in two dtypes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="keep the model here")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        source, out, dtype = args.convert
        print(json.dumps(convert(Path(source), Path(out), dtype)))
        return
    if args.quick:
        args.layers = 1
    with tempfile.TemporaryDirectory(dir=args.folder and args.folder.parent) as temporary:
        here = Path(temporary)
        model = args.folder or here / "model"
        make_checkpoint(model, args.layers)
        step, weights = here / "step0", here / "step0" / "model_and_optim"
        measure("writing a training checkpoint", model, step, "float32", weights, args.runs)
        for dtype in ("float32", "bfloat16"):
            measure(f"converting it to {dtype}", step, here / dtype, dtype, weights, args.runs)
            shutil.rmtree(here / dtype)


if __name__ == "__main__":
    main()
