"""Documents out of unpacked packages: each reader yields pairs of path and raw text, one natural unit of text
a pair.

A reader is a function of the package's folder and of `mandoc`, the program that renders manual pages. Files
are read in the order of their paths, so that two runs give the same.
"""

import gzip
import html as html_entities
import re
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

PAGE = 6_000  # characters of a page of the dictionary


def _files(folder: Path, pattern: str, skip: str | None = None) -> list[Path]:
    """Plain files, no links (a second name of a page that is there already), in order."""
    found = sorted(path for path in folder.glob(pattern) if path.is_file() and not path.is_symlink())
    return [
        path for path in found if not (skip and re.search(skip, "/" + path.relative_to(folder).as_posix()))
    ]


def _text(path: Path) -> str | None:
    """A file's text; none where it is not UTF-8."""
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix in {".gz", ".dz"} else data).decode("utf-8")
    except UnicodeDecodeError:
        return None


def code(pattern: str, skip: str | None = None):
    """Reader of source files, one a document; `skip` is a regular expression for paths (with a leading
    `/`)."""

    def read(folder: Path, mandoc: Path) -> Iterator[tuple[str, str]]:
        for path in _files(folder, pattern, skip):
            text = _text(path)
            if text is not None:
                yield path.relative_to(folder).as_posix(), text

    return read


def tarball(pattern: str, members: str):
    """Reader of source files inside a tar file, read as a stream: only members whose path matches are
    held."""

    def read(folder: Path, mandoc: Path) -> Iterator[tuple[str, str]]:
        for path in _files(folder, pattern):
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    file = (
                        archive.extractfile(member)
                        if member.isfile() and re.search(members, member.name)
                        else None
                    )
                    if file is not None:
                        yield member.name, file.read().decode("utf-8", errors="replace")

    return read


# Last sections of manual pages: who wrote, translated and owns a page, in the languages of the corpus.
_CREDITS = re.compile(
    r"^(AUTHORS?|COPYRIGHT|COLOPHON|REPORTING BUGS|HISTORY|AVAILABILITY|"
    r"AUTEURS?|TRADUCTION|SIGNALER (DES|LES) BOGUES|RAPPORTER DES BOGUES|DISPONIBILITÉ|"
    r"AUTOR(EN)?|KOLOPHON|ÜBERSETZUNG|FEHLER MELDEN|FEHLERBERICHTE|VERFÜGBARKEIT|URHEBERRECHT|"
    r"AUTOR(ES)?|COLOF[ÓO]N|TRADUCCIÓN|INFORMAR DE (ERRORES|FALLOS)|DISPONIBILIDAD|DERECHOS DE AUTOR|"
    r"АВТОР(Ы)?|АВТОРСКИЕ ПРАВА|ПЕРЕВОД|СООБЩЕНИЯ ОБ ОШИБКАХ|ОТЧЁТЫ ОБ ОШИБКАХ|ЗАМЕЧАНИЯ|ДОСТУПНОСТЬ|"
    r"著者|作者|著作権|バグの報告(先)?|この文書について|翻訳(者)?(謝辞)?|入手方法|履歴|"
    r"版权(声明|所有)?|著作权|跋|报告(错误|缺陷|臭虫)|译者|\[?中文版(维护人|最新更新)\]?.*|.*中文手册页.*)\s*$",
    re.IGNORECASE,
)


def manual_pages(pattern: str = "usr/share/man/**/*.gz"):
    """Reader of manual pages: plain text as `mandoc` renders it, a line a paragraph, without headers and
    credits."""

    def render(mandoc: Path, path: Path) -> str:
        try:
            source = gzip.decompress(path.read_bytes())
        except (gzip.BadGzipFile, EOFError):
            return ""
        if source.lstrip().startswith(b".so "):  # only names another page
            return ""
        command = [str(mandoc), "-K", "utf-8", "-T", "utf8", "-O", "width=999,indent=0"]
        done = subprocess.run(command, input=source, capture_output=True)
        return _plain_manual(done.stdout.decode("utf-8", errors="replace"))

    def read(folder: Path, mandoc: Path) -> Iterator[tuple[str, str]]:
        paths = _files(folder, pattern)
        with ThreadPoolExecutor(2) as pool:
            texts = pool.map(lambda path: render(mandoc, path), paths)
            for path, text in zip(paths, texts, strict=True):
                yield path.relative_to(folder).as_posix(), text

    return read


def _plain_manual(rendered: str) -> str:
    """Rendered manual page without overstrikes, running heads, deep indents and credits."""
    lines = re.sub(r".\x08", "", rendered).splitlines()[1:-1]
    kept: list[str] = []
    skipping = False
    for line in lines:
        if line and not line[0].isspace():
            skipping = bool(_CREDITS.match(line))
        if not skipping:
            stripped = line.lstrip(" ")
            indent = len(line) - len(stripped) if stripped else 0
            indent = min((indent + 3) // 7 * 2, 8)  # mandoc's steps are of 7 columns
            # A term and its description on one line stand apart by a column's width; tables by spaces.
            kept.append(" " * indent + re.sub(r" {3,}", "  ", stripped.rstrip()))
    return "\n".join(kept)


_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
_PARAGRAPHS = _HEADINGS | {"p", "div", "ul", "ol", "dl", "table", "blockquote", "pre", "section"}
_BLOCKS = _PARAGRAPHS | {"li", "dt", "dd", "tr", "article", "br", "caption", "thead", "tbody"}
_MARKS = {"li": "- ", "td": "  ", "th": "  "}  # between the items of a list, and the cells of a row
_VOID = {"br", "hr", "img", "meta", "link", "input", "area", "base", "col", "embed", "source", "wbr"}
_SKIPPED_TAGS = {"script", "style", "head", "nav", "header", "footer", "aside", "noscript", "button", "form"}
# Navigation, tables of contents, legal notices, the other systems' variants of a sentence.
_SKIPPED_CLASSES = {
    "navheader",
    "navfooter",
    "docnav",
    "toc",
    "list-of-examples",
    "list-of-tables",
    "legalnotice",
    "MAC",
    "UNIX",
    "relatedtopics",
    "howtoget",
    "breadcrumbs",
    "indexterm",
    "footnotes",
    "revhistory",
}
_SKIPPED_IDS = {"banner", "title"}


class _PlainText(HTMLParser):
    """Text of a page's body, or of the element `root` in it: paragraphs apart, preformatted text as it
    stands."""

    def __init__(self, root: str | None):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.root = root
        self.stack: list[tuple[str, bool, bool]] = []  # tag, whether skipped, whether inside the root

    def handle_starttag(self, tag, attrs):
        if tag in _BLOCKS:
            self.parts.append("\n\n" if tag in _PARAGRAPHS else "\n")
        if tag in _VOID:
            return
        attributes = dict(attrs)
        classes = set((attributes.get("class") or "").split())
        above_skipped, above_inside = self.stack[-1][1:] if self.stack else (False, self.root is None)
        skipped = (
            above_skipped
            or tag in _SKIPPED_TAGS
            or bool(classes & _SKIPPED_CLASSES)
            or attributes.get("id") in _SKIPPED_IDS
        )
        inside = above_inside or attributes.get("id") == self.root
        self.stack.append((tag, skipped, inside))
        if inside and not skipped and tag in _MARKS:
            self.parts.append(_MARKS[tag])

    def handle_endtag(self, tag):
        if tag in _BLOCKS:
            self.parts.append("\n\n" if tag in _PARAGRAPHS else "\n")
        for depth in range(len(self.stack) - 1, -1, -1):  # tags left open end with the one around them
            if self.stack[depth][0] == tag:
                del self.stack[depth:]
                break

    def handle_data(self, data):
        skipped, inside = self.stack[-1][1:] if self.stack else (False, self.root is None)
        if skipped or not inside:
            return
        if any(tag == "pre" for tag, _, _ in self.stack):
            self.parts.append(data)
        else:
            text = re.sub(r"\s+", " ", data)
            self.parts.append(text.lstrip() if not self.parts or self.parts[-1].endswith("\n") else text)


def _plain_html(page: str, root: str | None) -> str:
    parser = _PlainText(root)
    parser.feed(page)
    parser.close()
    # Spaces at the borders of inline elements; blank lines that are only spaces.
    text = re.sub(r"[ \xa0]*\n[ \xa0]*(?=\n)", "\n", "".join(parser.parts))
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip() != "-")


def html(pattern: str, root: str | None = None, skip: str | None = None):
    """Reader of HTML pages: the text of each, of the element whose id is `root` where one is named."""

    def read(folder: Path, mandoc: Path) -> Iterator[tuple[str, str]]:
        for path in _files(folder, pattern, skip):
            page = _text(path)
            if page is not None:
                yield path.relative_to(folder).as_posix(), _plain_html(page, root)

    return read


def metamath(pattern: str):
    """Reader of a Metamath database: a document is a run of statements under one heading, without the proofs.

    A proof is a compressed string of letters that no reader understands; who contributed when is left out
    too.
    """

    def read(folder: Path, mandoc: Path) -> Iterator[tuple[str, str]]:
        for path in _files(folder, pattern):
            text = path.read_text(encoding="utf-8")
            text = re.sub(r"\$=.*?\$\.", "$.", text, flags=re.DOTALL)
            text = re.sub(
                r"\s*\((Contributed|Revised|Proof shortened|Proposed)\s+by\s[^()]*(\([^()]*\)[^()]*)*\)",
                "",
                text,
            )
            text = re.sub(r"\s*\((New\s+usage|Proof\s+modification)\s+is\s+discouraged\.\)", "", text)
            name = path.relative_to(folder).as_posix()
            heading = r"\n\$\(\s*\n(?=[#*=-][#*=.-]{20,}\n)"
            for number, section in enumerate(re.split(heading, text)):
                section = re.sub(r"^[#*=.-]{20,}\n", "", section, flags=re.MULTILINE)
                section = (
                    re.sub(r"\s*\$\)", "", section, count=1) if number else section
                )  # the heading's own end
                yield f"{name}#{number}", section

    return read


def dictionary(pattern: str):
    """Reader of a dictd database: a document is a page of consecutive entries of about `PAGE` characters."""

    def read(folder: Path, mandoc: Path) -> Iterator[tuple[str, str]]:
        for path in _files(folder, pattern):
            text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
            text = text[text.index("\nA \\A") :] if "\nA \\A" in text else text  # past the title
            text = re.sub(
                r"^ *\[[^\]\n]*\](\n|$)", "", text, flags=re.MULTILINE
            )  # which edition an entry is from
            text = re.sub(r" \[(1913 Webster|Webster 1913 Suppl\.|PJC|WordNet 1\.5)\]", "", text)
            entries = re.split(r"\n\n(?=\S)", text)
            page: list[str] = []
            number = size = 0
            for entry in entries:
                page.append(entry.strip("\n"))
                size += len(entry)
                if size >= PAGE:
                    yield f"{path.relative_to(folder).as_posix()}#{number}", "\n\n".join(page)
                    page, size, number = [], 0, number + 1
            yield f"{path.relative_to(folder).as_posix()}#{number}", "\n\n".join(page)

    return read


def sword(pattern: str):
    """Reader of a compressed SWORD module in OSIS markup (https://wiki.crosswire.org/File_Formats), by
    chapter.

    `*.bzs` lists the compressed blocks of `*.bzz`: offset, size and unpacked size, each 32 bits,
    little-endian.
    """

    def read(folder: Path, mandoc: Path) -> Iterator[tuple[str, str]]:
        for module in sorted(path for path in folder.glob(pattern) if path.is_dir()):
            for testament in ("ot", "nt"):
                index = (module / f"{testament}.bzs").read_bytes()
                blocks = (module / f"{testament}.bzz").read_bytes()
                for block, (offset, size, _) in enumerate(struct.iter_unpack("<III", index)):
                    book = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", errors="replace")
                    name = re.search(r'osisID="([^".]+)"[^>]*type="book"', book)
                    for number, chapter in enumerate(re.split(r"<chapter [^>]*sID=[^>]*>", book)):
                        if number and name:  # before the first chapter stand titles and introductions
                            yield (
                                f"{module.relative_to(folder).as_posix()}#{testament}{block}.{name[1]}.{number}",
                                _plain_osis(chapter),
                            )

    return read


def _plain_osis(markup: str) -> str:
    text = re.sub(r"<(note|title)\b.*?</\1>", " ", markup, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"<(div|lg)\b[^>]*>", "\n\n", text)
    text = re.sub(r"<l\b[^>]*\bsID=[^>]*>\s*|<lb\b[^>]*>", "\n", text)
    text = html_entities.unescape(re.sub(r"<[^>]*>", "", text))
    text = re.sub(r" +([,.;:!?])", r"\1", re.sub(r" +", " ", text))
    return "\n".join(line.strip() for line in re.sub(r"\n\s*\n\s*", "\n\n", text).splitlines()).strip()
