"""Files that are written part by part, and continued."""

import errno
import hashlib
import os
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers_emo import CheckpointError
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.checkpoints.writing import long_files
from transformers_emo.checkpoints.writing.long_files import FilePart, FileSpan, remove_notes, write_parts


class KilledError(Exception):
    pass


def parts_of(pieces, fail_at=None, asked=None):
    """A part for each list of pieces. Part `fail_at` breaks after its first piece."""

    def give(number, of_part):
        for index, piece in enumerate(of_part):
            if number == fail_at and index:
                raise KilledError
            if asked is not None:
                asked.append(number)
            yield memoryview(piece)
        if number == fail_at:
            raise KilledError

    return [
        FilePart(sum(map(len, of_part)), lambda n=number, p=of_part: give(n, p))
        for number, of_part in enumerate(pieces)
    ]


@given(pieces=st.lists(st.lists(st.binary(min_size=1, max_size=9), max_size=4), max_size=6), data=st.data())
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_file(tmp_path_factory, pieces, data):
    folder = tmp_path_factory.mktemp("long")
    expected = b"".join(b"".join(part) for part in pieces)
    if pieces:
        stop = data.draw(st.integers(0, len(pieces) - 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(long_files, "_SYNC_BYTES", data.draw(st.integers(1, 20)))
            with pytest.raises(KilledError):
                write_parts(folder / "f", parts_of(pieces, fail_at=stop))
    told = []
    digest = write_parts(folder / "f", parts_of(pieces), done=told.append)
    assert (folder / "f").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()
    assert sum(told) == len(expected)


def test_what_is_on_the_disk_is_not_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(long_files, "_SYNC_BYTES", 1)
    pieces = [[b"one"], [b"two"], [b"three", b"four"]]
    with pytest.raises(KilledError):
        write_parts(tmp_path / "f", parts_of(pieces, fail_at=2))
    asked = []
    write_parts(tmp_path / "f", parts_of(pieces, asked=asked))
    assert asked == [2, 2]
    asked.clear()
    write_parts(tmp_path / "f", parts_of(pieces, asked=asked))
    assert not asked


@pytest.mark.parametrize("note", ["", "[]", "7", "-1", "true", "{"])
def test_a_damaged_note_starts_the_file_again(tmp_path, note):
    (tmp_path / "f").write_bytes(b"something else")
    (tmp_path / "f.written").write_text(note)
    write_parts(tmp_path / "f", parts_of([[b"a"], [b"b"]]))
    assert (tmp_path / "f").read_bytes() == b"ab"


def test_a_file_that_lost_its_end_starts_again(tmp_path):
    write_parts(tmp_path / "f", parts_of([[b"first"], [b"second"]]))
    with open(tmp_path / "f", "r+b") as file:
        file.truncate(8)
    write_parts(tmp_path / "f", parts_of([[b"first"], [b"second"]]))
    assert (tmp_path / "f").read_bytes() == b"firstsecond"


def _span(folder, start, length):
    return FileSpan(partial(LocalFiles(folder).opened, "source"), "source", start, length)


@pytest.fixture(params=["copy_file_range", "not between these files", "not on this system"])
def copying(request, monkeypatch):
    """The ways to copy from file to file: the system's own, and ours where it has none."""

    def refused(*span):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    # Only Linux has it. The other two ways, which other systems take, are tested on every system.
    if request.param == "copy_file_range" and not hasattr(os, "copy_file_range"):
        pytest.skip("this system has no copy_file_range")
    if request.param == "not between these files":
        monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    if request.param == "not on this system":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
        monkeypatch.delattr(os, "posix_fadvise", raising=False)


@pytest.mark.usefixtures("copying")
def test_spans_of_other_files_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(long_files, "_STEP_BYTES", 7)
    source = bytes(range(256))
    (tmp_path / "source").write_bytes(source)
    spans = [_span(tmp_path, 250, 6), _span(tmp_path, 3, 100), _span(tmp_path, 5, 0)]
    part = FilePart(106 + 2, lambda: [spans[0], memoryview(b"--"), *spans[1:]], lambda: spans)
    told = []
    digest = write_parts(tmp_path / "f", [FilePart.of(b"head"), part], done=told.append)
    expected = b"head" + source[250:] + b"--" + source[3:103]
    assert (tmp_path / "f").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()
    assert sum(told) == len(expected)


@pytest.mark.usefixtures("copying")
def test_a_span_that_ends_early_is_refused(tmp_path):
    (tmp_path / "source").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="source ends at byte 5, expected 9"):
        write_parts(tmp_path / "f", [FilePart(6, lambda: [_span(tmp_path, 3, 6)])])


def test_other_errors_of_copying_are_told(tmp_path, monkeypatch):
    def failing(*span):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", failing, raising=False)
    (tmp_path / "source").write_bytes(b"source")
    with pytest.raises(OSError, match="No space left"):
        write_parts(tmp_path / "f", [FilePart(6, lambda: [_span(tmp_path, 0, 6)])])


def test_a_part_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Part 1 .* is 3 bytes, expected 4"):
        write_parts(tmp_path / "f", [FilePart(4, lambda: [memoryview(b"abc")])])


def test_notes_go_when_all_is_written(tmp_path):
    write_parts(tmp_path / "f", parts_of([[b"a"]]))
    remove_notes(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
