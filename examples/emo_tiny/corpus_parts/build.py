"""From documents to the corpus: cleaned, without duplicates, in three splits that share nothing."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from .clean import MIN_BYTES, clean, content_hash, in_language, pieces
from .duplicates import NearDuplicates, Overlap, RepeatedParagraphs

SPLITS = ("train", "calibration", "test")
RESERVE = 3  # times a domain's size is cleaned, so that what is removed can be replaced
HELD_BACK_PIECES = 2  # of one file: so what is held back is of many files
OVERLAP = 0.5  # of a held-back document in another document, in shingles


@dataclass(frozen=True)
class Document:
    """A document before it is cleaned: its text, where it is from and its licence."""

    text: str
    source: str
    licence: str


@dataclass
class Report:
    """What became of a domain's documents: numbers of files, removed ones by reason, and sizes by split."""

    title: str
    licences: list[str] = field(default_factory=list)
    read: int = 0
    unfit: int = 0
    exact: int = 0
    near: int = 0
    overlapping: int = 0
    paragraphs: int = 0
    documents: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """Sizes of the corpus.

    Args:
        domain_mb: most text of a domain, in units of 10^6 bytes of UTF-8.
        held_back: least number of documents of a domain's test split, and of its calibration split.
        share: share of a domain's documents in each of these, where that is more.
    """

    domain_mb: float = 5.0
    held_back: int = 64
    share: float = 0.03


class Corpus:
    """Builds the corpus domain by domain.

    A document's place is decided by the hash of its content alone: among the documents of a domain in the
    order of their hashes, the first are the test split, the next calibration, the rest train. A later domain
    moves nothing in an earlier one; only `finish` takes what overlaps with held-back text of another domain.

    Args:
        out: folder of the corpus.
        settings: sizes.
    """

    def __init__(self, out: Path, settings: Settings):
        self.out, self.settings = out, settings
        self.reports: dict[str, Report] = {}
        self._paragraphs, self._near = RepeatedParagraphs(), NearDuplicates()
        self._hashes: set[str] = set()
        for split in SPLITS:
            (out / split).mkdir(parents=True, exist_ok=True)
            for stale in (out / split).glob("*.jsonl"):
                stale.unlink()

    def add(
        self,
        name: str,
        title: str,
        documents: Iterable[Document],
        language: str | None = None,
        licence_headers: bool = False,
    ) -> Report:
        """Clean, deduplicate, split and write a domain.

        Raises:
            ValueError: if too few documents are left to train on and to hold back.
        """
        report = Report(title)
        chosen = self._read(documents, report, language, licence_headers)
        keys = sorted(chosen)
        texts, report.paragraphs = self._paragraphs.filter(chosen[key].text for key in keys)
        rows, size = [], 0
        for key, text in tqdm(
            zip(keys, texts, strict=True), f"{name}: near-duplicates", len(keys), leave=False, unit="doc"
        ):
            text = in_language(text, language) if language else text  # what is left may be mostly code
            if len(text.encode()) < MIN_BYTES:
                report.unfit += 1
            elif size > self.settings.domain_mb * 1e6:
                break
            elif not self._near.add(text):
                report.near += 1
            else:
                document = chosen[key]
                cut = pieces(text)
                rows.append(
                    [
                        {
                            "text": piece,
                            "domain": name,
                            "source": document.source,
                            "licence": document.licence,
                        }
                        for piece in cut
                    ]
                )
                size += sum(len(piece.encode()) for piece in cut)
        count = sum(map(len, rows))
        held_back = max(self.settings.held_back, round(self.settings.share * count))
        if count < 3 * held_back:
            raise ValueError(
                f"Domain {name!r} has only {count} documents left of {report.read} ({report.unfit} too short "
                f"or unfit, {report.exact + report.near} duplicates): {held_back} for the test, as many for "
                "calibration and as many to train on are needed. Give it more text, or hold fewer back with "
                "`--held-back`."
            )
        splits = self._split(name, rows, held_back, report)
        report.licences = sorted({row["licence"] for file in rows for row in file})
        for split, found in splits.items():
            report.documents[split] = len(found)
            report.bytes[split] = sum(len(row["text"].encode()) for row in found)
            write_lines(self.out / split / f"{name}.jsonl", found)
        self.reports[name] = report
        return report

    def _read(
        self, documents, report: Report, language: str | None, licence_headers: bool
    ) -> dict[str, Document]:
        """Cleaned documents by hash: those of the lowest hashes, `RESERVE` times what is wanted."""
        chosen: dict[str, Document] = {}
        size, limit = 0, RESERVE * self.settings.domain_mb * 1e6
        for document in documents:
            report.read += 1
            text = clean(document.text, language, licence_headers)
            if text is None:
                report.unfit += 1
                continue
            key = content_hash(text)
            if key in self._hashes or key in chosen:
                report.exact += 1
                continue
            chosen[key] = Document(text, document.source, document.licence)
            size += len(text.encode())
            if size > 1.5 * limit:  # now and then, not for every document
                size = _keep_lowest(chosen, limit)
        _keep_lowest(chosen, limit)
        self._hashes |= set(chosen)
        return chosen

    def _split(
        self, name: str, files: list[list[dict]], held_back: int, report: Report
    ) -> dict[str, list[dict]]:
        """Whole files into splits, so that no two pieces of one are in different splits."""
        splits: dict[str, list[dict]] = {}
        for split in ("test", "calibration"):
            count, size = 0, 0
            while size < held_back and count < len(files):
                size += len(files[count][:HELD_BACK_PIECES])
                count += 1
            splits[split] = [row for file in files[:count] for row in file[:HELD_BACK_PIECES]]
            files = files[count:]
            # MinHash does not see a held-back document that is part of a longer one, or the other way round.
            overlap = Overlap([row["text"] for row in splits[split]])
            bar = tqdm(files, f"{name}: overlap with {split}", leave=False, unit="doc")
            apart = [file for file in bar if all(overlap.share(row["text"]).max() < OVERLAP for row in file)]
            report.overlapping += len(files) - len(apart)
            files = apart
        return splits | {"train": [row for file in files for row in file]}

    def finish(self) -> int:
        """Remove documents that hold most of a held-back one of another domain, or are mostly in it.

        Returns:
            Number of documents removed.
        """
        overlaps = list(overlapping(self.out, list(self.reports)))
        for split in SPLITS:
            for name, report in self.reports.items():
                gone = {
                    row["text"] for found, row, _, _, _ in overlaps if (found, row["domain"]) == (split, name)
                }
                if gone:
                    path = self.out / split / f"{name}.jsonl"
                    kept = [row for row in read_lines(path) if row["text"] not in gone]
                    report.overlapping += report.documents[split] - len(kept)
                    report.documents[split] = len(kept)
                    report.bytes[split] = sum(len(row["text"].encode()) for row in kept)
                    write_lines(path, kept)
        return len(overlaps)


def _keep_lowest(chosen: dict[str, Document], limit: float) -> int:
    """Keep the documents of the lowest hashes up to `limit` bytes; the size kept, in bytes."""
    size = 0
    for key in sorted(chosen):
        if size > limit:
            del chosen[key]
        else:
            size += len(chosen[key].text.encode())
    return size


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write a JSON Lines file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_lines(path: Path) -> Iterator[dict]:
    """Rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def domains_of(out: Path) -> list[str]:
    """Names of a built corpus' domains, in the order they were built in.

    Raises:
        ValueError: if there is no corpus.
    """
    path = out / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"There is no whole corpus in {out} (no manifest.json): run `corpus.py build {out}` first."
        )
    return list(json.loads(path.read_text(encoding="utf-8"))["domains"])


def overlapping(out: Path, domains: list[str]) -> Iterator[tuple[str, dict, str, dict, float]]:
    """Documents of one split that a document of another, held-back split overlaps, over all domains.

    Yields:
        Split and row of the document, split and row of the held-back one, and what share they have in common.
    """
    splits = {
        split: [row for name in domains for row in read_lines(out / split / f"{name}.jsonl")]
        for split in SPLITS
    }
    held = [("test", row) for row in splits["test"]] + [("calibration", row) for row in splits["calibration"]]
    overlap = Overlap([row["text"] for _, row in held])
    for split, count in (("calibration", len(splits["test"])), ("train", len(held))):
        for row in tqdm(splits[split], f"comparing {split} with what is held back", leave=False, unit="doc"):
            shares = overlap.share(row["text"])[:count]
            if shares.max(initial=0.0) >= OVERLAP:
                yield split, row, *held[int(shares.argmax())], float(shares.max())


def verify(out: Path) -> int:
    """Check a built corpus anew, from its files: no document is, or is mostly, in two splits.

    Every held-back document is compared, exactly, with every document of the other splits of all domains; and
    the splits share no source file.

    Returns:
        Number of held-back documents checked.

    Raises:
        ValueError: naming two documents that overlap.
    """
    domains = domains_of(out)
    sources: dict[tuple[str, str], str] = {}
    held_back = 0
    for split in SPLITS:
        for row in (row for name in domains for row in read_lines(out / split / f"{name}.jsonl")):
            held_back += split != "train"
            file = row["domain"], row["source"]
            if sources.setdefault(file, split) != split:
                raise ValueError(
                    f"{row['source']} is both in {sources[file]} and in {split}: build the corpus anew."
                )
    for split, row, held, other, share in overlapping(out, domains):
        raise ValueError(
            f"{row['source']} in {split} and {other['source']} in {held} have {share:.0%} of their text in "
            "common: build the corpus anew."
        )
    return held_back
