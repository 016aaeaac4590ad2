"""Files that appear whole, and in no place but their own."""

import os
import stat

import pytest
from transformers_emo import EmoConfig, ExpertSubset
from transformers_emo.analysis.pictures.plots import new_figure, save_figure
from transformers_emo.checkpoints.writing.durable_files import write_whole
from transformers_emo.subsets import save_pruning_metadata

SUBSET = ExpertSubset([[0, 1, 2, 15]])
CONFIG = EmoConfig(num_hidden_layers=1, num_experts=16)


def _figure(path):
    save_figure(new_figure(1, 1, width=1, height=1)[0], path.with_suffix(".png"))


WRITERS = {
    "text": lambda path: write_whole(path, "text"),
    "subset": SUBSET.save,
    "authors' metadata": lambda path: save_pruning_metadata(SUBSET, CONFIG, path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_a_planted_link_is_not_followed(write, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    planted = tmp_path / f"out.json.{os.getpid()}.partial"
    planted.symlink_to(precious)
    write(tmp_path / "out.json")
    assert precious.read_text() == "keep me"
    assert not planted.is_symlink() and not (tmp_path / "out.json").is_symlink()


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_files_have_the_usual_permissions(write, tmp_path):
    (tmp_path / "usual").write_text("")
    write(tmp_path / "new" / "out.json")
    assert stat.S_IMODE((tmp_path / "new" / "out.json").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "usual").stat().st_mode
    )


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("write", [*WRITERS.values(), _figure], ids=[*WRITERS, "picture"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file(write, name, monkeypatch, tmp_path):
    def fail(*args):
        raise OSError(5, "Input/output error")

    for ending in ("json", "png"):
        (tmp_path / f"out.{ending}").write_text("old")
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "out.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}
