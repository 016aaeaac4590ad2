"""Plain search in a folder of text files: no index, no vectors.

`ripgrep` finds the files that hold a word of the question, where it is installed; else every file is read.
Both ways find the same passages.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_WORD = re.compile(r"[^\W\d_]{3,}|[\u3040-\u9fff]{2}")  # words, and pairs of Chinese or Japanese characters
_BLANK = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Passage:
    """A piece of a file that holds words of a question.

    Args:
        file (`Path`): where it is.
        text (`str`): the piece.
        score (`float`): the rarer the words it has in common with the question, the more.
    """

    file: Path
    text: str
    score: float


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def find_passages(folder: Path, question: str, *, number: int = 4, length: int = 500) -> list[Passage]:
    """The passages of a folder that have most in common with a question.

    A word counts by how rare it is among the passages found. A word that is there twice counts once.

    Args:
        folder (`Path`): text files, also in folders below. Files that are no UTF-8 text are skipped.
        question (`str`): what is asked.
        number (`int`, defaults to 4): how many passages.
        length (`int`, defaults to 500): characters of a passage, about.

    Raises:
        NotADirectoryError: if there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {str(folder)!r}: name one that holds text files.")
    wanted = set(words(question))
    if not wanted:
        return []
    found = []
    for file in _files(folder, wanted):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if "\0" in text:
            continue
        found += [(file, piece, wanted & set(words(piece))) for piece in _pieces(text, length)]
    found = [(file, piece, common) for file, piece, common in found if common]
    times = Counter(word for _, _, common in found for word in common)
    rare = {word: math.log(1 + len(found) / count) for word, count in times.items()}
    passages = [Passage(file, piece, sum(rare[word] for word in common)) for file, piece, common in found]
    return sorted(passages, key=lambda one: (-one.score, str(one.file), one.text))[:number]


def _files(folder: Path, wanted: Iterable[str]) -> list[Path]:
    """Files that may hold one of the words."""
    ripgrep = shutil.which("rg")
    if ripgrep is not None:
        command = [ripgrep, "--files-with-matches", "--ignore-case", "--fixed-strings", "--null"]
        command += ["--no-ignore", "--hidden", *(word for one in wanted for word in ("-e", one)), str(folder)]
        done = subprocess.run(command, capture_output=True)
        if done.returncode in (0, 1):  # 1: nothing found
            return sorted(Path(name.decode()) for name in done.stdout.split(b"\0") if name)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _pieces(text: str, length: int) -> list[str]:
    """Paragraphs, short ones joined and long ones cut."""
    pieces, held = [], ""
    for paragraph in _BLANK.split(text):
        for start in range(0, len(paragraph), length):
            part = paragraph[start : start + length]
            if held and len(held) + len(part) > length:
                pieces.append(held)
                held = ""
            held = f"{held}\n\n{part}" if held else part
    return [*pieces, held] if held else pieces
