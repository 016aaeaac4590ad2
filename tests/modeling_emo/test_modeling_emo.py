"""The network in all its released variants, against a naive one; and how it lives with Transformers."""

import copy
import json
import pickle

import pytest
import reference
import torch
from safetensors.torch import load_file
from tolerances import TRAINING, assert_same_numbers, clear_words
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.generation import ContinuousBatchingConfig
from transformers_emo import EmoConfig, EmoForCausalLM, EmoModel

DENSE_FIRST = {"num_experts_per_layer": [0, 12, 12], "dense_intermediate_size": 40}
VARIANTS = {
    "released": {},
    "no shared": {"num_shared_experts": 0},
    "no shared, renormalised": {"num_shared_experts": 0, "norm_topk_prob": True},
    "two shared": {"num_shared_experts": 2},
    "grouped queries": {"num_key_value_heads": 2},
    "attention bias": {"attention_bias": True},
    "experts per layer": {"num_experts_per_layer": [12, 6, 9]},
    "fewer experts than picks": {"num_experts_per_layer": [12, 3, 12]},
    "shared per layer": {"num_shared_experts_per_layer": [1, 0, 2], "num_experts_per_layer": [12, 6, 9]},
    "dense first": DENSE_FIRST,
    "dense first with bias": DENSE_FIRST | {"dense_mlp_bias": True},
    "always active": {"num_shared_experts": 0, "always_active_experts": [3, 7]},
    "always active per layer": {
        "num_shared_experts": 0,
        "num_experts_per_layer": [12, 6, 9],
        "always_active_experts_per_layer": [[0], [5, 1], []],
    },
    "tied": {"tie_word_embeddings": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "yarn rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 500000.0,
        }
    },
}
INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request, make_checkpoint):
    folder = make_checkpoint(**VARIANTS[request.param])
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return folder, config, tensors


def test_every_variant_computes_what_its_description_says(variant):
    folder, config, tensors = variant
    model = AutoModelForCausalLM.from_pretrained(folder)
    labels = INPUT_IDS.clone()
    labels[0, :3] = -100
    with torch.no_grad():
        out = model(INPUT_IDS, labels=labels, output_router_logits=True)
    logits, routers = reference.forward(config, tensors, INPUT_IDS, model.model.rotary_emb.inv_freq)
    assert_same_numbers(out.logits, logits)
    assert len(out.router_logits) == len(routers)
    for got, expected in zip(out.router_logits, routers, strict=True):
        assert_same_numbers(got, expected)
    balance = reference.balance_loss(config, routers, (labels != -100).flatten())
    assert_same_numbers(out.aux_loss, balance)


def test_every_variant_is_saved_under_the_same_names_with_the_same_bytes(variant, tmp_path):
    folder, config, tensors = variant
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_load_run_and_stay_close(make_checkpoint, dtype):
    folder = make_checkpoint()
    full = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        logits, expected = model(INPUT_IDS).logits, full(INPUT_IDS).logits
    assert logits.dtype == dtype
    close = torch.nn.functional.cosine_similarity(logits.float(), expected, dim=-1).mean()
    assert close > 0.98


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_released_auto_map_never_replaces_our_classes(make_checkpoint, edit_json, trust_remote_code):
    folder = make_checkpoint()
    auto_map = {
        "AutoConfig": "configuration_emo.EmoConfig",
        "AutoModelForCausalLM": "modeling_emo.EmoForCausalLM",
    }
    edit_json(folder / "config.json", auto_map=auto_map)
    kwargs = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    assert type(model) is EmoForCausalLM
    assert type(AutoConfig.from_pretrained(folder, **kwargs)) is EmoConfig


def test_legacy_model_type_loads_as_emo(make_checkpoint, edit_json, tmp_path):
    folder = make_checkpoint()
    expected = AutoModelForCausalLM.from_pretrained(folder)
    legacy = ["FlexOlmoNoQKNormPrenormForCausalLM"]
    edit_json(folder / "config.json", model_type="flex_olmo_noqknorm_prenorm", architectures=legacy)
    for load in (AutoModelForCausalLM.from_pretrained, EmoForCausalLM.from_pretrained):
        model = load(folder)
        assert type(model) is EmoForCausalLM
        assert torch.equal(model(INPUT_IDS).logits, expected(INPUT_IDS).logits)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("emo", ["EmoForCausalLM"])
    subset = AutoModelForCausalLM.from_pretrained(folder, expert_subset=[[0, 1, 2, 11]] * 3)
    assert subset.config.num_experts == 4


def test_heads_load_from_a_causal_language_model(make_checkpoint):
    folder = make_checkpoint()
    assert type(AutoModel.from_pretrained(folder)) is EmoModel
    for auto_class, shape in (
        (AutoModelForSequenceClassification, (2, 2)),
        (AutoModelForTokenClassification, (2, 7, 2)),
    ):
        model = auto_class.from_pretrained(folder)
        assert model(INPUT_IDS).logits.shape == shape
        embedding = AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight
        assert torch.equal(model.model.embed_tokens.weight, embedding)


class TestOutputRouterLogits:
    def test_true_in_a_file_costs_nothing_outside_training(self, make_checkpoint, edit_json):
        folder = make_checkpoint()
        edit_json(folder / "config.json", output_router_logits=True)
        model = AutoModelForCausalLM.from_pretrained(folder)
        out = model(INPUT_IDS, labels=INPUT_IDS)
        assert out.router_logits is None and out.aux_loss is None and torch.equal(out.loss, out.ce_loss)
        assert model.model(INPUT_IDS).get("router_logits") is None
        ids = model.generate(INPUT_IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        assert "router_logits" not in ids

    def test_true_in_a_file_trains_with_the_balance_loss_and_is_saved_as_true(
        self, make_checkpoint, edit_json, tmp_path
    ):
        folder = make_checkpoint()
        edit_json(folder / "config.json", output_router_logits=True)
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        out = model(INPUT_IDS, labels=INPUT_IDS)
        assert_same_numbers(out.loss, out.ce_loss + model.config.router_aux_loss_coef * out.aux_loss)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["output_router_logits"] is True

    @pytest.mark.parametrize(
        "kwargs", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str
    )
    def test_generating_in_training_mode_works_with_left_padding(self, make_checkpoint, edit_json, kwargs):
        folder = make_checkpoint()
        edit_json(folder / "config.json", output_router_logits=True)
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        mask = torch.ones_like(INPUT_IDS)
        mask[1, :3] = 0
        for always in ("training", True):
            model.config.output_router_logits = always
            ids = model.generate(INPUT_IDS, attention_mask=mask, max_new_tokens=2, do_sample=False, **kwargs)
            assert ids.shape == (2, 9)

    def test_model_without_expert_layers_trains(self, make_model):
        model = make_model(
            num_experts_per_layer=[0, 0, 0], dense_intermediate_size=16, output_router_logits="training"
        )
        out = model.train()(INPUT_IDS, labels=INPUT_IDS)
        assert out.aux_loss is None and torch.equal(out.loss, out.ce_loss)

    def test_arguments_by_position_are_understood(self, make_model):
        out = make_model()(INPUT_IDS, None, None, None, None, INPUT_IDS, None, True)
        assert out.aux_loss is not None

    def test_asking_for_them_works_in_every_way(self, make_checkpoint):
        folder = make_checkpoint()
        model = AutoModelForCausalLM.from_pretrained(folder, output_router_logits=True)
        assert model(INPUT_IDS).aux_loss is not None
        assert model(INPUT_IDS, output_router_logits=False).router_logits is None
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        assert model(INPUT_IDS, labels=INPUT_IDS).aux_loss is None


@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])
def test_flex_attention_gives_the_logits_of_eager(make_model, stance):
    # A forward of the prompt only: the C++ that torch 2.13 makes for flex decoding on a CPU does not compile.
    # On a CPU without AVX2 that of the prompt does not either: compiling is for the slow tests.
    model = make_model(hidden_size=64)
    mask = torch.ones_like(INPUT_IDS)
    mask[1, :3] = 0
    logits = {}
    for attention in ("eager", "flex_attention"):
        model.set_attn_implementation(attention)
        with torch.no_grad(), torch.compiler.set_stance(stance):
            logits[attention] = model(INPUT_IDS, attention_mask=mask).logits[mask.bool()]
    assert_same_numbers(logits["flex_attention"], logits["eager"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_does_not_change_what_is_generated(make_model, attention):
    model = make_model()
    model.set_attn_implementation(attention)
    alone = clear_words(model, INPUT_IDS[1:, 3:], max_new_tokens=6)
    padded = INPUT_IDS.clone()
    padded[1, :3] = 0
    mask = (padded != 0).long()
    together = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(together[1, 3:], alone[0])


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_caches_generate_the_same(make_model, cache):
    model = make_model()
    expected = clear_words(model, INPUT_IDS, max_new_tokens=8, use_cache=False)
    kwargs = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    if cache == "dynamic":
        kwargs["past_key_values"] = DynamicCache(config=model.config)
    ids = model.generate(INPUT_IDS, max_new_tokens=8, do_sample=False, **kwargs)
    assert torch.equal(ids, expected)


def test_sampling_beams_and_assisted_decoding_run(make_model):
    model = make_model()
    torch.manual_seed(0)
    assert model.generate(INPUT_IDS, max_new_tokens=4, do_sample=True, top_p=0.9).shape == (2, 11)
    assert model.generate(INPUT_IDS, max_new_tokens=4, num_beams=3, do_sample=False).shape[0] == 2
    assistant = make_model(seed=1, num_hidden_layers=1)
    greedy = clear_words(model, INPUT_IDS[:1], max_new_tokens=8)
    assisted = model.generate(INPUT_IDS[:1], max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, greedy)


def test_continuous_batching_generates_the_same(make_model):
    model = make_model()
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = clear_words(model, INPUT_IDS, generation_config=config)[:, INPUT_IDS.shape[1] :]
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else most of the machine's memory
    results = model.generate_batch(
        INPUT_IDS.tolist(), generation_config=config, continuous_batching_config=small
    )
    assert sorted(result.generated_tokens for result in results.values()) == sorted(expected.tolist())


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_decode_step_compiles_as_one_graph_and_gives_the_same(make_model, experts, backend):
    model = make_model()
    model.set_experts_implementation(experts)
    expected = clear_words(model, INPUT_IDS, max_new_tokens=4)
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        token = model(INPUT_IDS, past_key_values=cache).logits[:, -1].argmax(-1)
        tokens = [token]
        for _ in range(3):
            position = torch.full((2, 1), cache.get_seq_length())
            token = (
                step(token[:, None], past_key_values=cache, position_ids=position).logits[:, -1].argmax(-1)
            )
            tokens.append(token)
    assert torch.equal(torch.stack(tokens, 1), expected[:, INPUT_IDS.shape[1] :])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, use_reentrant):
    model = make_model().train()
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert_same_numbers(parameter.grad, expected[name], terms=TRAINING, name=name)


def test_released_names_load_with_plain_load_state_dict(make_checkpoint, make_model):
    # As the Trainer does when it resumes: left to itself it would keep the initial experts, silently.
    expected = make_model(seed=0)
    model = make_model(seed=1)
    tensors = load_file(make_checkpoint(seed=0) / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == [] and unexpected == []
    assert torch.equal(model(INPUT_IDS).logits, expected(INPUT_IDS).logits)


def test_trainer_predictions_are_the_logits(make_model, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in INPUT_IDS]
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
    predictions = Trainer(make_model(), arguments, eval_dataset=data).predict(data).predictions
    assert predictions.shape == (2, 7, 96)


def test_models_can_be_copied_and_pickled(make_model):
    model = make_model()
    expected = model(INPUT_IDS).logits
    with model.use_experts([[0, 1, 2, 11]] * 3):
        pass
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(INPUT_IDS).logits, expected)


def test_untrained_weights_are_truncated_normal_and_loaded_ones_untouched(make_checkpoint):
    torch.manual_seed(0)
    config = EmoConfig(
        vocab_size=2000, hidden_size=64, intermediate_size=64, num_hidden_layers=1, pad_token_id=0
    )
    model = EmoForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert 0.018 < parameter.std() < 0.021 and parameter.abs().max() <= 0.06, name
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.model.layers[1].mlp.gate.weight, tensors["model.layers.1.mlp.gate.weight"])
