"""Rounded by text, a model is nearer to what it was than rounded to the nearest numbers."""

import pytest
import torch
from torch.nn import functional as F
from transformers_emo import CheckpointError, EmoForCausalLM, PackedConfig, quantize_model
from transformers_emo.modeling_emo.kernels.packed.packed_tensor import PackedTensor
from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight, unpack
from transformers_emo.quantization.calibrated import _rounded
from transformers_emo.training import lora_config

SIZES = {"intermediate_size": 32, "vocab_size": 96}
FOUR = PackedConfig(4, 16, symmetric=False)
VARIANTS = {
    "released": {},
    "dense first": {
        "num_experts_per_layer": [0, 12, 12],
        "dense_intermediate_size": 64,
        "dense_mlp_bias": True,
    },
    "tied head": {"tie_word_embeddings": True},
    "two shared": {"num_shared_experts": 2},
}


def texts(seed=0, rows=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 96, (rows, 24), generator=generator) for _ in range(2)]


def divergence(found, expected):
    return F.kl_div(found, expected, log_target=True, reduction="batchmean")


def quantised(model, packing=FOUR, **kwargs):
    return quantize_model(model, packing, texts(), progress=False, **kwargs)


@pytest.mark.parametrize("packing", [FOUR, PackedConfig(4, 32, True), PackedConfig(8)])
def test_what_matrices_give_is_nearer_for_inputs_like_those(packing):
    torch.manual_seed(0)
    mixing = torch.randn(64, 64)
    inputs = torch.randn(200, 64) @ mixing
    weight = torch.randn(3, 16, 64)
    products = (inputs.T @ inputs).expand(3, 64, 64)
    found = _rounded(weight, products, packing, "w").dequantise()
    group = packing.group_of(64)
    nearest = PackedWeight.quantise(weight, packing.bits, group, packing.symmetric).dequantise()
    fresh = torch.randn(200, 64) @ mixing
    errors = [(F.linear(fresh, (each - weight).flatten(0, 1))).square().sum() for each in (found, nearest)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("packing", [FOUR, PackedConfig(4, 32, True), PackedConfig(8)])
def test_for_inputs_that_are_not_alike_it_is_the_nearest(packing):
    weight = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    found = _rounded(weight, torch.eye(32).expand(2, 32, 32), packing, "w")
    nearest = PackedWeight.quantise(weight, packing.bits, packing.group_of(32), packing.symmetric)
    errors = [(each.dequantise() - weight).square().sum() for each in (found, nearest)]
    assert 0.8 * errors[1] < errors[0] <= errors[1]  # its search for the scale is finer
    again = (weight.unflatten(-1, (-1, found.group)) / found.scale[..., None]).round()
    zero = 2 ** (found.bits - 1) if found.zero is None else found.zero[..., None].float()
    number = (again + zero).clamp(0, 2**found.bits - 1).to(torch.uint8).flatten(-2)
    assert torch.equal(unpack(found.packed, found.bits), number)


def test_inputs_that_are_always_zero_do_no_harm():
    weight = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    products = torch.zeros(1, 32, 32)
    assert _rounded(weight, products, FOUR, "w").dequantise().isfinite().all()
    products[0, :4, :4] = torch.eye(4)
    assert (_rounded(weight, products, FOUR, "w").dequantise() - weight).abs().max() < 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packing", [FOUR, PackedConfig(8), PackedConfig(4, 16, True, head_bits=4)])
def test_a_model_is_as_one_that_was_loaded_so(make_checkpoint, tmp_path, variant, packing):
    folder = make_checkpoint(**SIZES | VARIANTS[variant])
    plain = EmoForCausalLM.from_pretrained(folder)
    nearest = EmoForCausalLM.from_pretrained(folder, quantization_config=packing)
    model = quantised(EmoForCausalLM.from_pretrained(folder), packing)
    for name, tensor in nearest.state_dict().items():
        found = model.state_dict()[name]
        assert isinstance(found, PackedTensor) == isinstance(tensor, PackedTensor)
        if isinstance(tensor, PackedTensor):
            assert found.shape == tensor.shape and not found.requires_grad
        else:
            assert torch.equal(found, tensor)
    assert model.config.quantization_config == nearest.config.quantization_config
    assert model.is_quantized and not model.training
    model.save_pretrained(tmp_path)
    again = EmoForCausalLM.from_pretrained(tmp_path)
    ids = texts(seed=1)[0]
    with torch.no_grad():
        expected = plain(ids).logits.log_softmax(-1)
        found, other = (each(ids).logits.log_softmax(-1) for each in (model, nearest))
        assert torch.equal(again(ids).logits, model(ids).logits)
    if packing is FOUR:  # of so small a model only in the mean
        assert divergence(found, expected) < divergence(other, expected)


def test_padding_does_not_count(make_checkpoint):
    folder = make_checkpoint(**SIZES)
    ids = texts(rows=3)[0]
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(29) >= 5).long().expand(3, 29)
    models = [EmoForCausalLM.from_pretrained(folder) for _ in range(2)]
    quantize_model(models[0], FOUR, [ids], progress=False)
    quantize_model(models[1], FOUR, [padded], attention_mask=[mask], progress=False)
    ids = texts(seed=1)[0]
    with torch.no_grad():
        one, other = (model(ids).logits for model in models)
    # Padding changes roundings, and so a few numbers by one step.
    assert F.cosine_similarity(one, other, dim=-1).mean() > 0.995


def test_modules_can_be_left_out(make_checkpoint):
    packing = PackedConfig(4, 16, True, modules_to_not_convert=["lm_head", "mlp.experts", "self_attn.k_proj"])
    model = quantised(EmoForCausalLM.from_pretrained(make_checkpoint(**SIZES)), packing)
    packed = {name for name, tensor in model.state_dict().items() if isinstance(tensor, PackedTensor)}
    assert packed == {
        f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(3) for part in "qvo"
    }


def test_what_cannot_be_quantised_is_refused_before_it_changes(make_checkpoint):
    folder = make_checkpoint(**SIZES)
    model = EmoForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for ids, kwargs, message in (
        ([], {}, "Got 0 batches"),
        (texts(), {"attention_mask": [torch.ones(8, 24)]}, "and 1 masks"),
        ([torch.tensor([5, 6])], {}, "expected a tensor"),
        ([torch.tensor([[5, 96]])], {}, "below 96"),
        ([torch.tensor([[5.0]])], {}, "expected a tensor"),
        ([torch.tensor([[5, 6]])], {"attention_mask": [torch.ones(1, 3)]}, "a mask of its shape"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_model(model, FOUR, ids, progress=False, **kwargs)
    with pytest.raises(ValueError, match="groups of 64"):
        quantize_model(model, PackedConfig(4, 64), texts(), progress=False)
    with pytest.raises(ValueError, match="expected an EMO model"):
        quantize_model(torch.nn.Linear(2, 2), FOUR, texts(), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="quantised already"):
        quantised(quantised(model))
    peft = pytest.importorskip("peft")
    other = EmoForCausalLM.from_pretrained(folder)
    peft.get_peft_model(other, lora_config(other, r=2))
    with pytest.raises(ValueError, match="under adapters"):
        quantised(other)


def test_damaged_weights_are_refused_by_name(make_checkpoint):
    model = EmoForCausalLM.from_pretrained(make_checkpoint(**SIZES))
    model.model.layers[2].mlp.experts.down_proj.data[3, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.down_proj cannot be quantised"):
        quantised(model)
