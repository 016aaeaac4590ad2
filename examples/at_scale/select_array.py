"""Experts of several domains, by an array of processes: one folder of scores for each, merged at the end.

    python examples/at_scale/select_array.py MODEL TEXTS OUT --experts 16 --processes 2

`TEXTS` holds `<domain>.jsonl`, a text in each line. Every process scores its share of every domain, and
writes to a folder of its own, as on machines without a disk in common. A process that was killed goes on when
this is called again. `select_array.sbatch` does the same by SLURM.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--part", type=int, default=64, help="texts that one part has")
    parser.add_argument("--max-texts", type=int, default=10**9)
    args = parser.parse_args()
    domains = sorted(path.stem for path in args.texts.glob("*.jsonl"))
    if not domains:
        raise SystemExit(f"{args.texts} holds no <domain>.jsonl: name a folder of texts.")

    def emo(*words: object) -> None:
        subprocess.run([sys.executable, "-m", "transformers_emo", "select", *map(str, words)], check=True)

    def task(number: int) -> None:
        for domain in domains:
            emo(
                *(args.model, args.out / f"{domain}.json", "--data", args.texts / f"{domain}.jsonl"),
                *("--method", "global", "--experts", args.experts, "--max-texts", args.max_texts),
                *("--statistics", args.out / "scores" / domain / str(number), "--part", args.part),
                *("--process", f"{number}/{args.processes}"),
            )

    with ThreadPoolExecutor(args.processes) as workers:
        list(workers.map(task, range(1, args.processes + 1)))
    for domain in domains:
        folders = [args.out / "scores" / domain / str(n + 1) for n in range(args.processes)]
        emo(args.model, args.out / f"{domain}.json", "--experts", args.experts, "--merge", *folders)


if __name__ == "__main__":
    main()
