"""Extraction and write-back where folders, links, files and adapters are not as one would like."""

import shutil
import sys

import fresh_processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import assert_same_numbers
from transformers_emo import CheckpointError, EmoForCausalLM, SubsetError, extract_subset, write_back
from transformers_emo.conversion import shard_experts
from tuned_models import FIRST, INPUT_IDS, hashes, same_files, trained


@pytest.fixture
def full(make_checkpoint, tmp_path):
    shutil.copytree(make_checkpoint(shards=True), tmp_path / "full")
    return tmp_path / "full"


@pytest.fixture
def tuned(full, tmp_path):
    trained(full, FIRST, tmp_path / "tuned")
    return tmp_path / "tuned"


def both(full, tuned, out):
    """The two operations, to be tried in the same place."""
    return (
        lambda: extract_subset(full, FIRST, out, progress=False),
        lambda: write_back(full, tuned, out=out, progress=False),
    )


def test_a_target_inside_its_source(full, tuned, tmp_path):
    before = hashes(full)
    for number, run in enumerate(both(full, tuned, full / "inner" / "out")):
        both(full, tuned, tmp_path / f"expected{number}")[number]()
        run()
        assert same_files(tmp_path / f"expected{number}", full / "inner" / "out")
        shutil.rmtree(full / "inner")
    assert hashes(full) == before
    write_back(full, tuned, out=tuned / "out", progress=False)
    assert same_files(tmp_path / "expected1", tuned / "out")


def test_shards_that_are_links(full, tuned, tmp_path):
    linked = tmp_path / "models--user--full" / "snapshots" / "0"  # as in the cache of the Hub
    linked.mkdir(parents=True)
    (tmp_path / "models--user--full" / "blobs").mkdir()
    for file in full.iterdir():
        blob = shutil.copy(file, tmp_path / "models--user--full" / "blobs")
        (linked / file.name).symlink_to(blob)
    for number, run in enumerate(both(linked, tuned, tmp_path / "out")):
        both(full, tuned, tmp_path / f"expected{number}")[number]()
        run()
        assert same_files(tmp_path / f"expected{number}", tmp_path / "out")
        assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
        shutil.rmtree(tmp_path / "out")
    shard = min(linked.glob("*.safetensors"))
    shard.unlink()
    for target, message in (
        (tmp_path / "models--user--full" / "blobs" / "nowhere", "Cannot open the weights file .*"),
        (tmp_path / "nowhere", ""),
    ):
        shard.unlink(missing_ok=True)
        shard.symlink_to(target)
        for run in both(linked, tuned, tmp_path / "out"):
            with pytest.raises(CheckpointError, match=f"{message}{shard.name}"):
                run()
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_shards_in_folders_of_their_own(full, tuned, tmp_path):
    (full / "parts").mkdir()
    index = full / "model.safetensors.index.json"
    text = index.read_text()
    for file in full.glob("*.safetensors"):
        file.rename(full / "parts" / file.name)
        text = text.replace(f'"{file.name}"', f'"parts/{file.name}"')
    index.write_text(text)
    module = sys.modules[write_back.__module__]
    original, calls = module._copy, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        original(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_copy", stopped)
        write_back(full, tuned, out=tmp_path / "out", progress=False)
    assert list((tmp_path / ".out.partial" / "parts").glob("*.safetensors"))
    assert list((tmp_path / ".out.partial" / "parts").glob("*.partial"))
    write_back(full, tuned, out=tmp_path / "out", progress=False)
    assert {path.name for path in (tmp_path / "out" / "parts").iterdir()} == {
        path.name for path in (full / "parts").iterdir()
    }
    assert EmoForCausalLM.from_pretrained(tmp_path / "out", expert_subset=FIRST)


@pytest.mark.parametrize("place", ["under a file", "a system's folder"])
def test_a_target_that_cannot_be_written(full, tuned, tmp_path, place):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out" if place == "under a file" else "/proc/out"
    before = sorted(tmp_path.iterdir())
    for run in both(full, tuned, out):
        with pytest.raises(OSError, match="file|/proc"):
            run()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("which", ["full", "tuned"])
def test_a_shard_that_was_cut_short(full, tuned, tmp_path, which):
    shard = min((full if which == "full" else tuned).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    before = sorted(tmp_path.iterdir())
    for run in both(full, tuned, tmp_path / "out")[which == "tuned" :]:
        with pytest.raises(CheckpointError, match="cut short"):
            run()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "lost",
    ["norm.weight", "layers.1.self_attn.k_proj.weight", "embed_tokens.weight", "lm_head.weight"],
)
@pytest.mark.parametrize("how", ["missing", "of another shape"])
def test_a_backbone_that_is_not_whole(make_checkpoint, tmp_path, lost, how):
    full = make_checkpoint()
    trained(full, FIRST, tmp_path / "tuned")
    tensors = load_file(full / "model.safetensors")
    name = lost if lost == "lm_head.weight" else f"model.{lost}"
    tensor = tensors.pop(name)
    if how != "missing":
        tensors[name] = torch.cat([tensor, tensor])
    save_file(tensors, full / "model.safetensors", metadata={"format": "pt"})
    message = f"lacks the tensor {lost}" if how == "missing" else f"{lost} of .* has shape"
    for run in both(full, tmp_path / "tuned", tmp_path / "out"):
        with pytest.raises(CheckpointError, match=message):
            run()
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_more_files_than_a_process_may_open(make_checkpoint, tmp_path):
    full = make_checkpoint(num_experts=150, hidden_size=8, intermediate_size=4)
    shard_experts(full, tmp_path / "shards", progress=False)
    experts = [[0, 5, 149]] * 3
    trained(full, experts, tmp_path / "tuned")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 400
    code = f"""
import resource
from transformers_emo import EmoForCausalLM, extract_subset, write_back
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
shards, tuned, out = {str(tmp_path / "shards")!r}, {str(tmp_path / "tuned")!r}, {str(tmp_path)!r}
write_back(shards, tuned, out=out + "/out", progress=False)
extract_subset(shards, [list(range(150))] * 3, out + "/all", progress=False)
EmoForCausalLM.from_pretrained(shards)
"""
    process = fresh_processes.run(code)
    assert process.returncode == 0, process.stderr
    write_back(full, tmp_path / "tuned", out=tmp_path / "expected", progress=False)
    assert hashes(tmp_path / "expected") == hashes(tmp_path / "out")
    assert hashes(tmp_path / "all") == hashes(full)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_subset_tuned_from_another_model(make_checkpoint, tmp_path, full, seed):
    trained(make_checkpoint(seed=seed), FIRST, tmp_path / "tuned")
    if seed == 0:  # the same one, saved elsewhere
        write_back(full, tmp_path / "tuned", out=tmp_path / "out", progress=False)
    else:
        with pytest.raises(SubsetError, match="does not come from"):
            write_back(full, tmp_path / "tuned", out=tmp_path / "out", progress=False)


class TestAdapters:
    """An adapter is merged into the weights first; without that it is neither written nor left out unsaid."""

    @staticmethod
    def adapted(full):
        peft = pytest.importorskip("peft", reason="peft is an optional part of Transformers")
        model = EmoForCausalLM.from_pretrained(full, expert_subset=FIRST)
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    def test_merged_it_is_written(self, full, tmp_path):
        adapted = self.adapted(full)
        expected = adapted(INPUT_IDS).logits
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        for number, tuned in enumerate((merged, tmp_path / "merged")):
            write_back(full, tuned, out=tmp_path / str(number), what="all", progress=False)
        assert same_files(tmp_path / "0", tmp_path / "1")
        updated = EmoForCausalLM.from_pretrained(tmp_path / "1", expert_subset=FIRST)
        assert_same_numbers(updated(INPUT_IDS).logits, expected)

    @pytest.mark.parametrize("form", ["wrapper", "inside the wrapper", "folder", "beside a model", "loaded"])
    def test_not_merged_it_is_refused(self, full, tmp_path, form):
        adapted = self.adapted(full)
        adapted.save_pretrained(tmp_path / "adapter")
        tuned = {
            "wrapper": adapted,
            "inside the wrapper": adapted.get_base_model(),
            "folder": tmp_path / "adapter",
        }.get(form)
        if form == "beside a model":
            tuned = tmp_path / "both"
            extract_subset(full, FIRST, tuned, progress=False)
            for file in (tmp_path / "adapter").iterdir():
                shutil.copy(file, tuned)
        elif form == "loaded":
            tuned = EmoForCausalLM.from_pretrained(full, expert_subset=FIRST)
            tuned.load_adapter(tmp_path / "adapter")
        with pytest.raises(ValueError, match="[Mm]erge"):
            write_back(full, tuned, out=tmp_path / "out", what="all", progress=False)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()

    def test_what_is_not_in_memory_is_refused(self, full, tmp_path):
        model = EmoForCausalLM.from_pretrained(full, expert_subset=FIRST)
        model.model.layers[0].mlp.experts.to("meta")
        with pytest.raises(ValueError, match="offloaded: save the model"):
            write_back(full, model, out=tmp_path / "out", progress=False)
