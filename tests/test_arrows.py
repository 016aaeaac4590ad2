"""Rooms import only earlier rooms: `.importlinter` is the table, import-linter reads the code."""

import subprocess
import sys
from pathlib import Path

import transformers_emo

ROOT = Path(__file__).parents[1]


def test_no_import_runs_against_the_table_of_arrows():
    folder = Path(transformers_emo.__file__).parent
    assert (folder / "subsets").is_dir(), (
        f"{folder} holds no rooms, so their imports cannot be read: install the package as `make` does, "
        "`pip install -e . --config-settings editable_mode=strict`"
    )
    # In a process of its own: it switches off every logger that is there.
    code = "import sys\nfrom importlinter.cli import lint_imports\n"
    code += "sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / ".importlinter"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
