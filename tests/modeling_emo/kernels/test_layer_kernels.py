"""Compiled layers of inference: who computes, and that nobody notices."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_same_numbers, network_terms
from torch import nn
from torch.autograd import forward_ad
from transformers_emo import EmoConfig
from transformers_emo.modeling_emo.kernels.native_library import find_kernels
from transformers_emo.modeling_emo.modeling_emo import (
    EmoMLP,
    EmoRMSNorm,
    EmoRotaryEmbedding,
    EmoTopKRouter,
    _product,
    _project,
    _rotate_both,
)
from transformers_emo.modeling_emo.package_hooks import package

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


def make_linear(dtype=torch.float32, **kwargs) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(600, 500, **kwargs).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(600,), (1, 600), (2, 1, 600), (3, 600)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_as_near_as_the_dtype(calls, dtype, shape, bias):
    linear = make_linear(dtype, bias=bias)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        found, expected = _project(linear, x), F.linear(x, linear.weight, linear.bias)
    assert len(calls) == 1
    assert_same_numbers(found, expected, terms=stored(dtype, 600))


@pytest.mark.parametrize(
    ("rows", "by_kernel"),
    [
        (6, True),
        (8, KERNELS is not None and (KERNELS.has_tiles or KERNELS.has_panels)),
        (128, KERNELS is not None and KERNELS.has_tiles),
        (129, False),
    ],
)
def test_more_rows_are_for_tiles(calls, rows, by_kernel):
    torch.manual_seed(0)
    linear, x = nn.Linear(640, 500).bfloat16(), torch.randn(rows, 640).bfloat16()
    with torch.no_grad():
        found, expected = _project(linear, x), F.linear(x, linear.weight, linear.bias)
    assert len(calls) == by_kernel
    assert_same_numbers(found, expected, terms=stored(torch.bfloat16, 640))


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_rows_need_not_be_contiguous(calls, inference):
    linear, x = make_linear(), torch.randn(600, 3).T
    with inference():
        assert_same_numbers(_project(linear, x), F.linear(x, linear.weight, linear.bias), terms=600)
    assert calls == [3]


def test_what_is_not_for_the_kernel_goes_to_pytorch(calls):
    linear, x = make_linear(), torch.randn(2, 600)
    assert _project(linear, x).grad_fn is not None  # gradients are wanted
    with torch.no_grad():
        _project(linear, torch.randn(200, 600))  # many rows
        _project(
            make_linear(torch.bfloat16), torch.randn(9, 600).bfloat16()
        )  # too many where tiles do not fit
        _project(linear, x[:0])
        _project(nn.Linear(8, 8), torch.randn(1, 8))  # few weights
        _project(make_linear(torch.float64), x.double())
        _project(make_linear(torch.float16), x.half())
        turned = make_linear()
        turned.weight = nn.Parameter(torch.randn(600, 500).T)
        _project(turned, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert _project(linear, x).dtype == torch.bfloat16
        _project(linear.to("meta"), x.to("meta"))
    assert calls == []


def test_pytorch_refuses_shapes_that_do_not_fit(calls):
    """The kernel would read past the end of the weights."""
    weight = torch.randn(500, 600)
    with torch.no_grad():
        for shape in [(1, 6000), (1, 60), (6000,)]:
            with pytest.raises(RuntimeError, match="shapes|size"):
                _product(torch.randn(shape), weight)
        with pytest.raises(RuntimeError):
            _product(torch.randn(1, 600), weight, torch.randn(3))
        bias = torch.randn(1000)[::2]
        found = _product(torch.zeros(1, 600), weight, bias)
    assert torch.equal(found[0], bias)
    assert calls == []


def test_quantised_weights_go_to_pytorch(calls):
    quantization = pytest.importorskip("torchao.quantization")
    linear = make_linear(torch.bfloat16, bias=False)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        assert _project(linear, torch.randn(1, 600).bfloat16()).shape == (1, 500)
    assert calls == []


def test_a_model_decodes_the_same_with_and_without(make_model, calls, monkeypatch):
    model = make_model(vocab_size=600, hidden_size=512, intermediate_size=16, num_hidden_layers=2)
    ids = torch.randint(2, 600, (1, 40))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        found = model(ids[:, :1], past_key_values=cache).logits
        assert calls == [1]  # the head; the layers are decoded whole, see test_decoding.py
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


class TestPlainLayers:
    """The linear layers are those of PyTorch: tools ask for their class, and what they put there runs."""

    def test_their_class_is_that_which_tools_ask_for(self, make_model):
        model = make_model(num_experts_per_layer=[12, 0, 12], dense_intermediate_size=40)
        named = {name for name, module in model.named_modules() if type(module) is nn.Linear}
        assert len(named) == 3 * 4 + 3 + 1 and "lm_head" in named

    def test_dynamic_quantisation_finds_all_of_them(self, make_model):
        model, ids = make_model(), torch.randint(2, 96, (1, 6))
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        kind = torch.ao.nn.quantized.dynamic.Linear
        found = [module for module in quantised.modules() if type(module) is kind]
        assert len(found) == 3 * 4 + 1
        with torch.no_grad():
            before, after = model(ids).logits, quantised(ids).logits
        assert not torch.equal(after, before)
        assert F.cosine_similarity(after, before, dim=-1).min() > 0.9

    @pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize(
        "how", ["hook", "pre-hook", "global", "forward", "parametrised", "class", "kernel"]
    )
    def test_what_is_put_on_a_layer_runs(self, calls, monkeypatch, how, inference):
        linear, x = make_linear(), torch.randn(1, 600)
        with torch.no_grad():
            expected = F.linear(x, linear.weight, linear.bias)
        handle = None
        if how == "hook":
            linear.register_forward_hook(lambda module, args, output: 2 * output)
        elif how == "pre-hook":
            linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
            expected = expected - linear.bias.detach() / 2
        elif how == "global":
            handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: 2 * output)
        elif how == "forward":
            plain = linear.forward
            linear.forward = lambda input: 2 * plain(input)
        elif how == "parametrised":

            class Double(nn.Module):
                def forward(self, weight):
                    return 2 * weight

            for name in ("weight", "bias"):
                nn.utils.parametrize.register_parametrization(linear, name, Double())
        elif how == "class":
            plain = nn.Linear.forward
            monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 2 * plain(self, input))
        else:
            expected = expected / 2
        try:
            with inference():
                found = _project(linear, x)
        finally:
            if handle is not None:
                handle.remove()
        assert_same_numbers(found, 2 * expected, terms=600)
        assert len(calls) == (how == "kernel")

    def test_adapters_compute_while_decoding(self, calls, make_model):
        peft = pytest.importorskip("peft")
        model = make_model(vocab_size=600, hidden_size=512, intermediate_size=16, num_hidden_layers=1)
        ids = torch.randint(2, 600, (1, 1))
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        with torch.no_grad():
            found = adapted(ids).logits
            expected = adapted.merge_and_unload()(ids).logits
        assert calls  # what has no adapter is computed by the kernel
        assert_same_numbers(found, expected, terms=network_terms(model.config, 1))

    def test_a_pickled_model_decodes_the_same(self, make_model):
        model, ids = make_model(), torch.randint(2, 96, (1, 3))
        again = pickle.loads(pickle.dumps(model))
        assert type(again.lm_head) is nn.Linear
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)

    def test_dense_layers_use_it(self, calls):
        config = EmoConfig(hidden_size=512, dense_intermediate_size=600, dense_mlp_bias=True)
        mlp, x = EmoMLP(config), torch.randn(1, 1, 512)
        with torch.no_grad():
            found = mlp(x)[0]
        assert calls == [1] * 3
        assert_same_numbers(found, mlp(x)[0].detach(), terms=512 + 600)


class TestWhatLooksAtOperations:
    """It cannot see a kernel: PyTorch computes."""

    def test_a_trace_has_the_product(self, calls):
        linear, x = make_linear().requires_grad_(False), torch.randn(1, 600)
        with torch.no_grad():
            traced = torch.jit.trace(lambda input: _project(linear, input), torch.zeros(1, 600))
            assert_same_numbers(traced(x), F.linear(x, linear.weight, linear.bias), terms=600)

    def test_a_recorded_graph_has_the_product(self, calls):
        from torch.fx.experimental.proxy_tensor import make_fx

        linear, x = make_linear(), torch.randn(1, 600)
        with torch.no_grad():
            graph = make_fx(lambda input: _project(linear, input))(torch.zeros(1, 600))
            assert_same_numbers(graph(x), F.linear(x, linear.weight, linear.bias), terms=600)

    def test_operations_are_counted(self):
        from torch.utils.flop_counter import FlopCounterMode

        linear = make_linear()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _project(linear, torch.randn(1, 600))
        assert counter.get_total_flops() == 2 * 600 * 500

    def test_a_mode_replaces_functions(self, calls):
        from torch.overrides import TorchFunctionMode

        class Double(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                output = function(*args, **kwargs or {})
                return 2 * output if function is F.linear else output

        linear, x = make_linear(), torch.randn(1, 600)
        with torch.no_grad():
            expected = _project(linear, x)
            with Double():
                found = _project(linear, x)
            assert_same_numbers(found, 2 * expected, terms=600)

    def test_a_default_device_changes_nothing(self, calls):
        with torch.no_grad(), torch.device("cpu"):
            _project(make_linear(), torch.randn(1, 600))
        assert calls == [1]

    @pytest.mark.parametrize("tangents", ["input", "weight"])
    def test_derivatives_in_forward_mode_are_kept(self, calls, tangents):
        linear, x = make_linear(), torch.randn(1, 600)
        tangent = torch.randn(1, 600) if tangents == "input" else torch.randn(500, 600)
        with torch.no_grad(), forward_ad.dual_level():
            if tangents == "input":
                x = forward_ad.make_dual(x, tangent)
            weight = linear.weight
            if tangents == "weight":
                weight = forward_ad.make_dual(weight.detach(), tangent)
            found = forward_ad.unpack_dual(_product(x, weight)).tangent
        expected = F.linear(tangent, linear.weight) if tangents == "input" else F.linear(x, tangent)
        assert_same_numbers(found, expected.detach(), terms=600)

    def test_transforms_are_kept(self, calls):
        norm, linear = EmoRMSNorm(600), make_linear()
        x, tangent = torch.randn(3, 1, 600), torch.randn(3, 1, 600)

        def run(input):
            return _project(linear, norm(input))

        with torch.no_grad():
            assert_same_numbers(torch.func.vmap(run)(x), run(x), terms=1200)
            found = torch.func.jvp(run, (x,), (tangent,))[1]
        (expected,) = torch.autograd.functional.jvp(run, x, tangent)[1:]
        assert_same_numbers(found, expected.detach(), terms=1200)


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
