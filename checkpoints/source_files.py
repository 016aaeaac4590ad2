"""Whether the files that something is made of stay the same while it is made.

A long job reads a model's folder piece by piece. If another program rewrites the folder meanwhile, the result
would be a mix of two models. So every job that writes a model notes the state of its source first, and
compares it at the end (`new_folder(sources=...)`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

# Clocks of file systems tick every few milliseconds. A file that changes twice in one tick keeps its time.
_TICK = 0.05  # seconds
_MODEL_FILES = (
    "*.safetensors",
    "*.index*.json",
    "config.json",
    "generation_config.json",
    "token*.*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "README.md",
    "LICENSE*",
    "subsets/*.json",
)

State = tuple[int, ...]  # device, inode, size, times of the last change of contents and of anything


class SourceChangedError(CheckpointError):
    """The files of a model changed while they were read. Nothing of what was made of them is kept.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.source_files import SourceChangedError, SourceFiles
    >>> _ = (tmp_path / "config.json").write_text("{}")
    >>> before = SourceFiles.of(tmp_path)
    >>> _ = (tmp_path / "config.json").write_text("[]")
    >>> try:
    ...     before.check()
    ... except SourceChangedError as error:
    ...     print("changed while it was read (config.json)" in str(error))
    True

    ```
    """


@dataclass(frozen=True)
class SourceFiles:
    """The state of the files of a folder at one moment.

    Args:
        folder (`Path`, *optional*): the folder. `None` for a repository: the files of a commit never change.
        patterns (`tuple[str, ...]`): which files count, as for `Path.glob`.
        files (`Mapping[str, tuple[int, ...]]`): their states by their paths in the folder.
        links (`bool`): whether the job makes hard links to the files, which changes one of their times.

    Example: see `SourceChangedError`.
    """

    folder: Path | None
    patterns: tuple[str, ...]
    files: Mapping[str, State]
    links: bool = False

    @classmethod
    def of(
        cls,
        folder: str | os.PathLike,
        *,
        patterns: Sequence[str] = _MODEL_FILES,
        subfolder: str | None = None,
        links: bool = False,
    ) -> SourceFiles:
        """Note the state of a folder. Call it before anything of the folder is read.

        If a file was written at this moment, this waits up to 0.05 seconds, so that a later change has
        another time.

        Args:
            folder (`str` or `os.PathLike`): the folder. For what is no folder, such as the name of a
                repository, the result has no files.
            patterns (`Sequence[str]`, *optional*): which files count, as for `Path.glob`; by default those of
                a model: weights, config, tokenizer, card, licence and library of subsets.
            subfolder (`str`, *optional*): the folder inside `folder` that is read.
            links (`bool`, defaults to `False`): the job makes hard links to the files.
        """
        if not os.path.isdir(folder):
            return cls(None, tuple(patterns), {}, links)
        place = Path(folder, subfolder or "")
        files = _states(place, patterns, links)
        newest = max((max(state[3:]) for state in files.values()), default=0)
        age = time.time() - newest / 1e9
        if 0 <= age < _TICK:
            time.sleep(_TICK - age)
        return cls(place, tuple(patterns), files, links)

    def check(self) -> None:
        """Check that the files are still the same.

        Raises:
            SourceChangedError: if one was written to, replaced or removed, or there is a new one.
        """
        if self.folder is None:
            return
        now = _states(self.folder, self.patterns, self.links)
        changed = sorted(n for n in self.files.keys() | now.keys() if self.files.get(n) != now.get(n))
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise SourceChangedError(
                f"{self.folder} changed while it was read ({changed[0]}{more}): what was made of it could be "
                "a mix of two models. Call again when nothing writes to it."
            )


def _states(folder: Path, patterns: Sequence[str], links: bool) -> dict[str, State]:
    found: dict[str, State] = {}
    for pattern in patterns:
        for path in folder.glob(pattern):
            try:
                state = path.stat()
            except OSError:  # removed at this moment, or a broken link
                continue
            name = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in name.parts[:-1])
            if path.is_file() and not hidden:
                times = (state.st_mtime_ns,) if links else (state.st_mtime_ns, state.st_ctime_ns)
                found[name.as_posix()] = (state.st_dev, state.st_ino, state.st_size, *times)
    return found
