"""Errors of commands as one line."""

import errno
import os
from pathlib import Path

import pytest
import torch
from transformers_emo.error_text import error_text

FULL = "The disk is full: make room and call again."


class _FullDisk:
    """A file on a full disk."""

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self):
        pass


def _of(call):
    with pytest.raises(Exception) as caught:
        call()
    return error_text(caught.value)


def test_a_full_disk_is_told_as_such_by_whomever_it_is_found():
    from safetensors.torch import save_file

    assert _of(lambda: Path("/dev/full").write_text("x" * 100_000)) == FULL
    assert _of(lambda: torch.save(torch.zeros(10), _FullDisk())) == FULL
    assert _of(lambda: save_file({"a": torch.zeros(10)}, "/dev/full/a")).startswith("Not a directory")

    class SafetensorError(Exception):
        pass

    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert error_text(SafetensorError(said)) == FULL


def test_a_writer_that_does_not_say_why_it_stopped_is_not_the_fault_of_the_model():
    said = _of(lambda: torch.save(torch.zeros(100_000), "/dev/full"))
    assert said == FULL or "A file could not be written to its end" in said


@pytest.mark.parametrize("number", [errno.EIO, errno.EFBIG, errno.EMFILE])
def test_what_the_system_says_is_one_sentence(number):
    text = error_text(OSError(number, os.strerror(number)))
    assert ":." not in text and "\n" not in text and text.endswith(".")


def test_an_error_of_another_kind_names_it():
    assert error_text(ZeroDivisionError("division by zero")).startswith(
        "ZeroDivisionError: division by zero."
    )
