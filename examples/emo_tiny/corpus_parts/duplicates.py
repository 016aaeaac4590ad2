"""Duplicates across documents: repeated paragraphs, near-duplicate documents, overlap of the splits.

Near-duplicates are found by MinHash over shingles of five tokens with locality-sensitive hashing (Broder
1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3): no pair is compared that
shares no band.
"""

import hashlib
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from .clean import paragraphs

SHINGLE = 5  # tokens
BANDS, ROWS = 40, 3  # finds a pair of Jaccard similarity 0.5 with probability 0.995
NEAR = 0.4  # estimated similarity from which on the later of two documents goes
MIN_PARAGRAPH = 80  # bytes; shorter ones (headings, closing lines of functions) may repeat
COMMON = 3  # documents of a domain: a paragraph of more of them is boilerplate and goes from all

# A word, one ideograph or kana, or a run of punctuation. Chinese and Japanese have no spaces to cut at.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uff66-\uff9f]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]+")
_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): spreads every bit of 64-bit integers."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shingles(text: str) -> np.ndarray:
    """Distinct hashes of a text's runs of five tokens, whatever their case and numbers, sorted, (n,)
    uint64."""
    tokens = _TOKEN.findall(re.sub(r"\d+", "0", text.lower()))
    hashes = np.fromiter((zlib.crc32(token.encode()) for token in tokens), np.uint64, len(tokens))
    count = max(len(tokens) - SHINGLE + 1, min(len(tokens), 1))
    combined = np.zeros(count, np.uint64)
    for offset in range(min(SHINGLE, len(tokens))):
        combined = _mix(combined * _ODD + hashes[offset : offset + count])
    return np.unique(combined)


class NearDuplicates:
    """Index of the documents seen, which knows whether a new one is much like any of them.

    Args:
        seed: of the hash functions.
    """

    def __init__(self, seed: int = 0):
        random = np.random.default_rng(seed)
        # Odd multipliers and any offsets; the upper 32 bits of the product are the hash.
        self._multipliers = random.integers(0, 2**63, (BANDS * ROWS, 1), np.uint64) * np.uint64(
            2
        ) + np.uint64(1)
        self._offsets = random.integers(0, 2**63, (BANDS * ROWS, 1), np.uint64)
        self._signatures: list[np.ndarray] = []
        self._buckets: dict[bytes, list[int]] = defaultdict(list)

    def signature(self, text: str) -> np.ndarray:
        """MinHash signature of a text, (BANDS * ROWS,) uint32."""
        hashes = shingles(text)
        smallest = np.full(BANDS * ROWS, 2**32 - 1, np.uint32)
        for start in range(0, len(hashes), 4096):  # bounds the memory of long documents
            mixed = (hashes[start : start + 4096] * self._multipliers + self._offsets) >> np.uint64(32)
            smallest = np.minimum(smallest, mixed.min(axis=1).astype(np.uint32))
        return smallest

    def add(self, text: str) -> bool:
        """Add a document, unless it is like one that was added: says whether it was new."""
        signature = self.signature(text)
        keys = [bytes([band]) + part.tobytes() for band, part in enumerate(signature.reshape(BANDS, ROWS))]
        candidates = sorted({number for key in keys for number in self._buckets.get(key, ())})
        if candidates:
            others = np.stack([self._signatures[number] for number in candidates])
            if (others == signature).mean(axis=1).max() >= NEAR:
                return False
        for key in keys:
            self._buckets[key].append(len(self._signatures))
        self._signatures.append(signature)
        return True


class RepeatedParagraphs:
    """Removes paragraphs that stand in several documents, domain by domain.

    A paragraph of more than `COMMON` documents of a domain is boilerplate and goes from all of them. Of
    another that repeats, the first document keeps it: also across domains, so that what a translation left in
    English goes from it.
    """

    def __init__(self):
        self._seen: set[int] = set()

    @staticmethod
    def _key(paragraph: str) -> int | None:
        if len(paragraph.encode()) < MIN_PARAGRAPH:
            return None
        normal = " ".join(re.sub(r"\d+", "0", paragraph.lower()).split())
        return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest())

    def filter(self, texts: Iterable[str]) -> tuple[list[str], int]:
        """The documents of a domain without repeated paragraphs, and the number of paragraphs removed."""
        texts = list(texts)
        counts: Counter[int] = Counter()
        for text in texts:
            counts.update({key for key in map(self._key, paragraphs(text)) if key is not None})
        common = {key for key, count in counts.items() if count > COMMON}
        filtered, removed = [], 0
        for text in texts:
            kept = []
            for paragraph in paragraphs(text):
                key = self._key(paragraph)
                if key is not None and (key in common or key in self._seen):
                    removed += 1
                    continue
                if key is not None:
                    self._seen.add(key)
                kept.append(paragraph)
            filtered.append("\n\n".join(kept))
        self._seen |= common
        return filtered, removed


class Overlap:
    """Exact overlap of any document with a set of held-back ones.

    Args:
        texts: held-back documents.
    """

    def __init__(self, texts: list[str]):
        sets = [shingles(text) for text in texts]
        self._sizes = np.array([len(found) for found in sets], np.int64)
        owners = np.repeat(np.arange(len(sets)), self._sizes)
        hashes = np.concatenate([*sets, np.zeros(0, np.uint64)])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owners = hashes[order], owners[order]

    def share(self, text: str) -> np.ndarray:
        """How much of each held-back document is in `text`, or `text` in it, (n,) float64 in [0, 1].

        That is the number of common shingles over the smaller of the two documents' numbers.
        """
        found = shingles(text)
        begin, end = (
            np.searchsorted(self._hashes, found, "left"),
            np.searchsorted(self._hashes, found, "right"),
        )
        shared = np.zeros(len(self._sizes), np.int64)
        while (more := begin < end).any():  # as often as one shingle stands in different documents
            begin, end = begin[more], end[more]
            shared += np.bincount(self._owners[begin], minlength=len(shared))
            begin = begin + 1
        return shared / np.maximum(np.minimum(self._sizes, len(found)), 1)
