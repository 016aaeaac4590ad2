"""What holds for every function that writes a model: a new one is covered by a line in `WRITERS`."""

import os
import shutil
from pathlib import Path

import pytest
from transformers_emo import EmoForCausalLM, extract_subset, select_experts, write_back
from transformers_emo.analysis import Domain, measure_retention
from transformers_emo.analysis import retention as retention_module
from transformers_emo.checkpoints.source_files import SourceChangedError
from transformers_emo.checkpoints.writing import durable_files, output_folder
from transformers_emo.conversion import (
    convert_olmo_core,
    convert_qwen2_moe,
    convert_to_olmo_core,
    export_model,
    shard_experts,
    upgrade_checkpoint,
)
from transformers_emo.subsets.choosing import selection
from transformers_emo.training import Recipe, runs, train

ROOT = Path(__file__).parents[2]
TOY = ROOT / "model_cards" / "toy-emo"
EMO_TINY = ROOT / "model_cards" / "emo-tiny"
EXPORT = "an export of it"
STEP = "a training checkpoint made of it"
SUBSET = [[0, 1, 2, 3, 31]] * 4


def _write_back(source: Path, out: Path) -> None:
    tuned = source.parent / "tuned"
    if not tuned.exists():
        EmoForCausalLM.from_pretrained(TOY, expert_subset=SUBSET).save_pretrained(tuned)
    write_back(source, tuned, out=out, progress=False)


# The name of a writer: its source, a large file and a side file of it, and the call.
WRITERS = {
    "extract": (
        TOY,
        "model.safetensors",
        "config.json",
        lambda s, o: extract_subset(s, SUBSET, o, progress=False),
    ),
    "extract's tokenizer": (
        TOY,
        "model.safetensors",
        "tokenizer.json",
        lambda s, o: extract_subset(s, SUBSET, o, progress=False),
    ),
    "write-back": (TOY, "model.safetensors", "tokenizer.json", _write_back),
    "shard": (TOY, "model.safetensors", "README.md", lambda s, o: shard_experts(s, o, progress=False)),
    "upgrade": (
        TOY,
        "model.safetensors",
        "tokenizer.json",
        lambda s, o: upgrade_checkpoint(s, o, progress=False),
    ),
    "upgrade with links": (
        TOY,
        "model.safetensors",
        "config.json",
        lambda s, o: upgrade_checkpoint(s, o, link=True, progress=False),
    ),
    "export to qwen2-moe": (
        TOY,
        "model.safetensors",
        "tokenizer.json",
        lambda s, o: export_model(s, o, progress=False),
    ),
    "export to gguf": (
        EMO_TINY,
        "model.safetensors",
        "config.json",
        lambda s, o: export_model(s, o, to="gguf", progress=False),
    ),
    "export from qwen2-moe": (
        EXPORT,
        "model.safetensors",
        "config.json",
        lambda s, o: convert_qwen2_moe(s, o, progress=False),
    ),
    "olmo-core-to-hf": (
        STEP,
        "model_and_optim/__0_0.distcp",
        "config.json",
        lambda s, o: convert_olmo_core(s, o, progress=False),
    ),
    "hf-to-olmo-core": (
        TOY,
        "model.safetensors",
        "config.json",
        lambda s, o: convert_to_olmo_core(s, o, progress=False),
    ),
}
_NO_LINKS = [name for name in WRITERS if name != "upgrade with links"]


@pytest.fixture
def copy(request, tmp_path):
    source, large, side, write = WRITERS[request.param]
    if source == STEP:
        convert_to_olmo_core(TOY, tmp_path / "source", progress=False)
    elif source == EXPORT:
        export_model(TOY, tmp_path / "source", progress=False)
    else:
        shutil.copytree(source, tmp_path / "source")
    return tmp_path / "source", large, side, write


def _in_place(path: Path) -> None:
    """The same size and time, other bytes: only the time of the inode tells."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replaced(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    shutil.copyfile(path, other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def _rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def _meanwhile(monkeypatch, change) -> None:
    """Make a change once a writer has begun with its output."""
    begin = output_folder._take_over

    def take_over(*args):
        begin(*args)
        change()

    monkeypatch.setattr(output_folder, "_take_over", take_over)


@pytest.mark.parametrize("change", [_in_place, _replaced, _rewritten, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["weights", "beside"])
@pytest.mark.parametrize("copy", _NO_LINKS, indirect=True)
def test_a_source_that_changes_meanwhile_is_noticed_and_nothing_is_kept(
    copy, which, change, monkeypatch, tmp_path
):
    source, large, side, write = copy
    changed = large if which == "weights" else side
    _meanwhile(monkeypatch, lambda: change(source / changed))
    with pytest.raises(SourceChangedError, match=f"source changed while it was read .{changed}"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("copy", ["upgrade with links"], indirect=True)
def test_links_to_the_source_are_no_change_of_it_but_a_rewrite_is(copy, monkeypatch, tmp_path):
    source, large, _, write = copy
    write(source, tmp_path / "out")
    assert (tmp_path / "out" / large).samefile(source / large)
    _meanwhile(monkeypatch, lambda: _rewritten(source / large))
    with pytest.raises(SourceChangedError):
        write(source, tmp_path / "again")


@pytest.mark.parametrize("change", [_in_place, _replaced, _rewritten, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("copy", ["upgrade with links"], indirect=True)
def test_a_file_beside_linked_weights_that_changes_is_noticed(copy, change, monkeypatch, tmp_path):
    source, _, side, write = copy
    _meanwhile(monkeypatch, lambda: change(source / side))
    with pytest.raises(SourceChangedError, match=f"source changed while it was read .{side}"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _select(source: Path, out: Path) -> None:
    select_experts(source, ["import os"], 8, progress=False).save(out)


def _retention(source: Path, out: Path) -> None:
    texts = ["one two three four", "five six seven eight"]
    plan = {"methods": ["random"], "shares": [0.5], "num_calibration": 1, "window": 16, "progress": False}
    measure_retention({"toy": source}, [Domain("a", texts, texts)], out, **plan)


def _train(source: Path, out: Path) -> None:
    changes = {"model.path": str(source), "output_dir": str(out)}
    changes |= {"training.max_steps": 1, "training.disable_tqdm": True}
    train(Recipe.read("examples/recipes/pretrain.yaml", changes))


@pytest.mark.parametrize("change", [_in_place, _replaced, _rewritten, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "write, module, step",
    [(_select, selection, "_choose"), (_retention, retention_module, "_load"), (_train, runs, "_load_model")],
    ids=["select", "retention", "train"],
)
def test_nothing_is_made_of_a_model_that_changes_while_it_is_loaded(
    write, module, step, name, change, monkeypatch, tmp_path
):
    source = tmp_path / "source"
    shutil.copytree(TOY, source)
    load = getattr(module, step)

    def change_and_load(*args, **kwargs):
        change(source / name)
        return load(*args, **kwargs)

    monkeypatch.setattr(module, step, change_and_load)
    with pytest.raises(SourceChangedError, match=f"source changed while it was read .{name}"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out").is_file() and not list(tmp_path.glob("out/*.csv"))
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("copy", WRITERS, indirect=True)
def test_files_are_on_the_disk_before_they_have_their_name(copy, monkeypatch, tmp_path):
    source, _, _, write = copy
    out = tmp_path / "new" / "out"
    calls = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor):
        state = os.fstat(descriptor)
        calls.append(("sync", (state.st_dev, state.st_ino), state.st_mtime_ns))
        sync(descriptor)

    def replace(old, new):
        calls.append(("name", os.fspath(new), None))
        rename(old, new)

    monkeypatch.setattr(durable_files.os, "fsync", fsync)
    monkeypatch.setattr(durable_files.os, "replace", replace)
    write(source, out)
    named = calls.index(("name", os.fspath(out), None))
    before, after = calls[:named], calls[named:]
    for path in (*out.rglob("*"), out):
        state = path.stat()
        assert ("sync", (state.st_dev, state.st_ino), state.st_mtime_ns) in before, path
    parent = out.parent.stat()
    assert any(call[:2] == ("sync", (parent.st_dev, parent.st_ino)) for call in after)
    above = tmp_path.stat()  # it holds the name of the new parent
    assert any(call[:2] == ("sync", (above.st_dev, above.st_ino)) for call in before)


@pytest.mark.parametrize("copy", WRITERS, indirect=True)
def test_the_work_of_another_user_is_not_taken_over(copy, tmp_path):
    source, _, _, write = copy
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("planted")
    partial.chmod(0o777)
    with pytest.raises(
        FileExistsError, match=r"\.out\.partial .*may be written to by other users.*remove it"
    ):
        write(source, tmp_path / "out")
    assert (partial / "model.safetensors").read_text() == "planted"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("copy", WRITERS, indirect=True)
def test_the_folder_has_the_usual_permissions(copy, tmp_path):
    source, _, _, write = copy
    (tmp_path / "usual").mkdir()
    write(source, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert not (tmp_path / "out" / ".writer.json").exists()


@pytest.mark.parametrize("copy", WRITERS, indirect=True)
def test_a_pipe_in_place_of_a_file_does_not_block(copy, tmp_path):
    source, large, _, write = copy
    (source / large).unlink()
    os.mkfifo(source / large)
    with pytest.raises((OSError, ValueError)):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pipe_in_place_of_a_note_of_the_training_library_does_not_block(tmp_path):
    step = tmp_path / "step"
    convert_to_olmo_core(TOY, step, progress=False)
    (step / ".metadata.json").unlink()
    os.mkfifo(step / ".metadata.json")
    convert_olmo_core(step, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()
