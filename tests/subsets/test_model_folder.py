"""A folder appears under its name when it is whole."""

import errno

import pytest
from transformers_emo.subsets import model_folder
from transformers_emo.subsets.model_folder import new_folder


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


@pytest.mark.parametrize("plan", [{"of": ["a", 1.5]}, {"of": ("a", 1.5)}], ids=["list", "tuple"])
def test_a_run_with_a_plan_finds_what_an_earlier_one_left(plan, tmp_path):
    for name in ("first", "second"):
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", plan=plan) as folder:
            (folder / name).touch()
            raise KeyboardInterrupt
    with new_folder(tmp_path / "out", plan=plan) as folder:
        (folder / "third").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"first", "second", "third"}


@pytest.mark.parametrize("plan", [None, {"of": "b"}], ids=["none", "another"])
@pytest.mark.parametrize("left", ["an earlier plan", "damaged", "nested"])
def test_what_a_run_with_another_plan_left_is_removed(plan, left, tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", plan={"of": "a"}) as folder:
        (folder / "first").touch()
        if left != "an earlier plan":
            (folder / ".plan.json").write_text({"damaged": '{"of": ', "nested": "[" * 100_000}[left])
        raise KeyboardInterrupt
    with new_folder(tmp_path / "out", plan=plan) as folder:
        assert not (folder / "first").exists()
        (folder / "second").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]


def test_a_file_system_that_does_not_lock_is_written_without(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS says of a folder

    monkeypatch.setattr(model_folder.fcntl, "flock", refused)
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert (tmp_path / "out" / "file").exists()
