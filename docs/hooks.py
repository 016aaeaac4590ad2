"""What the manual takes from the project: names, help texts, results, notebooks and pictures.

mkdocs calls the functions `on_...`; `mkdocs.yml` names this file.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "build" / "docs" / "package"  # as in mkdocs.yml
# Page or picture of the manual: the file of the project that it shows.
FROM_PROJECT = {
    "results.md": "benchmarks/RESULTS.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "pictures/retention.png": "model_cards/emo-tiny/results/retention/retention.png",
}
NAMES = re.compile(r"^<!-- public names of (\S+) -->$", re.M)
COMMANDS = "<!-- help of every command -->"


@event_priority(100)  # before the plugins look at the package
def on_config(config):
    """Make a tree of links in which the package's modules stand where their imports say."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package, folder in settings["tool"]["setuptools"]["package-dir"].items():
        place = PACKAGE.joinpath(*package.split("."))
        place.mkdir(parents=True, exist_ok=True)
        for source in (ROOT / folder).iterdir():
            link = place / source.name
            if source.name != "__pycache__" and not link.is_symlink():
                link.symlink_to(source)
    for link in PACKAGE.rglob("*"):
        if link.is_symlink() and not link.exists():
            link.unlink()
    return config


def on_files(files, config):
    """Add the pages and pictures that lie elsewhere in the project."""
    for name, source in FROM_PROJECT.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for notebook in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(notebook)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put in what is made while building: the reference of a room, and the help of the commands."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands_help())
    return NAMES.sub(lambda found: reference(found[1]), markdown)


def reference(module: str) -> str:
    """What mkdocstrings shows of a module's public names, in the order of `__all__`."""
    return "\n\n".join(f"::: {module}.{name}" for name in public_names(module))


def public_names(module: str) -> list[str]:
    """`__all__` of a module, read from its stub, or else from its source."""
    folder = PACKAGE.joinpath(*module.split("."))
    for file in (folder / "__init__.pyi", folder / "__init__.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else []:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    raise PluginError(f"{module} has no list `__all__`, from which the reference is made.")


def notebook_page(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its saved outputs as Markdown, and its pictures by name.

    Args:
        notebook (`Path`): the notebook.

    Returns:
        `tuple[str, dict[str, bytes]]`: the text, and the contents of the pictures that it shows.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                name = f"{notebook.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                described = cell["metadata"].get("alt")
                if not described:
                    raise PluginError(f"A picture of {notebook.name} has no `alt` in its cell's metadata.")
                parts.append(f"![{described}]({name})")
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    where = f"\n\n*This page is the notebook `{notebook.relative_to(ROOT)}`, with its saved results.*"
    return "\n\n".join([parts[0] + where, *parts[1:]]), pictures


def commands_help() -> str:
    """The help of `emo` and of every command that it lists, as Markdown."""
    parts = []
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        words = waiting.pop(0)
        text = help_of(words)
        parts.append(
            f"{'##' if len(words) < 2 else '###'} `{' '.join(('emo', *words))}`\n\n```text\n{text}\n```"
        )
        waiting = [(*words, command) for command in listed_commands(text)] + waiting
    if len(parts) < 2:
        raise PluginError("`emo --help` lists no command that this page finds: see `listed_commands`.")
    return "\n\n".join(parts)


def help_of(words: tuple[str, ...]) -> str:
    """What a command prints when asked for help."""
    colours = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")
    environment = {name: value for name, value in os.environ.items() if name not in colours}
    environment |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    command = [str(Path(sys.executable).parent / "emo"), *words, "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise PluginError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def listed_commands(text: str) -> list[str]:
    """The commands that a help text lists, as argparse, click or rich lay it out.

    Args:
        text (`str`): the help text.
    """
    # argparse lists them under `{one,two}`; arguments stand further left.
    if re.search(r"^  \{[\w,-]+\}$", text, re.M):
        return re.findall(r"^    ([a-z][\w-]*)(?= {2,}|$)", text, re.M)
    found, panel = [], ""
    for line in text.splitlines():
        if title := re.match(r"(?:╭─+ )?(\w[\w ,-]*?)(?: ─+╮|:)$", line):
            panel = title[1].lower()
        elif panel and not re.search(r"options|arguments|usage", panel):
            found += re.findall(r"^(?:│ |  )([a-z][\w-]*)(?= {2,}| *$)", line)
    return found
