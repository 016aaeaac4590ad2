"""Pickles are read as data: what they hold is refused or read, never run."""

import contextlib
import copyreg
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from transformers_emo.checkpoints import CheckpointError
from transformers_emo.conversion import DistributedCheckpoint, UnsafePickleError, read_metadata

METADATA = "torch.distributed.checkpoint.metadata"
RAN: list[str] = []


def run(*words):
    """What an attack wants run."""
    RAN.append(str(words))
    return {}


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def attributes(text: str) -> bytes:
    """A string as protocol 4 writes it."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def metadata(**fields) -> bytes:
    return pickle.dumps(torch_metadata.Metadata(**{"state_dict_metadata": {}, "storage_data": {}} | fields))


def extension_code() -> bytes:
    """A code that this process has looked up before: a cache has it, and `find_class` is not asked."""
    copyreg.add_extension("posix", "getcwd", 241)
    data = pickle.dumps(os.getcwd, protocol=2)
    assert pickle.loads(data) is os.getcwd and b"posix" not in data
    copyreg._inverted_registry.pop(241), copyreg._extension_registry.pop(("posix", "getcwd"))
    return data


def with_method(kind: str) -> bytes:
    """A state for an admitted class that would replace one of its methods by a call."""
    record = b"".join([b"\x80\x04", attributes(METADATA), attributes(kind), b"\x93)\x81"])
    call = b"(" + attributes("os") + attributes("system") + b"\x93u"
    return record + b"}(" + attributes("__setstate__") + call + b"b."


EVIL = Calls(run, "nested")
ATTACKS = {
    "os.system": pickle.dumps(Calls(os.system, "true")),
    "in a value": metadata(planner_data={"a": [1, (EVIL,)]}),
    "in a key": metadata(storage_data={Calls(str, "x"): 1}),
    "as a state": pickle.dumps(Calls(torch_metadata.Metadata, state={"a": EVIL})),
    "copyreg._reconstructor": pickle.dumps(Calls(copyreg._reconstructor, torch.nn.Module, object, None)),
    "copyreg.__newobj__": b"\x80\x02ccopyreg\n__newobj__\n(cos\nsystem\ntR.",
    "copyreg.add_extension": pickle.dumps(Calls(copyreg.add_extension, "os", "system", 7)),
    "torch storage": pickle.dumps(torch.zeros(2).storage()),
    "torch.storage._load_from_bytes": pickle.dumps(Calls(torch.storage._load_from_bytes, pickle.dumps(EVIL))),
    "torch.load": pickle.dumps(Calls(torch.load, "evil.pt")),
    "torch.serialization.load": pickle.dumps(Calls(torch.serialization.load, "evil.pt")),
    "getattr": pickle.dumps(Calls(getattr, "text", "format")),
    "eval": pickle.dumps(Calls(eval, "run()")),
    "exec": b"\x80\x02cbuiltins\nexec\n(X\x03\x00\x00\x001+1tR.",
    "dotted name": b"\x80\x04" + attributes("os") + attributes("path.join") + b"\x93.",
    "dotted name in an admitted module": b"\x80\x04"
    + attributes(METADATA)
    + attributes("os.system")
    + b"\x93.",
    "dotted name of an admitted class": b"\x80\x04"
    + attributes(METADATA)
    + attributes("Metadata.__init__")
    + b"\x93.",
    "another name of torch": b"\x80\x02ctorch\nload\n.",
    "an admitted class called": b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)R.",
    "an admitted class with arguments": f"c{METADATA}\nMetadata\n".encode() + b"}\x85\x81.",
    "a dtype called": b"\x80\x02ctorch\nfloat32\n)R.",
    "a size of others": b"\x80\x02ctorch\nSize\n(]]ttR.",
    "methods as state": with_method("Metadata"),
    "a state for a class": b"\x80\x02ctorch\nSize\n}b.",
    "a state given twice": b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}b}b.",
    "slots as state": b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81N}\x86b.",
    "instance": b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.",
    "object": b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.",
    "new object with keywords": b"\x80\x04cos\nsystem\n)}\x92.",
    "extension code": extension_code(),
    "persistent id": b"\x80\x02PX\n.",
    "binary persistent id": b"\x80\x02(X\x07\x00\x00\x00storage\x85tQ.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "memo far away": b"\x80\x02}r\xff\xff\xff\xff.",
    "long string": b"\x80\x02X\xff\xff\xff\xff.",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "long byte array": b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b".",
    "long integer": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".",
    "integer with many digits": b"I" + b"9" * 5000 + b"\n.",
    # As keys, tuples that hold one another twice take 2 ** 60 steps to hash.
    "tuples doubled 60 times": b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
    "tuples doubled by memo": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "tuples doubled as state": b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81)"
    + b"q\x00h\x00\x86" * 60
    + b"b.",
    "tuples doubled as size": b"\x80\x02ctorch\nSize\n)" + b"q\x00h\x00\x86" * 60 + b"\x85R.",
    "deeply nested": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "empty": b"",
    "no end": b"\x80\x04}",
    "no value": b"\x80\x04.",
    "more after the end": metadata() + metadata(),
    "marks as values": b"\x80\x02((\x86.",
    "no mark": b"\x80\x02Nt.",
    "protocol 0": pickle.dumps(torch_metadata.Metadata({}), protocol=0),
    "a string": pickle.dumps("metadata"),
    "another class": pickle.dumps(torch_metadata.StorageMeta()),
    "ordered dict": pickle.dumps(OrderedDict(a=1)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_and_nothing_is_run(attack, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", lambda *words: ran.append(words))
    monkeypatch.setattr(torch, "load", lambda *words, **_: ran.append(words))
    monkeypatch.setattr(pickle, "Unpickler", lambda *words, **_: ran.append(words))
    monkeypatch.setattr(torch_metadata.Metadata, "__init__", lambda *words, **_: ran.append(words))
    (tmp_path / ".metadata").write_bytes(ATTACKS[attack])
    with pytest.raises(UnsafePickleError) as error:
        read_metadata(tmp_path / ".metadata")
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 1000
    assert ran == [] and RAN == []


def test_the_attacks_would_run_if_unpickled():
    """Guards the tests above: what they build does what it says."""
    pickle.loads(ATTACKS["in a value"])
    assert RAN.pop() == "('nested',)"


def test_attacks_in_a_chunk_are_refused(tmp_path):
    dcp.save({"w": torch.ones(4)}, checkpoint_id=str(tmp_path), no_dist=True)
    (chunk,) = read_metadata(tmp_path / ".metadata")["w"].chunks
    for attack in (EVIL, Calls(torch.storage._load_from_bytes, pickle.dumps(EVIL)), torch.nn.Linear(1, 1)):
        buffer = io.BytesIO()
        torch.save(attack, buffer)
        rewrite_chunk(tmp_path, chunk, buffer.getvalue())
        with pytest.raises(CheckpointError):
            DistributedCheckpoint(tmp_path)["w"].check()
    assert RAN == []


def rewrite_chunk(folder, chunk, data: bytes) -> None:
    """Put another chunk in the place of the only one."""
    (folder / chunk.file).write_bytes(data)
    root = pickle.loads((folder / ".metadata").read_bytes())
    for info in root.storage_data.values():
        info.offset, info.length = 0, len(data)
    (folder / ".metadata").write_bytes(pickle.dumps(root))


def test_the_file_of_the_training_library_is_read(step10):
    tensors = read_metadata(step10 / "model_and_optim" / ".metadata")
    assert tensors["model.embeddings.weight"].shape == (320, 64)
    assert tensors["model.embeddings.weight"].dtype == torch.float32
    assert tensors["model.blocks.1.feed_forward_moe.experts.mlp.w1"].shape == (512, 64)
    assert "optim.state.embeddings.weight.exp_avg" in tensors
    assert not any(name.startswith("optim.param_groups") for name in tensors)


def box(offsets, sizes):
    return torch_metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def boxes(shape, *chunks, **place) -> bytes:
    """`.metadata` of a tensor `w` with these chunks."""
    info = {"relative_path": "__0_0.distcp", "offset": 0, "length": 1} | place
    tensor = torch_metadata.TensorStorageMetadata(
        torch_metadata.TensorProperties(torch.float32), torch.Size(shape), [box(*chunk) for chunk in chunks]
    )
    places = {torch_metadata.MetadataIndex("w", chunk[0]): _StorageInfo(**info) for chunk in chunks}
    return metadata(state_dict_metadata={"w": tensor}, storage_data=places)


@pytest.mark.parametrize(
    ("shape", "chunks", "message"),
    [
        ((4,), [([0], [3]), ([2], [2])], r"overlap, at \[0\] and \[2\]"),
        ((4, 4), [([0, 0], [4, 2]), ([0, 2], [2, 2])], "12 elements, expected 16"),
        ((4, 4), [([0, 0], [3, 3]), ([1, 2], [3, 2]), ([3, 0], [1, 1])], "overlap"),
        ((4,), [([0], [2])], "2 elements, expected 4"),
        ((4,), [], "0 elements, expected 4"),
        ((4,), [([2], [4])], "beyond its shape"),
        ((4, 2), [([0], [4])], "beyond its shape"),
    ],
)
def test_chunks_cover_the_tensor_once(shape, chunks, message, tmp_path):
    (tmp_path / ".metadata").write_bytes(boxes(shape, *chunks))
    with pytest.raises(CheckpointError, match=message):
        read_metadata(tmp_path / ".metadata")


def test_columns_of_many_ranks_are_read(tmp_path):
    (tmp_path / ".metadata").write_bytes(boxes((2, 3000), *[([0, n], [2, 1]) for n in range(3000)]))
    assert len(read_metadata(tmp_path / ".metadata")["w"].chunks) == 3000


def test_chunks_that_would_take_for_ever_to_compare_are_refused(tmp_path):
    """Columns beside rows: along either dimension half of them lie side by side."""
    n = 1000
    columns, rows = [([0, i], [n, 1]) for i in range(n)], [([i, n], [1, n]) for i in range(n)]
    (tmp_path / ".metadata").write_bytes(boxes((n, 2 * n), *columns, *rows))
    with pytest.raises(CheckpointError, match="too many of them side by side"):
        read_metadata(tmp_path / ".metadata")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0b"])
def test_chunks_outside_the_folder_are_refused(name, tmp_path):
    (tmp_path / ".metadata").write_bytes(boxes((4,), ([0], [4]), relative_path=name))
    with pytest.raises(CheckpointError, match="expected a file of the same folder"):
        read_metadata(tmp_path / ".metadata")


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_mutated_files_give_our_error_or_tensors(step10, tmp_path, data):
    original = (step10 / "model_and_optim" / ".metadata").read_bytes()[:3000]
    mutated = bytearray(metadata() if data.draw(st.booleans()) else original)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        mutated[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (tmp_path / ".metadata").write_bytes(mutated)
    with contextlib.suppress(CheckpointError):
        read_metadata(tmp_path / ".metadata")


def test_any_cut_into_chunks_reads_the_same(tmp_path):
    """As many ranks write it: rows, columns and boxes, in several files."""
    whole = torch.arange(7 * 6, dtype=torch.float32).view(7, 6)
    cuts = [(0, 3, 0, 6), (3, 7, 0, 2), (3, 5, 2, 6), (5, 7, 2, 6)]
    root = pickle.loads(boxes((7, 6), *[([a, c], [b - a, d - c]) for a, b, c, d in cuts]))
    for number, info in enumerate(root.storage_data.values()):
        a, b, c, d = cuts[number]
        buffer = io.BytesIO()
        torch.save(whole[a:b, c:d].clone(), buffer)
        file = tmp_path / f"__{number % 2}_0.distcp"
        start = file.stat().st_size if file.exists() else 0
        with open(file, "ab") as shard:
            shard.write(buffer.getvalue())
        info.relative_path, info.offset, info.length = file.name, start, len(buffer.getvalue())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(root))
    tensor = DistributedCheckpoint(tmp_path)["w"]
    tensor.check()
    assert torch.equal(tensor.rows(), whole)
    for start in range(7):
        for stop in range(start, 8):
            assert torch.equal(tensor.rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_dtypes_and_scalars_are_read(dtype, tmp_path):
    state = {"scalar": torch.tensor(3).to(dtype), "empty": torch.zeros(0, 4, dtype=dtype)}
    dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    checkpoint = DistributedCheckpoint(tmp_path)
    for name, tensor in state.items():
        read = checkpoint[name].rows()
        assert torch.equal(read, tensor) and read.dtype == dtype


@pytest.mark.parametrize(
    "damage", ["cut", "garbage", "no file", "shape", "dtype", "transposed", "compressed"]
)
def test_damaged_chunks_are_found_before_reading(damage, tmp_path):
    dcp.save({"w": torch.ones(4, 6)}, checkpoint_id=str(tmp_path), no_dist=True)
    (chunk,) = read_metadata(tmp_path / ".metadata")["w"].chunks
    file = tmp_path / chunk.file
    wrong = {"shape": torch.ones(6, 4), "dtype": torch.ones(4, 6).half(), "transposed": torch.ones(6, 4).T}
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "garbage":
        file.write_bytes(b"\1" * file.stat().st_size)
    elif damage == "no file":
        file.unlink()
    elif damage == "compressed":
        buffer = io.BytesIO()
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(buffer, "w") as new:
            for member in old.infolist():
                new.writestr(member.filename, old.read(member), zipfile.ZIP_DEFLATED)
        rewrite_chunk(tmp_path, chunk, buffer.getvalue())
    else:
        buffer = io.BytesIO()
        torch.save(wrong[damage], buffer)
        rewrite_chunk(tmp_path, chunk, buffer.getvalue())
    with pytest.raises(CheckpointError, match=chunk.file):
        DistributedCheckpoint(tmp_path)["w"].check()
