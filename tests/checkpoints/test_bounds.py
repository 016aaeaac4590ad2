"""What strangers write into files is limited, and a limit is named by its error."""

import os
import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers_emo import CheckpointError, ExpertSubset, SubsetError
from transformers_emo.checkpoints import Checkpoint
from transformers_emo.checkpoints.errors import shown
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.conversion import DistributedCheckpoint, UnsafePickleError, read_metadata
from transformers_emo.training import Recipe


def test_a_subset_that_is_too_long_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "math.json"
    path.write_text('{"experts": [[0]]' + " " * (8 << 20) + "}")
    with pytest.raises(SubsetError, match="more than 8388608 bytes, the limit"):
        ExpertSubset.load(path)


@pytest.mark.parametrize(
    "text", ['{"experts": [[0]], "experts": [[1]]}', '{"experts": [[{"a": 1, "a": 1}]]}']
)
def test_a_key_that_is_there_twice_is_refused(text, tmp_path):
    (tmp_path / "math.json").write_text(text)
    with pytest.raises(SubsetError, match="has the key '(experts|a)' twice"):
        ExpertSubset.load(tmp_path / "math.json")


@pytest.mark.parametrize(
    "text",
    ["recipe: pretrain\nrecipe: anneal\n", "training: {max_steps: 1, max_steps: 2}\n"],
    ids=["top", "inner"],
)
def test_a_setting_that_is_there_twice_is_refused(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match="`(recipe|max_steps)` is set twice"):
        Recipe.read(tmp_path / "recipe.yaml")


def test_yaml_may_still_merge_settings(tmp_path):
    text = "recipe: pretrain\nbase: &base {a: 1, b: 2}\nother: {<<: *base, a: 3}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"no settings \['base', 'other'\]"):
        Recipe.read(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for read in (
        lambda: LocalFiles(tmp_path).size(path.name),
        lambda: ExpertSubset.load(path),
        lambda: Recipe.read(path),
        lambda: read_metadata(path),
    ):
        refusal = f"it is a {kind}, expected a file|is a link out of its folder"
        with pytest.raises((OSError, ValueError), match=refusal):
            read()


def test_names_from_files_are_shortened_and_escaped_in_errors(tmp_path):
    name = "\x1b[31m" + "a" * 5_000_000
    error = CheckpointError(f"There is no tensor {name}\r: download it again.")
    assert len(str(error)) < 1000 and str(error).isprintable()
    assert str(error).startswith("There is no tensor \\x1b[31maaa") and str(error).endswith(
        "download it again."
    )
    with pytest.raises(SubsetError) as caught:
        ExpertSubset.from_dict({name: 1, "experts": [[0]]})
    assert len(str(caught.value)) < 5000 and str(caught.value).isprintable()
    assert "\x1b" not in shown(name) and len(shown(name)) < 300


def test_a_name_of_a_header_is_shortened_too(tmp_path):
    header = b'{"' + b"b" * 1_000_000 + b'": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.from_folder(tmp_path)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("junk", [b"]\x94", b"}", b")\x85", b"(t"], ids=repr)
def test_metadata_takes_no_more_memory_than_a_few_times_its_size(junk, tmp_path):
    path = tmp_path / ".metadata"
    path.write_bytes(b"\x80\x04" + junk * 1_000_000 + b".")
    size = path.stat().st_size
    tracemalloc.start()
    try:
        with pytest.raises(UnsafePickleError, match="values of so few bytes, more than one in 4"):
            read_metadata(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()


def test_metadata_of_many_chunks_is_read(tmp_path):
    dcp.save({f"w{i}": torch.ones(2, 3) for i in range(500)}, checkpoint_id=tmp_path, no_dist=True)
    assert len(read_metadata(tmp_path / ".metadata")) == 500


def _with_member(folder, name: str, data: bytes) -> None:
    """A checkpoint of one chunk, in which a member of its archive is another."""
    dcp.save({"w": torch.ones(2, 3)}, checkpoint_id=folder, no_dist=True)
    (file,) = folder.glob("*.distcp")
    with zipfile.ZipFile(file) as old:
        members = {member.filename: old.read(member) for member in old.infolist()}
    members = {n: data if n.endswith(f"/{name}") else content for n, content in members.items()}
    old_length = file.stat().st_size
    with zipfile.ZipFile(file, "w") as new:
        for member, content in members.items():
            packed = zipfile.ZIP_DEFLATED if member.endswith(f"/{name}") else zipfile.ZIP_STORED
            new.writestr(member, content, packed)
    metadata = folder / ".metadata"
    content = pickle.loads(metadata.read_bytes())
    (info,) = content.storage_data.values()
    assert info.length == old_length
    content.storage_data = {
        key: type(info)(info.relative_path, 0, file.stat().st_size) for key in content.storage_data
    }
    metadata.write_bytes(pickle.dumps(content, protocol=4))


def test_a_small_chunk_that_unpacks_to_much_is_refused(tmp_path):
    _with_member(tmp_path, "byteorder", b"little" + b" " * 50_000_000)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.distcp")) < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(
            CheckpointError, match="`byteorder` is 50000006 bytes long or compressed, expected at most 16"
        ):
            DistributedCheckpoint(tmp_path)["w"].check()
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
