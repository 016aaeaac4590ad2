"""Which packages the corpus is made of: one entry a domain; new domains are added to the end.

Of a paragraph or a document that occurs in two domains, the earlier one keeps it. So English stands before
the translations (what was left untranslated in them goes), and a domain at the end changes none before it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import extract

Reader = Callable[[Path, Path], Iterable[tuple[str, str]]]


@dataclass(frozen=True)
class Source:
    """One package and how its documents are read.

    Args:
        package: `debian:NAME`, `debian:NAME | OTHER` (the first that the release has) or
            `pypi:NAME==VERSION`.
        licence: what the package's own copyright file says of these files.
        read: from the unpacked package's folder, and the program `mandoc`, to pairs of path and raw text.
    """

    package: str
    licence: str
    read: Reader


@dataclass(frozen=True)
class Domain:
    """A domain of the corpus.

    Args:
        name: name of its files.
        title: what it is, for the table.
        sources: packages, read in turn.
        language: `None`, or the language that its prose must be in (see `clean.LANGUAGES`).
        licence_headers: whether its documents are source files, which begin with a licence.
    """

    name: str
    title: str
    sources: list[Source] = field(default_factory=list)
    language: str | None = None
    licence_headers: bool = False


GPL2, GPL3, LGPL21, MATHCOMP = "GPL-2.0-only", "GPL-3.0-or-later", "LGPL-2.1-only", "CECILL-B"
MAN = "Linux-man-pages-copyleft, GPL-2.0-or-later, BSD or MIT, by page"
MAN_TRANSLATED = "GPL-3.0-or-later, or the licence of the page"
HANDBOOK = "CC-BY-SA-3.0 or GPL-2.0-or-later"
OFFICE = "MPL-2.0"

PYTHON_SKIP = r"/(tests|locale|migrations)/|/parsetab|/_parse_latex_antlr/"

# Of the whole kernel, the parts that are no drivers: mostly prose-like C with few tables.
KERNEL = (
    r"^[^/]+/(kernel|mm|fs|lib|ipc|block|security|net/(core|ipv4|ipv6|sched|bridge)|io_uring|init)/.*\.c$"
)


def _language(
    name: str, language: str, man: list[str], office: str, handbook: str, reference: str | None
) -> Domain:
    """A language's manuals: manual pages, the office suite's help, two handbooks."""
    licence = MAN if language == "english" else MAN_TRANSLATED
    # Chinese has two scripts: the same page in both would be in two splits.
    pattern = "usr/share/man/zh_CN/**/*.gz" if language == "chinese" else "usr/share/man/**/*.gz"
    sources = [Source(f"debian:{package}", licence, extract.manual_pages(pattern)) for package in man]
    sources.append(
        Source(f"debian:libreoffice-help-{office}", OFFICE, extract.html("**/text/**/*.html", "DisplayArea"))
    )
    sources.append(Source("debian:debian-handbook", HANDBOOK, extract.html(f"**/html/{handbook}/*.html")))
    if reference:
        pattern = f"**/ch*.{reference}.html"
        sources.append(
            Source(f"debian:debian-reference-{reference}", "GPL-2.0-or-later", extract.html(pattern))
        )
    return Domain(language, f"{name}: manual pages and handbooks", sources, language=language)


DOMAINS = [
    _language("English", "english", ["manpages", "manpages-dev"], "en-us", "en-US", "en"),
    Domain(
        "python",
        "Python: a web framework, computer algebra, networks",
        [
            Source("pypi:django==5.2.8", "BSD-3-Clause", extract.code("django/**/*.py", skip=PYTHON_SKIP)),
            Source("pypi:sympy==1.14.0", "BSD-3-Clause", extract.code("sympy/**/*.py", skip=PYTHON_SKIP)),
            Source("pypi:networkx==3.5", "BSD-3-Clause", extract.code("networkx/**/*.py", skip=PYTHON_SKIP)),
        ],
        licence_headers=True,
    ),
    Domain(
        "c",
        "C: the core of the Linux kernel",
        [
            Source(
                "debian:linux-source-6.1 | linux-source-6.12",
                GPL2,
                extract.tarball("usr/src/*.tar.xz", KERNEL),
            )
        ],
        licence_headers=True,
    ),
    Domain(
        "go",
        "Go: its standard library and compiler",
        [
            Source(
                "debian:golang-1.19-src | golang-1.24-src",
                "BSD-3-Clause",
                extract.code(
                    "usr/share/go-*/src/**/*.go", skip=r"/(testdata|vendor|syscall|ssa)/|_test\.go$"
                ),
            )
        ],
        licence_headers=True,
    ),
    Domain(
        "lisp",
        "Emacs Lisp: Emacs",
        [Source("debian:emacs-el", GPL3, extract.code("**/*.el.gz", skip=r"/leim/|loaddefs|-autoloads"))],
        licence_headers=True,
    ),
    Domain(
        "coq",
        "Coq: proofs of the standard library, Mathematical Components and std++",
        [
            Source("debian:libcoq-stdlib", LGPL21, extract.code("**/*.v")),
            Source("debian:libcoq-mathcomp-ssreflect", MATHCOMP, extract.code("**/*.v")),
            Source("debian:libcoq-mathcomp-fingroup", MATHCOMP, extract.code("**/*.v")),
            Source("debian:libcoq-mathcomp-algebra", MATHCOMP, extract.code("**/*.v")),
            Source("debian:libcoq-mathcomp-solvable", MATHCOMP, extract.code("**/*.v")),
            Source("debian:libcoq-mathcomp-analysis", MATHCOMP, extract.code("**/*.v")),
            Source("debian:libcoq-stdpp", "BSD-3-Clause", extract.code("**/*.v")),
        ],
        licence_headers=True,
    ),
    Domain(
        "metamath",
        "Mathematics: theorems of Metamath's set.mm with their explanations",
        [Source("debian:metamath-databases", "CC0-1.0", extract.metamath("**/databases/set.mm"))],
    ),
    Domain(
        "sql",
        "SQL: the PostgreSQL handbook",
        [
            Source(
                "debian:postgresql-doc-15 | postgresql-doc-17",
                "PostgreSQL",
                extract.html("**/html/*.html", skip=r"/(release|bookindex|biblio|index|legalnotice)"),
            )
        ],
    ),
    Domain(
        "scripture",
        "Scripture: the World English Bible, by chapter",
        [Source("debian:sword-text-web", "public domain", extract.sword("**/ztext/*"))],
    ),
    Domain(
        "dictionary",
        "Dictionary: Webster's of 1913, by page",
        [Source("debian:dict-gcide", "GPL-2.0-or-later", extract.dictionary("**/gcide.dict.dz"))],
    ),
    _language("French", "french", ["manpages-fr", "manpages-fr-dev"], "fr", "fr-FR", "fr"),
    _language("German", "german", ["manpages-de", "manpages-de-dev"], "de", "de-DE", "de"),
    _language("Spanish", "spanish", ["manpages-es", "manpages-es-dev"], "es", "es-ES", "es"),
    _language("Russian", "russian", ["manpages-ru", "manpages-ru-dev"], "ru", "ru-RU", None),
    _language("Japanese", "japanese", ["manpages-ja", "manpages-ja-dev"], "ja", "ja-JP", "ja"),
    _language("Chinese", "chinese", ["manpages-zh"], "zh-cn", "zh-CN", "zh-cn"),
]
