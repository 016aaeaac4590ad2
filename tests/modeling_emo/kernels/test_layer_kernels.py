"""Compiled layers of inference: who computes, and that nobody notices."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_same_numbers, network_terms
from torch import nn
from transformers_emo import EmoConfig
from transformers_emo.modeling_emo.expert_switching import package
from transformers_emo.modeling_emo.kernels.native_library import find_kernels
from transformers_emo.modeling_emo.modeling_emo import (
    EmoLinear,
    EmoRMSNorm,
    EmoRotaryEmbedding,
    EmoTopKRouter,
    _rotate_both,
)

KERNELS = find_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no compiled kernels")


@pytest.fixture
def calls(monkeypatch):
    """Rows of each call of the kernel."""
    kernels, seen = find_kernels(), []
    linear = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda x, *args: seen.append(len(x)) or linear(x, *args))
    return seen


def stored(dtype: torch.dtype, terms: int, times: int = 1) -> int:
    """`terms` of a sum; in half precision it is made in float32, and stored some `times`."""
    return terms if dtype == torch.float32 else times


def make_linear(dtype=torch.float32, **kwargs) -> EmoLinear:
    torch.manual_seed(0)
    return EmoLinear(600, 500, **kwargs).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(600,), (1, 600), (2, 1, 600), (3, 600)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_as_near_as_the_dtype(calls, dtype, shape, bias):
    linear = make_linear(dtype, bias=bias)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        found, expected = linear(x), F.linear(x, linear.weight, linear.bias)
    assert len(calls) == 1
    assert_same_numbers(found, expected, terms=stored(dtype, 600))


@pytest.mark.parametrize(
    ("rows", "by_kernel"), [(6, True), (128, KERNELS is not None and KERNELS.has_tiles), (129, False)]
)
def test_more_rows_are_for_tiles(calls, rows, by_kernel):
    torch.manual_seed(0)
    linear, x = EmoLinear(640, 500).bfloat16(), torch.randn(rows, 640).bfloat16()
    with torch.no_grad():
        found, expected = linear(x), F.linear(x, linear.weight, linear.bias)
    assert len(calls) == by_kernel
    assert_same_numbers(found, expected, terms=stored(torch.bfloat16, 640))


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_rows_need_not_be_contiguous(calls, inference):
    linear, x = make_linear(), torch.randn(600, 3).T
    with inference():
        assert_same_numbers(linear(x), F.linear(x, linear.weight, linear.bias), terms=600)
    assert calls == [3]


def test_what_is_not_for_the_kernel_goes_to_pytorch(calls):
    linear, x = make_linear(), torch.randn(2, 600)
    assert linear(x).grad_fn is not None  # gradients are wanted
    with torch.no_grad():
        linear(torch.randn(200, 600))  # many rows
        make_linear(torch.bfloat16)(torch.randn(8, 600).bfloat16())  # too many where tiles do not fit
        linear(x[:0])
        EmoLinear(8, 8)(torch.randn(1, 8))  # few weights
        make_linear(torch.float64)(x.double())
        make_linear(torch.float16)(x.half())
        turned = make_linear()
        turned.weight = nn.Parameter(torch.randn(600, 500).T)
        turned(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16
        linear.to("meta")(x.to("meta"))
    assert calls == []


def test_pytorch_refuses_shapes_that_do_not_fit(calls):
    """The kernel would read past the end of the weights."""
    weight = torch.randn(500, 600)
    with torch.no_grad():
        for shape in [(1, 6000), (1, 60), (6000,)]:
            with pytest.raises(RuntimeError, match="shapes|size"):
                EmoLinear.product(torch.randn(shape), weight)
        with pytest.raises(RuntimeError):
            EmoLinear.product(torch.randn(1, 600), weight, torch.randn(3))
        bias = torch.randn(1000)[::2]
        found = EmoLinear.product(torch.zeros(1, 600), weight, bias)
    assert torch.equal(found[0], bias)
    assert calls == []


def test_quantised_weights_go_to_pytorch(calls):
    quantization = pytest.importorskip("torchao.quantization")
    linear = make_linear(torch.bfloat16, bias=False)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        assert linear(torch.randn(1, 600).bfloat16()).shape == (1, 500)
    assert calls == []


def test_a_model_decodes_the_same_with_and_without(make_model, calls, monkeypatch):
    model = make_model(vocab_size=600, hidden_size=512, intermediate_size=16, num_hidden_layers=2)
    ids = torch.randint(2, 600, (1, 40))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        found = model(ids[:, :1], past_key_values=cache).logits
        assert calls == [1] * 9  # q, k, v and o of two layers, and the head
        monkeypatch.setattr(package, "hooks", None)
        cache = model(ids, use_cache=True).past_key_values
        expected = model(ids[:, :1], past_key_values=cache).logits
    assert_same_numbers(found, expected, terms=network_terms(model.config, 41))


def test_a_router_of_many_experts_uses_it(calls):
    config = EmoConfig(hidden_size=512, num_experts=512, num_experts_per_tok=4)
    router = EmoTopKRouter(config, config.layer_experts[0])
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 512)
    with torch.no_grad():
        found = router(x)[0]
    assert calls == [2]
    assert_same_numbers(found, F.linear(x, router.weight).detach(), terms=512)


def test_adapters_on_it_train(make_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    ids = torch.randint(2, 96, (1, 6))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)


class TestBetweenTheProducts:
    @pytest.fixture
    def compiled(self, monkeypatch):
        """Names of what the compiled code computed."""
        kernels, seen = find_kernels(), []
        for name in ("rms_norm", "rotate"):
            run = getattr(kernels, name)
            monkeypatch.setattr(
                kernels, name, lambda *args, run=run, name=name: seen.append(name) or run(*args)
            )
        return seen

    @pytest.fixture
    def plainly(self, monkeypatch):
        """Runs a function without compiled code."""

        def run(function, *args):
            with monkeypatch.context() as patch:
                patch.setattr(package, "hooks", None)
                return function(*args)

        return run

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(1, 1, 70), (2, 5, 64), (3, 2048)])
    def test_norms_are_those_of_pytorch(self, compiled, plainly, dtype, shape):
        norm = EmoRMSNorm(shape[-1]).to(dtype)
        torch.nn.init.normal_(norm.weight)
        x = (3 * torch.randn(shape)).to(dtype)
        with torch.no_grad():
            found = norm(x)
            assert compiled == ["rms_norm"] and found.dtype == dtype
            assert_same_numbers(found, plainly(norm, x), terms=stored(dtype, shape[-1], times=2))
            turned = x.transpose(0, -2).contiguous().transpose(0, -2)
            assert torch.equal(norm(turned), found)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("batch", [1, 3])  # each sequence may have positions of its own
    def test_rotations_are_those_of_pytorch(self, compiled, plainly, dtype, batch):
        rotary = EmoRotaryEmbedding(EmoConfig(hidden_size=4 * 36, num_attention_heads=4))
        states = torch.randn(3, 7, 4, 36).to(dtype), torch.randn(3, 7, 2, 36).to(dtype)
        positions = torch.arange(7)[None] + torch.tensor([0, 90, 5])[:batch, None]
        cos, sin = rotary(states[0], positions)
        with torch.no_grad():
            found = _rotate_both(*states, cos, sin)
            assert compiled == ["rotate"] * 2
            expected = plainly(_rotate_both, *states, cos, sin)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and one.dtype == dtype
            assert_same_numbers(one, other, terms=stored(dtype, 2, times=5))

    def test_what_is_not_for_it_goes_to_pytorch(self, compiled):
        norm = EmoRMSNorm(64)
        assert norm(torch.randn(2, 64)).grad_fn is not None
        states, angles = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 8)
        with torch.no_grad():
            norm(torch.randn(2, 64).bfloat16())  # two dtypes
            norm(torch.randn(0, 64))
            norm.double()(torch.randn(2, 64).double())
            _rotate_both(states, states, angles.bfloat16(), angles.bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                _rotate_both(states, states, angles, angles)
        assert compiled == []
