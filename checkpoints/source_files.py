"""Whether the files that something is made of stay the same while it is made.

A long job reads a model's folder piece by piece. If another program rewrites the folder meanwhile, the result
would be a mix of two models. So every job that writes a model notes the state of its source first, and
compares it at the end (`new_folder(sources=...)`, `unchanged`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .errors import CheckpointError

# Clocks of file systems tick every few milliseconds. A file that changes twice in one tick keeps its time.
_TICK = 0.05  # seconds
# What the loading of a model reads.
LOADED_FILES = (
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
)
_MODEL_FILES = (
    *LOADED_FILES,
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
        counts (`Mapping[str, int]`): for a job that makes hard links to the files: how many each had.

    Example: see `SourceChangedError`.
    """

    folder: Path | None
    patterns: tuple[str, ...]
    files: Mapping[str, State]
    counts: Mapping[str, int] = field(default_factory=dict)

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
            links (`bool`, defaults to `False`): the job makes hard links to the files. A new link changes
                one of the times of a file.
        """
        if not os.path.isdir(folder):
            return cls(None, tuple(patterns), {})
        place = Path(folder, subfolder or "")
        found = _states(place, patterns)
        files = {name: state for name, (state, _) in found.items()}
        newest = max((max(state[3:]) for state in files.values()), default=0)
        age = time.time() - newest / 1e9
        if 0 <= age < _TICK:
            time.sleep(_TICK - age)
        counts = {name: count for name, (_, count) in found.items()} if links else {}
        return cls(place, tuple(patterns), files, counts)

    def check(self) -> None:
        """Check that the files are still the same.

        Raises:
            SourceChangedError: if one was written to, replaced or removed, or there is a new one.
        """
        if self.folder is None:
            return
        now = _states(self.folder, self.patterns)
        changed = sorted(
            name
            for name in self.files.keys() | now.keys()
            if name not in self.files or name not in now or not self._is_same(name, *now[name])
        )
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise SourceChangedError(
                f"{self.folder} changed while it was read ({changed[0]}{more}): what was made of it could be "
                "a mix of two models. Call again when nothing writes to it."
            )

    def _is_same(self, name: str, state: State, count: int) -> bool:
        before = self.files[name]
        if name in self.counts and count > self.counts[name]:  # the last time is that of the link
            return before[:-1] == state[:-1]
        return before == state


@contextmanager
def unchanged(*sources: SourceFiles) -> Iterator[None]:
    """Check at the end of the block that sources have not changed within it.

    Args:
        sources (`SourceFiles`): their states, noted before anything of them was read.

    Raises:
        SourceChangedError: if one has changed; also in place of an error within the block, which this is
            then the likely cause of.

    Example:

    ```python
    >>> from transformers_emo.checkpoints.source_files import SourceChangedError, SourceFiles, unchanged
    >>> _ = (tmp_path / "config.json").write_text("{}")
    >>> try:
    ...     with unchanged(SourceFiles.of(tmp_path)):
    ...         _ = (tmp_path / "config.json").write_text("[]")
    ... except SourceChangedError as error:
    ...     print("changed while it was read (config.json)" in str(error))
    True

    ```
    """
    try:
        yield
    except Exception as error:
        try:
            for source in sources:
                source.check()
        except SourceChangedError as changed:
            raise changed from error
        raise
    for source in sources:
        source.check()


def _states(folder: Path, patterns: Sequence[str]) -> dict[str, tuple[State, int]]:
    """The state of each file, and how many links it has."""
    found: dict[str, tuple[State, int]] = {}
    for pattern in patterns:
        for path in folder.glob(pattern):
            try:
                state = path.stat()
            except OSError:  # removed at this moment, or a broken link
                continue
            name = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in name.parts[:-1])
            if path.is_file() and not hidden:
                times = (state.st_mtime_ns, state.st_ctime_ns)
                found[name.as_posix()] = (state.st_dev, state.st_ino, state.st_size, *times), state.st_nlink
    return found
