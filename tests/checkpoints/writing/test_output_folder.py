"""A folder appears under its name when it is whole."""

import errno
import fcntl

import pytest
from transformers_emo.checkpoints import CheckpointError
from transformers_emo.checkpoints.writing import durable_files, output_folder
from transformers_emo.checkpoints.writing.output_folder import new_folder


def test_files_of_a_killed_run_are_removed(tmp_path):
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


def test_two_runs_cannot_write_to_the_same_folder(tmp_path):
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
def test_a_run_with_a_plan_finds_the_files_of_an_earlier_run(plan, tmp_path):
    for name in ("first", "second"):
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", plan=plan) as folder:
            (folder / name).touch()
            raise KeyboardInterrupt
    with new_folder(tmp_path / "out", plan=plan) as folder:
        (folder / "third").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"first", "second", "third"}


@pytest.mark.parametrize("plan", [None, {"of": "b", "weight": 1}], ids=["none", "another"])
def test_files_of_another_job_are_neither_used_nor_removed(plan, tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", plan={"of": "a"}) as folder:
        (folder / "first").touch()
        raise KeyboardInterrupt
    differ = "of" if plan is None else "of, weight"
    message = rf"\.out\.partial holds the files of another job .* differs in {differ} .*remove the folder"
    with pytest.raises(FileExistsError, match=message), new_folder(tmp_path / "out", plan=plan):
        pass
    with new_folder(tmp_path / "out", plan={"of": "a"}) as folder:
        assert (folder / "first").exists()


@pytest.mark.parametrize("plan", [None, {"of": "b"}], ids=["none", "another"])
@pytest.mark.parametrize("left", ["a plan alone", "damaged", "nested", "no object"])
def test_files_that_no_run_can_continue_are_removed(plan, left, tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", plan={"of": "a"}) as folder:
        (folder / "first").touch()
        raise KeyboardInterrupt
    if left == "a plan alone":
        (folder / "first").unlink()
    else:
        content = {"damaged": '{"of": ', "nested": "[" * 100_000, "no object": "[1]"}[left]
        (folder / ".plan.json").write_text(content)
    with new_folder(tmp_path / "out", plan=plan) as folder:
        assert not (folder / "first").exists()
        (folder / "second").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]


def test_a_plan_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(path, content):
        path.write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "write_json", killed)
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", plan={"of": "a"}):
            pass
        assert not (tmp_path / ".out.partial" / ".plan.json").exists()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", plan={"of": "a"}) as folder:
        (folder / "first").touch()
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:  # a plan that is there is not written again
        patch.setattr(output_folder, "write_json", killed)
        with new_folder(tmp_path / "out", plan={"of": "a"}) as folder:
            assert (folder / "first").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "^The disk is full. "),
        (OSError(errno.EIO, "Input/output error"), "^Writing .*out failed: .*Input/output error. "),
        (OSError("The disk has 1 GB left: make room."), "^The disk has 1 GB left: make room. "),
        (CheckpointError("a.safetensors is cut short."), "^a.safetensors is cut short. "),
    ],
)
@pytest.mark.parametrize("left", ["nothing", "work"])
def test_every_error_while_writing_says_what_is_left(error, message, left, tmp_path):
    partial = tmp_path / ".out.partial"
    plan = {"of": "a"} if left == "work" else None
    end = "partial holds what was finished.*to continue" if left == "work" else "Nothing of .*out is left"
    with (
        pytest.raises(type(error), match=f"{message}.*{end}") as told,
        new_folder(tmp_path / "out", plan=plan) as folder,
    ):
        (folder / "first").touch()
        raise error
    assert told.value.errno == error.errno
    assert partial.exists() == (left == "work")


def test_useless_files_are_not_kept(tmp_path):
    for error in (ValueError("no"), OSError("no")):  # without any work done, or without hope
        with (
            pytest.raises(type(error)),
            new_folder(tmp_path / "out", plan={}, hopeless=(ValueError,)) as folder,
        ):
            if isinstance(error, ValueError):
                (folder / "first").touch()
            raise error
        assert not list(tmp_path.iterdir())


def test_a_file_system_that_cannot_lock_is_written_to_without_a_lock(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS says of a folder

    monkeypatch.setattr(fcntl, "flock", refused)
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert (tmp_path / "out" / "file").exists()


def test_a_folder_whose_name_did_not_reach_the_disk_is_said_to_be_whole(monkeypatch, tmp_path):
    def fail(folder):
        if (tmp_path / "out").exists():
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(durable_files, "sync_folder", fail)
    with (
        pytest.raises(
            OSError, match=r"out is whole, but bringing its name to the disk failed: .*Input"
        ) as told,
        new_folder(tmp_path / "out") as folder,
    ):
        (folder / "config.json").write_text("{}")
    assert told.value.errno == errno.EIO
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "config.json"]
