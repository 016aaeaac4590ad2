"""Sizes as users give them, and the division of tensors into files: as `save_pretrained` does both."""

import hashlib
import json

import pytest
import torch
from conftest import TOY
from huggingface_hub import split_torch_state_dict_into_shards
from transformers_emo.checkpoints import Checkpoint
from transformers_emo.checkpoints.writing.safetensors_writing import divide, size_in_bytes
from transformers_emo.checkpoints.writing.tensor_writer import PlannedTensor, plan_shards


def shards(*names: list[str]) -> dict[str, list[str]]:
    """The files that hold these tensors, by the names that Transformers looks for."""
    if len(names) == 1:
        return {"model.safetensors": names[0]}
    return {f"model-{i:05d}-of-{len(names):05d}.safetensors": held for i, held in enumerate(names, 1)}


# What the package wrote before it took huggingface_hub's function.
RECORDED = {
    "one file": ([("a", 4), ("b", 4)], shards(["a", "b"])),
    "exactly full": ([("a", 4), ("b", 4), ("c", 4)], shards(["a", "b"], ["c"])),
    "one byte too many": ([("a", 4), ("b", 5), ("c", 4)], shards(["a"], ["b"], ["c"])),
    "one tensor a file": ([("z", 8), ("y", 8), ("x", 8)], shards(["z"], ["y"], ["x"])),
    "not sorted by name": ([("b", 3), ("a", 5), ("d", 4), ("c", 2)], shards(["b", "a"], ["d", "c"])),
    "empty tensors": ([("a", 0), ("b", 8), ("c", 0), ("d", 1)], shards(["a", "b", "c"], ["d"])),
}


@pytest.mark.parametrize(("lengths", "expected"), RECORDED.values(), ids=RECORDED)
def test_tensors_are_divided_as_before(lengths, expected):
    assert list(divide(lengths, 8).items()) == list(expected.items())


@pytest.mark.parametrize(
    ("size", "counts", "digest"),
    [
        (2_200_000, [1, 4, 67, 65, 68, 64, 65, 67, 14], "344b94757c4063b5"),
        (3_000_000, [1, 28, 90, 90, 91, 90, 25], "d181372e54fae82b"),
        (5_000_000, [26, 151, 149, 89], "dd64d26adc6330fd"),
    ],
)
def test_a_real_model_is_divided_as_before(size, counts, digest):
    tensors = Checkpoint.from_folder(TOY).tensors
    divided = divide(((name, span.end - span.start) for name, span in tensors.items()), size)
    assert [len(names) for names in divided.values()] == counts
    assert hashlib.sha256(json.dumps(divided).encode()).hexdigest()[:16] == digest


def test_a_tensor_larger_than_a_file_is_alone_in_one_and_its_neighbours_stay_together():
    tensors = {"a": torch.zeros(2), "large": torch.zeros(20), "b": torch.zeros(2)}
    divided = divide(((name, tensor.nbytes) for name, tensor in tensors.items()), 16)
    assert divided == shards(["large"], ["a", "b"])
    saved = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=16
    )
    assert divided == saved.filename_to_tensors
    planned = [PlannedTensor(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    files = plan_shards(planned, torch.float32, 16)
    assert {file: [tensor.name for tensor in held] for file, held in files.items()} == divided


@pytest.mark.parametrize(
    ("size", "number"),
    [
        (5, 5),
        (5e9, 5_000_000_000),
        ("5000", 5000),
        (" 300 MB ", 300_000_000),
        ("1.5gb", 1_500_000_000),
        ("30KB", 30_000),
        ("2TB", 2_000_000_000_000),
    ],
)
def test_sizes_are_bytes_or_have_a_unit(size, number):
    assert size_in_bytes(size) == number


@pytest.mark.parametrize("size", [0, -5, "0GB", "-1GB", "5 apples", "", "GB", "infGB", "300MiB", None])
def test_sizes_that_make_no_sense_are_refused_with_what_to_give(size):
    with pytest.raises(ValueError, match=r"--hidden-memory is .*, expected bytes, .*KB, MB, GB and TB"):
        size_in_bytes(size, name="--hidden-memory")
