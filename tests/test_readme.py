"""The README's code runs as it stands."""

import re
import shlex
from pathlib import Path

import pytest
from transformers_emo import cli
from transformers_emo.analysis import Retention

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


@pytest.mark.parametrize("block", [block for block in BLOCKS if "push_to_hub" not in block])
def test_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_code_to_run():
    assert len(BLOCKS) >= 4


@pytest.mark.slow
def test_the_retention_command_gives_the_table_beside_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (command,) = re.findall(r"^emo (retention .*\\\n.*)$", TEXT, re.M)
    words = shlex.split(command.replace("\\\n", " "))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    assert cli.main(words) == 0
    found = Retention.read(tmp_path / "curve")
    rows = re.findall(r"^\| (\d+) \| ([+-]?\d\.\d{3}.*) \|$", TEXT, re.M)
    assert [int(kept) for kept, _ in rows] == [64, 32, 16, 8, 4, 2]
    columns = [(model, method) for model in ("emo-tiny", "std-tiny") for method in ("layerwise", "random")]
    for kept, row in rows:
        for (model, method), said in zip(columns, row.split(" | "), strict=True):
            loss, full = found.loss(model, method, int(kept) / 64), found.loss(model, method, 1)
            # An expert chosen by a hair's breadth may be another one where sums round otherwise.
            assert float(said) == pytest.approx(loss if kept == "64" else loss - full, abs=0.005)
