"""A folder appears under its name when it is whole."""

import pytest
from transformers_emo.conversion.new_folder import new_folder


def test_what_a_killed_run_left_is_removed(tmp_path):
    left = tmp_path / ".out.partial"
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "file").touch()
    (left / "model.safetensors").write_text("half")
    (left / "link").symlink_to(tmp_path)
    with new_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
        (folder / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_two_runs_do_not_write_one_folder(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "mine").touch()
        with (
            pytest.raises(BlockingIOError, match="Another run is writing"),
            new_folder(tmp_path / "out"),
        ):
            pass
        assert (folder / "mine").exists()
    assert (tmp_path / "out" / "mine").exists()


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "deep" / "out"):
        raise KeyboardInterrupt
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_a_name_that_is_taken_is_refused(kind, tmp_path):
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "broken link": lambda: out.symlink_to("nowhere")}[kind]()
    with pytest.raises(FileExistsError, match="exists already"), new_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "file").touch()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "others")
    with pytest.raises(FileExistsError, match="remove it"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "others" / "file").exists()
