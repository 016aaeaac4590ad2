"""Exports to layouts of other engines: what computes the same, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import assert_other_numbers, assert_same_numbers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers_emo import CheckpointError, EmoForCausalLM, ExpertSubset, cli
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.checkpoints.writing import long_files
from transformers_emo.conversion import export_model, shard_experts
from transformers_emo.conversion.engines import verification

IDS = torch.tensor([[5, 9, 1, 40, 7, 88, 3, 60]])
EXACT = {
    "as released": {},
    "no shared expert": {"num_shared_experts": 0},
    "normalised weights": {"num_shared_experts": 0, "norm_topk_prob": True},
    "grouped queries": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "tied embeddings": {"tie_word_embeddings": True},
    "dense layers first": {"num_experts_per_layer": [0, 12, 12], "dense_intermediate_size": 40},
    "dense layers anywhere": {"num_experts_per_layer": [12, 0, 12], "dense_intermediate_size": 40},
    "no experts": {"num_experts_per_layer": [0, 0, 0], "dense_intermediate_size": 40},
    "fewer experts than picks": {"num_experts": 3, "num_experts_per_tok": 8},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}
REFUSED = [
    ("qwen2-moe", {"num_shared_experts": 2}, "2 shared experts"),
    ("qwen2-moe", {"num_experts_per_layer": [12, 8, 12]}, "layer 1 has 7 routed experts"),
    ("qwen2-moe", {"always_active_experts": [2]}, "export it to 'deepseek'"),
    (
        "qwen2-moe",
        {"num_experts_per_layer": [0, 12, 12], "dense_intermediate_size": 40, "dense_mlp_bias": True},
        "dense layers have biases",
    ),
    ("qwen2-moe", {"num_experts_per_tok": 1}, "a token takes no routed expert"),
    ("qwen2-moe", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("gguf", {"rope_scaling": EXACT["yarn"]["rope_scaling"]}, "'yarn'"),
    ("gguf", EXACT["dense layers anywhere"], "not the first ones"),
    ("gguf", EXACT["normalised weights"], "normalises the weights"),
    ("gguf", {"always_active_experts": [2]}, "only vLLM computes"),
    ("deepseek", EXACT["dense layers anywhere"], "not the first ones"),
    ("deepseek", EXACT["no experts"], "no experts"),
    ("deepseek", {"attention_bias": True}, "attention has biases"),
]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS.clamp(max=model.config.vocab_size - 1)).logits


@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT)
def test_plain_transformers_computes_the_same_of_an_export(make_checkpoint, tmp_path, changes):
    folder = make_checkpoint(**changes)
    notes = export_model(folder, tmp_path / "out", verify=True, progress=False)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(exported).__name__ == "Qwen2MoeForCausalLM"
    assert_same_numbers(logits(exported), logits(EmoForCausalLM.from_pretrained(folder)))
    assert notes["verified"] == "logits"


@pytest.mark.parametrize(("to", "changes", "reason"), REFUSED)
def test_what_a_layout_cannot_hold_is_refused_with_the_reason(make_checkpoint, tmp_path, to, changes, reason):
    with pytest.raises(ValueError, match=reason):
        export_model(make_checkpoint(**changes), tmp_path / "out", to=to, progress=False)
    assert not list(tmp_path.iterdir())


def test_biases_behind_attention_are_refused_and_others_exported(make_model, tmp_path):
    model = make_model(attention_bias=True)
    for name, parameter in model.named_parameters():
        if "proj.bias" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "all")
    with pytest.raises(ValueError, match="biases behind the output"):
        export_model(tmp_path / "all", tmp_path / "out", progress=False)
    for name, parameter in model.named_parameters():
        if "o_proj.bias" in name:
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "some")
    export_model(tmp_path / "some", tmp_path / "out", verify=True, progress=False)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_numbers(logits(exported), logits(model))


def test_a_subset_is_exported_from_every_layout_alike(make_checkpoint, tmp_path):
    folder = make_checkpoint(shards=True)
    subset = [[0, 3, 7, 11]] * 3
    shard_experts(folder, tmp_path / "by expert", progress=False)
    export_model(folder, tmp_path / "a", expert_subset=subset, progress=False)
    export_model(tmp_path / "by expert", tmp_path / "b", expert_subset=subset, progress=False)
    model = EmoForCausalLM.from_pretrained(folder, expert_subset=subset)
    model.save_pretrained(tmp_path / "subset")
    export_model(tmp_path / "subset", tmp_path / "c", progress=False)
    for name in "abc":
        assert_same_numbers(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), logits(model))
    content = json.loads((tmp_path / "a" / "conversion.json").read_text())
    assert content["retained_experts"] == subset
    assert content["root_experts_per_layer"] == [12, 12, 12]


def test_only_the_kept_experts_are_read(make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint()
    read = []
    read_into, copy = LocalFiles.read_into, long_files._copy

    def reading(self, file, start, buffer):
        read.append(len(buffer))
        return read_into(self, file, start, buffer)

    def copying(source, start, target, position, length):
        read.append(length)
        return copy(source, start, target, position, length)

    monkeypatch.setattr(LocalFiles, "read_into", reading)
    monkeypatch.setattr(long_files, "_copy", copying)
    export_model(folder, tmp_path / "out", expert_subset=[[0, 11]] * 3, progress=False)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0.9 * written < sum(read) < 1.1 * written < (folder / "model.safetensors").stat().st_size / 2


def test_several_files_have_an_index(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    export_model(folder, tmp_path / "out", max_shard_size="40KB", verify=True, progress=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_numbers(logits(exported), logits(EmoForCausalLM.from_pretrained(folder)))


def test_bfloat16_is_written_and_compared_as_rounded(make_checkpoint, tmp_path):
    notes = export_model(make_checkpoint(), tmp_path / "out", type="bf16", verify=True, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert notes["largest_difference"] < 1e-4
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_gate_is_half_and_the_shared_expert_doubled(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    export_model(folder, tmp_path / "out", progress=False)
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    gate = theirs["model.layers.1.mlp.shared_expert_gate.weight"]
    assert gate.any() and torch.sigmoid(gate.sum() * 1e6) == 0.5
    down = theirs["model.layers.1.mlp.shared_expert.down_proj.weight"]
    assert torch.equal(down, 2 * ours["model.layers.1.mlp.experts.11.down_proj.weight"])


def test_numbers_that_would_overflow_are_refused(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.11.down_proj.weight"][0, 0] = 3e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="too large"):
        export_model(folder, tmp_path / "out", progress=False)
    tensors["model.layers.0.mlp.experts.11.down_proj.weight"][0, 0] = 70000
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="too large for torch.float16"):
        export_model(folder, tmp_path / "out", to="deepseek", type="f16", progress=False)


def test_float16_is_refused_where_the_gate_would_vanish(make_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="2\\^-100"):
        export_model(make_checkpoint(), tmp_path / "out", type="f16", progress=False)
    export_model(make_checkpoint(), tmp_path / "out", to="deepseek", type="f16", progress=False)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"to": "mixtral"}, "no layout 'mixtral'"),
        ({"type": "q4_0"}, "no type 'q4_0'"),
        ({"type": "q8_0"}, "q8_0"),
    ],
)
def test_unknown_choices_are_named(make_checkpoint, tmp_path, choice, message):
    with pytest.raises(ValueError, match=message):
        export_model(make_checkpoint(), tmp_path / "out", progress=False, **choice)


def test_verification_notices_a_changed_file(make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint()
    export_model(folder, tmp_path / "right", progress=False)

    def spoil(where, *args, **kwargs):
        tensors = load_file(where / "model.safetensors")
        tensors["model.layers.0.mlp.shared_expert.up_proj.weight"] *= 1.01
        save_file(tensors, where / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr("transformers_emo.conversion.engines.export.verify_tensors", spoil)
    with pytest.raises(ValueError, match="logits differ"):
        export_model(folder, tmp_path / "wrong", verify=True, progress=False)
    monkeypatch.undo()
    real = verification.Checkpoint.from_folder

    def spoiled(where, **settings):
        if where.name == ".wrong.partial":
            spoil(where)
        return real(where, **settings)

    monkeypatch.setattr(verification.Checkpoint, "from_folder", spoiled)
    with pytest.raises(ValueError, match="is another tensor when it is read back"):
        export_model(folder, tmp_path / "wrong", verify=True, progress=False)
    assert not (tmp_path / "wrong").exists()


def test_an_export_that_was_stopped_goes_on(make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint()
    copy, copies = long_files._copy, []

    def failing(*span):
        copies.append(span)
        if len(copies) == 60 and not (tmp_path / "again").exists():
            raise OSError("the disk is gone")
        return copy(*span)

    monkeypatch.setattr(long_files, "_SYNC_BYTES", 1)
    monkeypatch.setattr(long_files, "_copy", failing)
    with pytest.raises(OSError, match="to continue"):
        export_model(folder, tmp_path / "out", progress=False)
    copies.clear()
    (tmp_path / "again").touch()
    export_model(folder, tmp_path / "out", verify=False, progress=False)
    assert 0 < len(copies) < 3 * 12 * 3
    assert_same_numbers(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
        logits(EmoForCausalLM.from_pretrained(folder)),
    )


def test_the_tokenizer_and_the_card_come_along(tmp_path):
    export_model("model_cards/emo-tiny", tmp_path / "coq", expert_subset="coq", progress=False)
    text = "Lemma plus_comm : forall n m : nat, n + m = m + n."
    theirs, ours = (
        AutoTokenizer.from_pretrained(place) for place in (tmp_path / "coq", "model_cards/emo-tiny")
    )
    assert theirs(text).input_ids == ours(text).input_ids
    card = (tmp_path / "coq" / "README.md").read_text()
    assert "16 of the 64 experts" in card and "vllm serve coq" in card and "license: apache-2.0" in card


def test_a_deepseek_export_holds_every_tensor_once(make_checkpoint, tmp_path):
    folder = make_checkpoint(num_experts_per_layer=[0, 12, 12], dense_intermediate_size=40)
    notes = export_model(folder, tmp_path / "out", to="deepseek", verify=True, progress=False)
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert notes["verified"] == "tensors" and len(ours) == len(theirs)
    shared = theirs["model.layers.1.mlp.shared_experts.up_proj.weight"]
    assert torch.equal(shared, ours["model.layers.1.mlp.experts.11.up_proj.weight"])
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["first_k_dense_replace"] == 1 and content["n_routed_experts"] == 11


def test_always_active_experts_are_picked_by_their_correction(make_checkpoint, tmp_path):
    folder = make_checkpoint(always_active_experts=[2, 5], num_shared_experts=0)
    export_model(folder, tmp_path / "out", to="deepseek", progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.gate.e_score_correction_bias"].nonzero().flatten().tolist() == [2, 5]


def test_a_model_without_its_tokenizer_is_exported_without_one(make_checkpoint, tmp_path):
    export_model(make_checkpoint(), tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    assert cli.main(["export", "model_cards/toy-emo", str(tmp_path / "a"), "--verify", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["layout"] == "qwen2-moe" and said["experts_per_layer"] == [32] * 4
    assert cli.main(["export", str(tmp_path / "a"), str(tmp_path / "b"), "--from", "qwen2-moe"]) == 0
    assert "b: emo, 32 experts a layer" in capsys.readouterr().out
    assert cli.main(["export", str(tmp_path / "a"), str(tmp_path / "c"), "--from", "gguf"]) == 2
    assert cli.main(["export", str(tmp_path / "a"), "c", "--from", "qwen2-moe", "--to", "gguf"]) == 2
    assert cli.main(["export", "model_cards/toy-emo", str(tmp_path / "a")]) == 1


def test_subsets_are_found_by_name_and_refused_by_value(tmp_path):
    model = shutil.copytree("model_cards/toy-emo", tmp_path / "model")
    ExpertSubset([[0, 1, 2, 31]] * 4).save(model / "subsets" / "mine.json")
    export_model(model, tmp_path / "out", expert_subset="mine", progress=False)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.num_experts == 3
    assert_other_numbers(logits(exported), logits(EmoForCausalLM.from_pretrained(model)))
    with pytest.raises(ValueError, match="99"):
        export_model(model, tmp_path / "wrong", expert_subset=[[0, 99]] * 4, progress=False)
