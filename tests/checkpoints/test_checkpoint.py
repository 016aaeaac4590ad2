"""Reading parts of safetensors files, and refusing damaged ones."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers_emo import CheckpointError
from transformers_emo.checkpoints import Checkpoint, lazy_tensor, wanted_ranges
from transformers_emo.checkpoints.checkpoint import TensorSpan, rows_of
from transformers_emo.checkpoints.local_files import LocalFiles


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(6, 5),
        "b": torch.randn(6, 5),
        "bf16": torch.randn(3).bfloat16(),
        "s": torch.tensor(7),
    }
    save_file(tensors | {"empty": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    return tmp_path


def test_every_tensor_is_read_as_safetensors_reads_it(folder):
    checkpoint = Checkpoint.from_folder(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(checkpoint.tensors)
        for name in file.keys():  # noqa: SIM118 (not a dict)
            lazy = checkpoint.lazy([name])
            assert torch.equal(lazy[...], file.get_tensor(name)), name
            assert lazy.get_shape() == file.get_slice(name).get_shape()
            assert lazy.get_dtype() == file.get_slice(name).get_dtype()


@settings(deadline=None)
@given(st.tuples(*[st.integers(-14, 14)] * 2), st.tuples(*[st.integers(-6, 6)] * 2))
def test_slices_of_stacked_tensors_are_those_of_the_whole(rows, columns):
    whole = torch.arange(60.0).reshape(12, 5)
    data = whole.numpy().tobytes()

    class Memory:
        def read_into(self, file, start, buffer):
            buffer[:] = data[start : start + len(buffer)]

    pieces = [
        TensorSpan("m", 0, 120, torch.float32, (6, 5)),
        TensorSpan("m", 120, 240, torch.float32, (6, 5)),
    ]
    lazy = Checkpoint(Memory(), {}).from_pieces(pieces, (12, 5))
    index = (slice(*rows), slice(*columns))
    assert torch.equal(lazy[index], whole[index])
    assert torch.equal(lazy[index[0]], whole[index[0]])
    assert torch.equal(lazy[:, index[1]], whole[:, index[1]])


def test_stacking_slicing_and_casting_compose(folder):
    checkpoint = Checkpoint.from_folder(folder)
    a, b = checkpoint.lazy(["a"])[...], checkpoint.lazy(["b"])[...]
    lazy = checkpoint.lazy(["b", "a"], shape=(2, 6, 5))
    lazy.cast_to = torch.bfloat16
    assert torch.equal(lazy[...], torch.stack([b, a]).bfloat16())
    assert torch.equal(lazy[1:2, 2:4], a[None, 2:4].bfloat16())


@given(st.sets(st.integers(0, 19)))
def test_rows_cover_exactly_the_rows_asked_for(rows):
    span = TensorSpan("f", 1000, 1000 + 20 * 8, torch.float32, (20, 2))
    parts = rows_of(span, sorted(rows))
    covered = [byte for part in parts for byte in range(part.start, part.end)]
    assert covered == [1000 + row * 8 + byte for row in sorted(rows) for byte in range(8)]
    assert all(x.end < y.start for x, y in zip(parts, parts[1:], strict=False))


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)), max_size=12), st.integers(0, 20))
def test_wanted_ranges_cover_all_pieces_and_merge_across_small_gaps(pieces, gap):
    class Piece:
        pass

    lazies = []
    for start, length in pieces:
        lazy = Piece()
        lazy.pieces = [TensorSpan("f", start, start + length, torch.uint8, (length,))]
        lazies.append(lazy)
    ranges = wanted_ranges(lazies, gap=gap).get("f", [])
    wanted = {byte for start, length in pieces for byte in range(start, start + length)}
    covered = {byte for start, end in ranges for byte in range(start, end)}
    assert wanted <= covered
    assert all(later[0] - earlier[1] > gap for earlier, later in zip(ranges, ranges[1:], strict=False))
    if gap == 0:
        assert wanted == covered


class TestDamage:
    def test_truncated_file(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"bytes long, expected .* cut short"):
            Checkpoint.from_folder(folder)

    @pytest.mark.parametrize("length", [0, 7, 8, 20])
    def test_header_cut_short(self, folder, length):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint.from_folder(folder)

    def test_file_that_shrinks_while_it_is_read(self, folder):
        checkpoint = Checkpoint.from_folder(folder)
        path = folder / "model.safetensors"
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 100)
        with pytest.raises(CheckpointError, match="cut short while it was read"):
            [checkpoint.lazy([name])[...] for name in checkpoint.tensors]

    @pytest.mark.parametrize(
        "header",
        [
            b"[]",
            b"{",
            b"\xff\xfe",
            b'{"a": 3}',
            b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
            b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            b'{"a": {"dtype": "F32", "shape": [1]}}',
        ],
    )
    def test_damaged_header(self, tmp_path, header):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint.from_folder(tmp_path)

    def test_overlapping_tensors(self, tmp_path):
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        header = json.dumps({"a": entry, "b": entry}).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        with pytest.raises(CheckpointError, match="should begin at byte"):
            Checkpoint.from_folder(tmp_path)


class TestIndex:
    def write(self, folder, weight_map):
        save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def test_missing_shard(self, tmp_path):
        self.write(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
        with pytest.raises(CheckpointError, match="two.safetensors: No such file"):
            Checkpoint.from_folder(tmp_path)

    @pytest.mark.parametrize(
        "file", ["../one.safetensors", "/one.safetensors", "x/../../one.safetensors", "a\0b"]
    )
    def test_file_outside_the_folder(self, tmp_path, file):
        self.write(tmp_path, {"a": file})
        with pytest.raises(CheckpointError, match=r"outside its folder|names no file"):
            Checkpoint.from_folder(tmp_path)

    @pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": ""}])
    def test_damaged_index(self, tmp_path, weight_map):
        self.write(tmp_path, weight_map)
        with pytest.raises(CheckpointError, match="index"):
            Checkpoint.from_folder(tmp_path)

    def test_tensor_in_another_shard_than_the_index_says(self, tmp_path):
        self.write(tmp_path, {"b": "one.safetensors"})
        with pytest.raises(CheckpointError, match="says that b is in one.safetensors, but it is not"):
            Checkpoint.from_folder(tmp_path)

    def test_pickled_weights(self, tmp_path):
        torch.save({}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="pickled"):
            Checkpoint.from_folder(tmp_path)
        self.write(tmp_path, {"a": "pytorch_model.bin"})
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            Checkpoint.from_folder(tmp_path)


def test_a_device_is_filled_part_by_part(make_checkpoint, monkeypatch):
    """The host never holds a tensor whole; bytes are read once, in order, and cast on the way."""
    file = make_checkpoint() / "model.safetensors"
    source, reads = LocalFiles(file.parent), []
    read_into = source.read_into
    monkeypatch.setattr(lazy_tensor, "_STAGED", 1000)
    monkeypatch.setattr(
        source,
        "read_into",
        lambda name, start, buffer: reads.append(len(buffer)) or read_into(name, start, buffer),
    )
    checkpoint = Checkpoint.from_files(file.parent, [file.name], source)
    names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in (3, 1)]
    for device, dtype in (("cpu", None), ("cpu", torch.bfloat16), ("meta", None)):
        expected = checkpoint.lazy(names, shape=(2, 24, 32))
        lazy = checkpoint.lazy(names, shape=(2, 24, 32))
        expected.cast_to = lazy.cast_to = dtype
        lazy.device = torch.device(device)
        reads.clear()
        found = lazy[...]
        assert found.device.type == device and found.shape == (2, 24, 32)
        assert max(reads) <= 1000 and sum(reads) == 2 * 24 * 32 * 4
        if device == "cpu":
            assert torch.equal(found, expected[...]) and torch.equal(lazy[1:], expected[1:])


@settings(max_examples=200)
@given(data=st.data())
def test_slices_of_all_dimensions_read_only_what_they_hold(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    number = data.draw(st.integers(1, 3))  # pieces, one behind the other in the first dimension
    folder = tmp_path_factory.mktemp("pieces")
    pieces = {f"t{n}": torch.randn(shape) for n in range(number)}
    save_file(pieces, folder / "model.safetensors")
    whole = torch.cat(list(pieces.values()))
    if data.draw(st.booleans()):  # some of whose boundaries lie within a row
        whole = whole.view(1, *whole.shape)
    source, reads = LocalFiles(folder), []
    for name in ("read_into", "read_strided"):
        read = getattr(source, name)
        setattr(source, name, lambda *args, read=read: reads.append(len(args[-1])) or read(*args))
    lazy = Checkpoint.from_files(folder, ["model.safetensors"], source).lazy(list(pieces), shape=whole.shape)
    lazy.cast_to = data.draw(st.sampled_from([None, torch.float64]))
    reads.clear()
    dimensions = data.draw(st.integers(1, whole.dim()))
    bounds = [
        data.draw(st.tuples(st.integers(0, size), st.integers(0, size))) for size in whole.shape[:dimensions]
    ]
    index = tuple(slice(*bound) for bound in bounds)
    expected = whole[index]
    assert torch.equal(lazy[index], expected.to(lazy.cast_to or whole.dtype))
    assert sum(reads) == expected.nbytes


def test_a_part_of_inner_dimensions_goes_to_a_device(make_checkpoint):
    lazy = Checkpoint.from_folder(make_checkpoint()).lazy(["model.layers.0.self_attn.q_proj.weight"])
    whole = lazy[...]
    lazy.device = torch.device("cpu")
    assert torch.equal(lazy[:, 3:9], whole[:, 3:9])
    lazy.device = torch.device("meta")
    assert lazy[2:5, 3:9].is_meta and lazy[2:5, 3:9].shape == (3, 6)
