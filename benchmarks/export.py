"""Exporting to other engines, against copying as many bytes.

    python benchmarks/export.py [--quick] [--layers 4] [--folder DIR]

Claim: an export takes about as long as copying the files that it writes, with a few tensors in memory.

Bar: 0.7 of the speed of copying.

Takes the synthetic checkpoint of `benchmarks/loading.py` (EMO's true width, bfloat16) and prints ratios of
elapsed time, as `benchmarks/extraction.py` does. MB are how far the process grows meanwhile.
"""

import argparse
import tempfile
from pathlib import Path

from extraction import Run, copy, timed
from loading import make_checkpoint
from transformers_emo.conversion import export_model


def main() -> None:
    """Export to each layout, and copy what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder and args.folder.parent) as temporary:
        here = Path(temporary)
        full = args.folder or here / "full"
        make_checkpoint(full, 1 if args.quick else args.layers)
        copying = timed(lambda: copy(full, here / "copy"), full)
        _print("copy", copying, copying)
        for to, kind in (("qwen2-moe", None), ("gguf", None), ("gguf", "q8_0")):
            out = here / "out"
            run = timed(lambda to=to, kind=kind, out=out: _export(full, out, to, kind), full)
            _print(f"{to} {kind or 'bf16'}", run, copying)
            for file in out.iterdir():
                file.unlink()
            out.rmdir()


def _export(full: Path, out: Path, to: str, kind: str | None) -> None:
    export_model(full, out, to=to, type=kind, progress=False)


def _print(what: str, run: Run, copying: Run) -> None:
    print(f"| {what} | {run} | {copying.seconds / run.seconds:.2f} of the speed of copying |", flush=True)


if __name__ == "__main__":
    main()
