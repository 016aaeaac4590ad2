"""Rooms import only earlier rooms: `.importlinter` is the table, import-linter reads the code."""

from pathlib import Path

import transformers_emo
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def test_no_import_runs_against_the_table_of_arrows():
    folder = Path(transformers_emo.__file__).parent
    assert (folder / "subsets").is_dir(), (
        f"{folder} holds no rooms, so their imports cannot be read: install the package as `make` does, "
        "`pip install -e . --config-settings editable_mode=strict`"
    )
    assert lint_imports(str(ROOT / ".importlinter"), no_cache=True) == 0
