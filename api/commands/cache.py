"""The command `emo cache`."""

from typing import Annotated, Literal

import typer

from .shared import AsJson, CacheDir, tell


def cache(
    action: Annotated[Literal["list", "clear"], typer.Argument(help="What to do.")] = "list",
    repo: Annotated[
        str | None, typer.Argument(help="Only this repository.", show_default="all repositories")
    ] = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """List or clear what was downloaded of weights in part.

    These are files of the Hub of which only parts are kept. Whole files are in the ordinary cache: see
    `hf cache`.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["cache", "list", "--cache-dir", str(tmp_path)])
    0.0 MB in parts of 0 files
    0

    ```
    """
    from transformers_emo.checkpoints.hub.names import existing_folder
    from transformers_emo.checkpoints.hub.part_cache import cached_parts, clear_parts

    if cache_dir is not None:
        existing_folder(cache_dir)
    if action == "clear":
        cleared = clear_parts(repo, cache_dir)
        tell(json, f"cleared {cleared / 1e6:.1f} MB", cleared=cleared)
        return
    parts = [part for part in cached_parts(cache_dir) if repo in (None, part.repo_id)]
    total = sum(part.present for part in parts)
    lines = [
        f"{part.repo_id}  {part.file}  {part.present / 1e6:.1f} of {part.size / 1e6:.1f} MB  "
        f"({', '.join(commit[:8] for commit in part.commits)})"
        for part in parts
    ]
    lines.append(f"{total / 1e6:.1f} MB in parts of {len(parts)} files")
    facts = [
        {
            "repo": part.repo_id,
            "file": part.file,
            "commits": part.commits,
            "size": part.size,
            "present": part.present,
        }
        for part in parts
    ]
    tell(json, "\n".join(lines), parts=facts, present=total)
