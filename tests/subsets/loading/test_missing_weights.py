"""What the files lack is no random number: it is refused by name, unless that is asked for."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers_emo import (
    CheckpointError,
    EmoConfig,
    EmoForCausalLM,
    EmoForSequenceClassification,
    EmoForTokenClassification,
    EmoModel,
)

SUBSET = [[0, 3, 4, 8, 11], [1, 2, 5, 7, 11], [0, 6, 9, 10, 11]]
LAYER = "model.layers.1."
BACKBONE = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    LAYER + "pre_attention_layernorm.weight",
    LAYER + "pre_feedforward_layernorm.weight",
    LAYER + "self_attn.q_proj.weight",
    LAYER + "self_attn.o_proj.weight",
]
EXPERTS = [LAYER + "mlp.gate.weight", LAYER + "mlp.experts.5.up_proj.weight", LAYER + "mlp.experts."]


def without(folder, *names):
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {n: t for n, t in load_file(file).items() if not n.startswith(names)}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("choice", [{}, {"expert_subset": SUBSET}, {"exclude_experts": {0: [1]}}], ids=str)
@pytest.mark.parametrize("name", BACKBONE)
def test_a_missing_tensor_is_refused_by_name(make_checkpoint, name, choice):
    folder = without(make_checkpoint(), name)
    with pytest.raises(
        CheckpointError, match=f"{folder} lacks a tensor .*{name}.*`ignore_missing_keys=True`"
    ):
        AutoModelForCausalLM.from_pretrained(folder, **choice)
    model = AutoModelForCausalLM.from_pretrained(folder, ignore_missing_keys=True, **choice)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("choice", [{}, {"expert_subset": SUBSET}], ids=["whole", "subset"])
@pytest.mark.parametrize("name", EXPERTS)
def test_missing_experts_and_routers_are_refused(make_checkpoint, name, choice):
    folder = without(make_checkpoint(), name)
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.1\.mlp|experts in layer 1|does not fit"):
        AutoModelForCausalLM.from_pretrained(folder, **choice)


@pytest.mark.parametrize("cls", [EmoModel, EmoForSequenceClassification, EmoForTokenClassification])
@pytest.mark.parametrize("choice", [{}, {"expert_subset": SUBSET}], ids=["whole", "subset"])
def test_the_backbone_of_another_head_must_be_whole(make_checkpoint, cls, choice):
    folder = without(make_checkpoint(), "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        cls.from_pretrained(folder, **choice)


@pytest.mark.parametrize("cls", [EmoForSequenceClassification, EmoForTokenClassification])
@pytest.mark.parametrize("choice", [{}, {"expert_subset": SUBSET}], ids=["whole", "subset"])
def test_a_new_classifier_is_random_and_a_saved_one_is_not(make_checkpoint, tmp_path, cls, choice):
    model = cls.from_pretrained(make_checkpoint(), num_labels=3, **choice)
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert torch.equal(again.score.weight, model.score.weight)
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        cls.from_pretrained(without(tmp_path, "score"))
    assert cls.from_pretrained(tmp_path, ignore_missing_keys=True).score.weight.shape == (3, 32)


def test_a_decoder_saved_by_itself_may_get_a_head(make_checkpoint, tmp_path):
    EmoModel.from_pretrained(make_checkpoint()).save_pretrained(tmp_path)
    for load in (AutoModelForSequenceClassification.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert load(tmp_path).config.num_experts == 12


@pytest.mark.parametrize("choice", [{}, {"expert_subset": SUBSET}], ids=["whole", "subset"])
def test_who_asks_what_is_missing_is_told(make_checkpoint, choice):
    folder = without(make_checkpoint(), "model.norm.weight")
    _, info = EmoForCausalLM.from_pretrained(folder, output_loading_info=True, **choice)
    assert info["missing_keys"] == {"model.norm.weight"}


def test_tied_embeddings_are_one_tensor(make_checkpoint):
    folder = make_checkpoint(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    for choice in ({}, {"expert_subset": SUBSET}):
        model = EmoForCausalLM.from_pretrained(folder, **choice)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    without(folder, "model.embed_tokens")
    for choice in ({}, {"expert_subset": SUBSET}):
        with pytest.raises(CheckpointError, match=r"embed_tokens\.weight"):
            EmoForCausalLM.from_pretrained(folder, **choice)


def test_weights_in_other_forms_are_looked_at_too(make_checkpoint):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        EmoForCausalLM.from_pretrained(
            None, config=EmoConfig.from_pretrained(folder), state_dict=dict(tensors)
        )
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        EmoForCausalLM.from_pretrained(folder)


def test_more_layers_than_there_are(make_checkpoint):
    folder = make_checkpoint()
    with pytest.raises(CheckpointError, match="asks for 5 layers.*`ignore_missing_keys=True`"):
        EmoForCausalLM.from_pretrained(folder, num_hidden_layers=5)
    assert (
        len(
            EmoForCausalLM.from_pretrained(folder, num_hidden_layers=5, ignore_missing_keys=True).model.layers
        )
        == 5
    )


def test_a_network_that_is_new_throughout(make_model):
    config = make_model().config
    assert EmoForCausalLM.from_pretrained(None, config=config, state_dict={}).lm_head.weight.isfinite().all()


VOCABULARY = {"vocab_size": 120, "ignore_mismatched_sizes": True}


@pytest.mark.parametrize("choice", [{"expert_subset": SUBSET}, {"exclude_experts": {0: [1]}}], ids=str)
def test_other_sizes_of_a_subset(make_checkpoint, choice):
    folder = make_checkpoint()
    plain = EmoForCausalLM.from_pretrained(folder, **choice).state_dict()
    larger = EmoForCausalLM.from_pretrained(folder, **VOCABULARY, **choice)
    assert larger.lm_head.weight.shape == larger.model.embed_tokens.weight.shape == (120, 32)
    for name, tensor in larger.state_dict().items():
        assert tensor.isfinite().all()
        assert tensor.shape != plain[name].shape or torch.equal(tensor, plain[name])
    smaller = EmoForCausalLM.from_pretrained(folder, **VOCABULARY | {"vocab_size": 90}, **choice)
    assert smaller.lm_head.weight.shape == (90, 32)
    for size in (90, 120):
        with pytest.raises(CheckpointError, match="`ignore_mismatched_sizes=True`"):
            EmoForCausalLM.from_pretrained(folder, vocab_size=size, **choice)


def test_experts_of_other_sizes_in_a_subset(make_checkpoint):
    folder = make_checkpoint()
    wider = {"intermediate_size": 48, "ignore_mismatched_sizes": True}
    model = EmoForCausalLM.from_pretrained(folder, expert_subset=SUBSET, **wider)
    assert model.model.layers[0].mlp.experts.down_proj.shape == (5, 32, 48)
    assert model.model.layers[0].mlp.experts.down_proj.isfinite().all()
