"""The folder of a Space on the Hugging Face Hub that shows the page of `emo demo`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from ...checkpoints.hub.names import can_be_repo
from ...checkpoints.writing.output_folder import new_folder
from ...imports.optional_packages import requirement_of

# Of a model's folder the page needs these: weights, config, tokenizer, and the library of domains.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "LICENSE*")
_APP = '''"""The page of `emo demo`. A Space runs this file; so does `python app.py` here."""

import sys
from pathlib import Path

from transformers_emo.cli import main

MODEL = {model}
OPTIONS = {options}

if __name__ == "__main__":
    sys.exit(main(["demo", {argument}, *OPTIONS, *sys.argv[1:]]))
'''
_CARD = """# {name}: try its experts

This page shows {what}, a mixture of experts, at work. It is the page of `emo demo` of the package
transformers-emo. Choose which experts may write, and see layer by layer which of them do.

To run it on your machine:

```bash
pip install -r requirements.txt
python app.py
```
{note}"""
_LFS = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def write_space(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    options: Mapping[str, str] | None = None,
    requirement: str | None = None,
) -> str:
    """Write the folder: `app.py`, `requirements.txt`, and the card with the Space's settings.

    A model in a folder is copied into it. One on the Hub is named, and downloaded when the Space starts.

    Args:
        model (`str` or `os.PathLike`): a folder or Hub repository.
        out (`str` or `os.PathLike`): the folder, which must not exist.
        options (`Mapping[str, str]`, *optional*): options of `emo demo` that the Space starts with.
        requirement (`str`, *optional*): what `pip install` gets for this package; by default this version of
            it, with the extra `demo`.

    Returns:
        `str`: what was written, in a sentence.

    Raises:
        FileExistsError: if the folder exists.
        ValueError: if the model is neither a folder with a config nor the name of a repository.

    Example:

    ```python
    >>> from transformers_emo.analysis.trying.space import write_space
    >>> print(write_space("me/emo", tmp_path / "space"))
    /...space: app.py, requirements.txt and README.md for me/emo
    >>> (tmp_path / "space" / "requirements.txt").read_text()
    'transformers-emo[demo]==...\\n'

    ```
    """
    local, name = Path(model), os.fspath(model)
    is_folder = local.is_dir()
    if is_folder and not (local / "config.json").is_file():
        raise ValueError(f"{name!r} holds no config.json: give the folder of a model.")
    if not is_folder and not can_be_repo(name):
        raise ValueError(f"{name!r} is neither a folder nor the name of a repository: give one of these.")
    shown = local.resolve().name if is_folder else name.rpartition("/")[2]
    words = [word for pair in (options or {}).items() for word in pair]
    requirement = requirement or f"transformers-emo[demo]=={version('transformers-emo')}"
    card = {
        "title": f"{shown}: try its experts",
        "emoji": "🔎",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": _gradio_version(),
        "python_version": "3.12",
        "app_file": "app.py",
        "pinned": False,
    }
    note = (
        "\nThe weights are files of Git LFS: `git lfs install` before they are added.\n" if is_folder else ""
    )
    if not is_folder:
        card["models"] = [name]
    with new_folder(out) as folder:
        size = _copy_model(local, folder / shown) if is_folder else 0
        argument = "str(Path(__file__).parent / MODEL)" if is_folder else "MODEL"
        app = _APP.format(model=repr(shown if is_folder else name), options=repr(words), argument=argument)
        if not is_folder:
            app = app.replace("import sys\nfrom pathlib import Path\n", "import sys\n")
        (folder / "app.py").write_text(app, encoding="utf-8")
        (folder / "requirements.txt").write_text(f"{requirement}\n", encoding="utf-8")
        head = yaml.safe_dump(card, allow_unicode=True, sort_keys=False)
        what = shown if is_folder else f"[{name}](https://huggingface.co/{name})"
        text = _CARD.format(name=shown, what=what, note=note)
        (folder / "README.md").write_text(f"---\n{head}---\n\n{text}", encoding="utf-8")
        if is_folder:
            (folder / ".gitattributes").write_text(_LFS, encoding="utf-8")
    files = (
        "app.py, requirements.txt, README.md and the model"
        if is_folder
        else "app.py, requirements.txt and README.md"
    )
    return (
        f"{os.fspath(out)}: {files}, {size / 1e6:.1f} MB"
        if is_folder
        else f"{os.fspath(out)}: {files} for {name}"
    )


def _gradio_version() -> str:
    """The version of Gradio that is installed, or the oldest that this package takes."""
    try:
        return version("gradio")
    except PackageNotFoundError:
        oldest = re.search(r">=([\d.]+)", requirement_of("gradio"))
        assert oldest is not None  # the extra `demo` says so
        return oldest[1]


def _copy_model(model: Path, to: Path) -> int:
    """Copy what the page needs, and say how many bytes it is."""
    size = 0
    found = sorted(
        {path for pattern in _WANTED for path in model.glob(pattern)} | set(model.glob("subsets/*.json"))
    )
    for path in found:
        if path.is_file():
            target = to / path.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            size += path.stat().st_size
    return size
