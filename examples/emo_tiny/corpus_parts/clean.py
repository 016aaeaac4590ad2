"""One document at a time: licence headers, generated files, untranslated paragraphs, length."""

import hashlib
import re

MIN_BYTES = 1_500  # about 500 tokens: shorter documents are dropped
PIECE = 8_000  # characters; longer documents are cut near here, at a blank line
MAX_PIECES = 6  # of one file: a few long files would be most of a domain

_LICENCE = re.compile(
    r"copyright|licen[sc]e|SPDX|redistribut|warrant(y|ies)|all rights reserved|free software|public domain|"
    r"is part of GNU|General Public",
    re.IGNORECASE,
)
_LICENCE_LINE = re.compile(
    r"^[^\w\n]*(SPDX-License-Identifier|Distributed under the terms|Copyright\s+(\(c\)|©|\d{4})|"
    r"\(c\)\s+Copyright|All rights reserved\b|-\*-.*-\*-[^\w\n]*$|vim?:\s*set\b|Local Variables:|"
    r"coding[:=]\s*utf-8).*\n?",
    re.MULTILINE | re.IGNORECASE,
)
_COMMENT_BLOCK = re.compile(
    r"\s*(/\*.*?\*/|\(\*.*?\*\)|(?:[ \t]*(?://|#(?!include|define|if)|;|--)[^\n]*\n)+)", re.DOTALL
)
_GENERATED = re.compile(
    r"generated (by|from|automatically|file)|auto-?generated|automatically generated|@generated|"
    r"do not (edit|modify)",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(\.[\w-]+)*\.[A-Za-z]{2,}\b")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufeff\ufffd]")

_ENGLISH = r"\b(?:the|of|and|to|is|in|for|that|with|this|are|be|not|you|it|as|by|or|on|if|can|from|an?)\b"
# What marks prose of a language: its commonest words, or letters that only it has.
LANGUAGES = {
    "english": re.compile(_ENGLISH),
    "french": re.compile(
        r"\b(?:les?|la|des?|du|une?|est|sont|pour|dans|que|qui|sur|par|avec|pas|et|ou|ce|cette|au)\b"
    ),
    "german": re.compile(
        r"\b(?:der|die|das|den|dem|des|eine?[nrsm]?|ist|sind|und|oder|für|mit|nicht|von|zu|wird|auf|im)\b"
    ),
    "spanish": re.compile(
        r"\b(?:el|la|los|las|del?|una?|es|son|para|en|que|por|con|no|se|y|o|al|este|esta|su)\b"
    ),
    "russian": re.compile(r"[а-яё]{2,}"),
    "japanese": re.compile(r"[ぁ-んァ-ヶ]+"),
    "chinese": re.compile(r"[的是在不了有和一个如果可以这将为用使以件行]"),
}
_DENSITY = 40  # characters: manuals with much code in them have one such mark in at most as many


def content_hash(text: str) -> str:
    """Name of a document by its content: 16 hexadecimal digits, the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def paragraphs(text: str) -> list[str]:
    """Parts of a text between blank lines."""
    return re.split(r"\n\s*\n", text)


def clean(text: str, language: str | None = None, licence_headers: bool = False) -> str | None:
    """A document without what is not its own text, or none where little is left.

    Args:
        text: raw text.
        language: prose of another language (English) is left out, see `LANGUAGES`.
        licence_headers: comments about licences go, and generated files.
    """
    text = _CONTROL.sub("", text.replace("\r\n", "\n"))
    if licence_headers:
        if is_generated(text):
            return None
        text = strip_licence(text)
    text = _EMAIL.sub("name@example.org", text)
    text = re.sub(r"[ \t\xa0]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    if language:
        text = in_language(text, language)
    if len(text.encode()) < MIN_BYTES or is_table(text):
        return None
    return text


def strip_licence(text: str) -> str:
    """A source file without the comments about its licence that it begins with, and such lines elsewhere."""
    kept, rest = [], text
    for _ in range(6):  # a shebang, a title and a licence may be comments of their own
        match = _COMMENT_BLOCK.match(rest)
        if match is None:
            break
        block, rest = match[0], rest[match.end() :]
        # A long comment of several paragraphs keeps those that say something else.
        parts = re.split(r"(\n[ \t]*(?:[*;#/-]{0,4})[ \t]*(?=\n))", block)
        if _LICENCE.search(block):
            parts = [part for part in parts if not _LICENCE.search(part)] if len(parts) > 1 else []
            block = "".join(parts)
            opened = block.lstrip().startswith(("/*", "(*"))
            closed = block.rstrip().endswith(("*/", "*)"))
            block = block if opened == closed and _words(block) >= 4 else ""
        kept.append(block)
    return _LICENCE_LINE.sub("", "".join(kept) + rest)


def _words(text: str) -> int:
    return len(re.findall(r"\w{2,}", text))


def is_generated(text: str) -> bool:
    """Whether a source file says at its beginning that a program wrote it."""
    return bool(_GENERATED.search(text[:1_000]))


def is_table(text: str) -> bool:
    """Whether a text is mostly data: very long lines, or few letters."""
    lines = text.splitlines()
    visible = sum(not character.isspace() for character in text)
    letters = sum(character.isalpha() for character in text)
    return len(text) / len(lines) > 1_000 or letters < 0.4 * visible


def in_language(text: str, language: str) -> str:
    """A text without paragraphs of English prose; empty where the rest is not plainly of the language."""
    native, english = LANGUAGES[language], LANGUAGES["english"]
    if language != "english":
        counted = [(part, len(english.findall(part)), len(native.findall(part))) for part in paragraphs(text)]
        text = "\n\n".join(part for part, foreign, own in counted if foreign < 3 or foreign <= own)
    return text if len(native.findall(text)) >= len(text) / _DENSITY else ""


def pieces(text: str) -> list[str]:
    """A long document cut at blank lines into pieces of about `PIECE` characters, at most `MAX_PIECES` of
    them."""
    found: list[str] = []
    while len(text) > 1.5 * PIECE and len(found) < MAX_PIECES:
        border = max(text.rfind("\n\n", PIECE // 2, PIECE), -1)
        if border == -1:
            border = max(text.rfind("\n", PIECE // 2, PIECE), -1)
        if border == -1:
            border = PIECE
        found.append(text[:border].strip("\n"))
        text = text[border:].strip("\n")
    if len(found) < MAX_PIECES and len(text.encode()) >= MIN_BYTES:
        found.append(text)
    return found
