"""The blocks of several processes, put together: any part of any tensor, and nothing that is not there."""

import json
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from transformers_emo import CheckpointError
from transformers_emo.checkpoints import Checkpoint


def write(folder, tensors: dict[str, torch.Tensor], cuts: dict[str, list[list[int]]]) -> None:
    """Save tensors in blocks, cut in each dimension at these places, one file for each place in the grid."""
    files: dict[int, dict] = {}
    for name, tensor in tensors.items():
        edges = [[0, *cut, size] for cut, size in zip(cuts[name], tensor.shape, strict=True)]
        intervals = [list(zip(edge, edge[1:], strict=False)) for edge in edges]
        for number, block in enumerate(product(*intervals)):
            part = tensor[tuple(slice(*bounds) for bounds in block)].contiguous()
            files.setdefault(number, {})[name] = (part, [start for start, _ in block])
    for number, parts in files.items():
        offsets = {name: {"saved_offsets": place} for name, (_, place) in parts.items()}
        save_file(
            {name: part for name, (part, _) in parts.items()},
            folder / f"shard-{number + 1:05}-model-00001-of-00001.safetensors",
            {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)},
        )


@pytest.fixture
def saved(tmp_path):
    """A folder, and what is in it."""
    torch.manual_seed(0)
    tensors = {
        "rows": torch.randn(7, 5),
        "columns": torch.randn(6, 9).bfloat16(),
        "grid": torch.randn(5, 6, 7),
        "inner": torch.randn(4, 6, 3),
        "whole": torch.randn(3),
        "number": torch.tensor(7.0),
    }
    cuts = {
        "rows": [[2, 3], []],
        "columns": [[], [4, 7]],
        "grid": [[2], [3], [1, 5]],
        "inner": [[], [1, 4], []],
        "whole": [[]],
        "number": [],
    }
    write(tmp_path, tensors, cuts)
    return tmp_path, tensors


def test_all_tensors_are_there_and_whole(saved):
    folder, tensors = saved
    checkpoint = Checkpoint.from_folder(folder)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.lazy([name])[...], tensor), name


def test_together_they_are_a_safetensors_file(saved):
    folder, tensors = saved
    source = Checkpoint.from_folder(folder).source
    whole = bytearray(source.size("model.safetensors"))
    source.read_into("model.safetensors", 0, memoryview(whole))
    loaded = load(bytes(whole))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=200)
@given(data=st.data())
def test_any_part_is_that_of_the_whole(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    cuts = [sorted(data.draw(st.sets(st.integers(1, size - 1)))) if size > 1 else [] for size in shape]
    folder = tmp_path_factory.mktemp("blocks")
    tensors = {"other": torch.arange(3), "t": torch.arange(torch.Size(shape).numel()).view(shape).short()}
    write(folder, tensors, {"other": [[1]], "t": cuts})
    lazy = Checkpoint.from_folder(folder).lazy(["t"])
    bounds = [data.draw(st.tuples(st.integers(0, size), st.integers(0, size))) for size in shape]
    index = tuple(slice(*bound) for bound in bounds)
    assert torch.equal(lazy[index], tensors["t"][index])
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=4))
    assert torch.equal(lazy.take(rows)[...], tensors["t"][rows])


def test_a_missing_file_is_said(saved):
    folder, _ = saved
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"blocks of \w+ do not make up one tensor"):
        Checkpoint.from_folder(folder)


@pytest.mark.parametrize("said", [None, "[]", '{"rows": {"saved_offsets": [-1, 0]}}', "{"])
def test_damaged_offsets_are_said(saved, said):
    folder, tensors = saved
    metadata = {} if said is None else {"DCP_SHARDING_INFO": said}
    save_file({"rows": tensors["rows"]}, folder / "shard-00001-model-00001-of-00001.safetensors", metadata)
    with pytest.raises(CheckpointError, match="where its blocks belong"):
        Checkpoint.from_folder(folder)


def test_blocks_that_overlap_are_refused(tmp_path):
    for number, place in enumerate((0, 1)):
        save_file(
            {"t": torch.zeros(2, 2)},
            tmp_path / f"shard-{number + 1:05}-model-00001-of-00001.safetensors",
            {"DCP_SHARDING_INFO": json.dumps({"t": {"saved_offsets": [place, 0]}})},
        )
    with pytest.raises(CheckpointError, match="do not make up one tensor"):
        Checkpoint.from_folder(tmp_path)
