"""Older repositories and other mixtures of experts as clean folders."""

import hashlib
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import assert_other_numbers, assert_same_numbers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers_emo import CheckpointError, EmoConfig, EmoForCausalLM, ExpertSubset, cli
from transformers_emo.conversion import upgrade_checkpoint

POOLS = {"document_pool_min": 3, "document_pool_max": 11}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
IDS = torch.tensor([[5, 9, 1, 40, 7, 88, 3, 60]])


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def old_repository(make_checkpoint, edit_json):
    """A repository as first uploaded: legacy names, remote code, odd settings."""
    folder = make_checkpoint(shards=True)
    edit_json(
        folder / "config.json",
        model_type="flex_olmo_noqknorm_prenorm",
        architectures=["FlexOlmoNoQKNormPrenormForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_emo.EmoForCausalLM"},
        output_router_logits=True,
    )
    (folder / "modeling_emo.py").write_text("raise SystemExit('run')")
    (folder / "training_args.bin").write_bytes(b"pickle")
    generation = {"pad_token": 0, "eos_token_id": 1, "max_new_tokens": 7, "transformers_version": "4.57.1"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "README.md").write_text("card")
    ExpertSubset([[0, 3, 11]] * 3).save(folder / "subsets" / "math.json")
    (folder / "subsets" / "evil.py").write_text("raise SystemExit('run')")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "token").write_text("secret")
    tokenizer = {"auto_map": {"AutoTokenizer": [None, "x.Y"]}, "eos_token": "<e>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("link", [False, True])
def test_an_old_repository_becomes_a_clean_folder(link, old_repository, tmp_path):
    out = tmp_path / "new"
    upgrade_checkpoint(old_repository, out, link=link, progress=False)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("emo", ["EmoForCausalLM"])
    assert config["output_router_logits"] is False and "auto_map" not in config
    weights = sorted(path.name for path in old_repository.glob("*.safetensors"))
    assert len(weights) > 1 and weights == sorted(path.name for path in out.glob("*.safetensors"))
    for name in weights:
        assert (out / name).read_bytes() == (old_repository / name).read_bytes()
        assert (out / name).samefile(old_repository / name) is link
    assert not list(out.rglob("*.py")) and not list(out.glob("*.bin")) and not (out / ".cache").exists()
    assert EmoForCausalLM.from_pretrained(out, expert_subset="math").config.num_experts == 3
    assert (out / "README.md").read_text() == "card" and (out / "tokenizer.json").exists()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"eos_token": "<e>"}
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.pad_token_id, generation.eos_token_id, generation.max_new_tokens) == (0, 1, 7)
    assert "pad_token" not in json.loads((out / "generation_config.json").read_text())
    said = json.loads((out / "conversion.json").read_text())
    assert said["left_out"] == ["modeling_emo.py", "training_args.bin"]
    assert (said["model"], said["revision"]) == (old_repository.name, None)
    assert said["sha256"] == {name: sha256(out / name) for name in weights}
    assert said["source_sha256"] == {"config.json": sha256(old_repository / "config.json")}


def test_the_upgraded_model_is_the_same(old_repository, make_model, tmp_path):
    upgrade_checkpoint(old_repository, tmp_path / "new", settings=POOLS, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert type(model) is EmoForCausalLM and model.config.document_pool_max == 11
    assert torch.equal(model(IDS).logits, make_model()(IDS).logits)
    loss = model.train()(IDS, labels=IDS).loss  # pools are on
    assert loss.isfinite()


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"num_experts_per_layer": [12, 0, 6], "dense_intermediate_size": 40, "dense_mlp_bias": True},
        {"num_shared_experts": 2},
    ],
)
def test_every_kind_of_emo_is_upgraded(changes, make_checkpoint, tmp_path):
    folder = make_checkpoint(**changes)
    upgrade_checkpoint(folder, tmp_path / "new", progress=False)
    one, other = (AutoModelForCausalLM.from_pretrained(f)(IDS).logits for f in (folder, tmp_path / "new"))
    assert torch.equal(one, other)


def test_mixtral_computes_the_same_as_an_emo(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        **SMALL, num_local_experts=6, rope_parameters={"rope_type": "default", "rope_theta": 5e3}
    )
    theirs = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "mixtral", max_shard_size="20KB")
    upgraded = upgrade_checkpoint(
        tmp_path / "mixtral", tmp_path / "emo", settings=POOLS | {"document_pool_max": 6}
    )
    ours, report = EmoForCausalLM.from_pretrained(tmp_path / "emo", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert upgraded.document_pool_min == 3 and ours.num_parameters() == theirs.num_parameters()
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert_same_numbers(ours.eval()(IDS).logits, expected)
    ours.config.norm_topk_prob = False  # guards the comparison: it sees one wrong setting
    wrong = EmoForCausalLM.from_pretrained(tmp_path / "emo", config=ours.config)
    assert_other_numbers(wrong(IDS).logits, expected)


@pytest.mark.parametrize(
    ("config", "model", "reason"),
    [
        (OlmoeConfig(**SMALL, num_experts=6), OlmoeForCausalLM, "normalises queries and keys"),
        (
            Qwen2MoeConfig(
                **SMALL, num_experts=6, moe_intermediate_size=8, shared_expert_intermediate_size=8
            ),
            Qwen2MoeForCausalLM,
            "biases, and its shared expert a sigmoid gate",
        ),
        (MixtralConfig(**SMALL, num_local_experts=4, sliding_window=4), MixtralForCausalLM, "sliding window"),
        (MixtralConfig(**SMALL, num_local_experts=4, head_dim=16), MixtralForCausalLM, "heads are 16 wide"),
        (MixtralConfig(**SMALL, num_local_experts=4, hidden_act="gelu"), MixtralForCausalLM, "'gelu'"),
    ],
)
def test_models_that_compute_something_else_are_refused(config, model, reason, tmp_path):
    model(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=reason):
        upgrade_checkpoint(tmp_path / "model", tmp_path / "emo", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tensor_under_two_names_is_refused(tmp_path):
    config = MixtralConfig(**SMALL, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    old = "model.layers.0.input_layernorm.weight"
    tensors[old.replace("input", "pre_attention")] = tensors[old] + 1
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match="has a tensor twice"):
        upgrade_checkpoint(tmp_path / "model", tmp_path / "emo", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unknown_families_are_refused(make_checkpoint, edit_json, tmp_path):
    folder = make_checkpoint()
    edit_json(folder / "config.json", model_type="grok")
    with pytest.raises(ValueError, match="'grok' cannot become an EMO"):
        upgrade_checkpoint(folder, tmp_path / "emo", progress=False)


@pytest.mark.parametrize("damage", ["config", "layers", "weights", "pickled", "setting", "pools"])
def test_weights_and_configs_that_do_not_fit_are_refused_before_writing(
    damage, make_checkpoint, edit_json, tmp_path
):
    folder, settings, error, message = make_checkpoint(), {}, CheckpointError, "config.json"
    if damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "layers":
        edit_json(folder / "config.json", num_hidden_layers=2)
        message = "has 43 tensors that config.json does not explain"
    elif damage == "weights":
        edit_json(folder / "config.json", num_hidden_layers=4)
        message = "lacks"
    elif damage == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        message = "pickled"
    elif damage == "setting":
        settings, error, message = {"hidden_size": 8}, ValueError, "no setting of training"
    else:
        settings, error, message = (
            {"document_pool_min": 1, "document_pool_max": 4},
            ValueError,
            "document_pool_min",
        )
    with pytest.raises(error, match=message):
        upgrade_checkpoint(folder, tmp_path / "emo", settings=settings, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_upgrades(old_repository, tmp_path, capsys, caplog):
    words = ["convert", "upgrade", str(old_repository), str(tmp_path / "new")]
    with caplog.at_level(logging.WARNING):
        assert (
            cli.main([*words, "--set", "document_pool_min=3", "--set", "document_pool_max=9", "--link"]) == 0
        )
    assert EmoConfig.from_pretrained(tmp_path / "new").document_pool_max == 9
    assert load_file(next((tmp_path / "new").glob("*.safetensors")))
    assert cli.main(words) == 1
    assert "exists already" in capsys.readouterr().err
