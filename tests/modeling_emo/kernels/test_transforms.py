"""Derivatives of other kinds, transforms and traces: right with our experts, or refused."""

import pytest
import torch
from tolerances import assert_other_numbers, assert_same_numbers, network_terms
from torch.autograd import forward_ad
from transformers_emo import EmoConfig
from transformers_emo.modeling_emo.modeling_emo import EmoExperts

OURS = ["emo", "emo_sorted"]
EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS = 6, 3, 12, 8, 5
IDS = torch.arange(5, 13)[None]
TERMS = 400 * (2 * (HIDDEN + WIDTH + TOP_K) + TOKENS)  # through a sine, and its derivatives


def make_experts(dtype) -> EmoExperts:
    torch.manual_seed(0)
    experts = EmoExperts(EmoConfig(hidden_size=HIDDEN, intermediate_size=WIDTH), EXPERTS).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts.requires_grad_(False)


@pytest.fixture(params=OURS)
def experts(request):
    """Frozen, so that `requires_grad` tells nothing."""
    experts = make_experts(torch.float64)
    experts.config._experts_implementation = request.param
    return experts


def tensors():
    stacks = make_experts(torch.float64).parameters()
    index = torch.rand(TOKENS, EXPERTS).argsort(dim=1)[:, :TOP_K]
    hidden, weights = torch.randn(TOKENS, HIDDEN).double(), torch.rand(TOKENS, TOP_K).double()
    return index, (hidden, weights, *stacks)


def run(experts, index, hidden, weights, gate_up, down):
    changed = {"gate_up_proj": gate_up, "down_proj": down}
    return torch.func.functional_call(experts, changed, (hidden, index, weights))


def by_eager(experts, index):
    """The same by the loop, which PyTorch differentiates in every way."""

    def function(*inputs):
        before = experts.config._experts_implementation
        experts.config._experts_implementation = "eager"
        try:
            return run(experts, index, *inputs)
        finally:
            experts.config._experts_implementation = before

    return function


@pytest.mark.parametrize("inference", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("which", range(4), ids=["hidden", "weights", "gate_up", "down"])
def test_tangents_of_each_input_are_kept(experts, which, inference):
    index, inputs = tensors()
    tangent = torch.randn_like(inputs[which])
    with inference(), forward_ad.dual_level():
        duals = list(inputs)
        duals[which] = forward_ad.make_dual(inputs[which], tangent)
        found = forward_ad.unpack_dual(run(experts, index, *duals)).tangent
    others = by_eager(experts, index)

    def alone(value):
        return others(*inputs[:which], value, *inputs[which + 1 :])

    expected = torch.autograd.functional.jvp(alone, inputs[which], tangent)[1]
    assert found is not None
    assert_same_numbers(found, expected, terms=TERMS)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "jacfwd", "grad of vmap"])
def test_transforms_are_those_of_the_loop(experts, transform, compiled):
    index, inputs = tensors()

    def transformed(function):
        def loss(*values):
            return function(*values).sin().sum()

        if transform == "jvp":
            return lambda *values: torch.func.jvp(function, values, tuple(map(torch.cos, values)))[1]
        if transform == "grad":
            return torch.func.grad(loss, argnums=(0, 1, 2, 3))
        if transform == "vmap":
            return torch.func.vmap(function, in_dims=(0, 0, None, None))
        if transform == "jacfwd":
            return torch.func.jacfwd(loss, argnums=1)
        batched = torch.func.vmap(function, in_dims=(0, 0, None, None))
        return torch.func.grad(lambda *values: batched(*values).sin().sum(), argnums=(0, 3))

    if "vmap" in transform:
        inputs = (torch.stack([inputs[0], -inputs[0]]), torch.stack([inputs[1], 2 * inputs[1]]), *inputs[2:])
        expected_of = by_batches(by_eager(experts, index), transform)
    else:
        expected_of = transformed(by_eager(experts, index))
    ours = transformed(lambda *values: run(experts, index, *values))
    if compiled:
        torch.compiler.reset()
        ours = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found, expected = ours(*inputs), expected_of(*inputs)
    for one, other in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert_same_numbers(one, other, terms=TERMS)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def by_batches(function, transform):
    def one_by_one(hidden, weights, *others):
        return torch.stack([function(h, w, *others) for h, w in zip(hidden, weights, strict=True)])

    if transform == "vmap":
        return one_by_one
    return torch.func.grad(lambda *values: one_by_one(*values).sin().sum(), argnums=(0, 3))


def test_second_derivatives_are_those_of_the_loop(experts):
    index, inputs = tensors()
    vectors = tuple(torch.randn_like(value) for value in inputs)

    def loss(function):
        # The weights depend on the hidden states, as a router's do.
        return lambda hidden, weights, *stacks: (
            function(hidden, weights * hidden[:, :3].cos(), *stacks).sin().sum()
        )

    found = torch.autograd.functional.hvp(loss(lambda *v: run(experts, index, *v)), inputs, vectors)
    expected = torch.autograd.functional.hvp(loss(by_eager(experts, index)), inputs, vectors)
    for one, other in zip(found[1], expected[1], strict=True):
        assert one.any()
        assert_same_numbers(one, other, terms=10 * TERMS)


def test_second_derivatives_leave_frozen_inputs_out(experts):
    index, (hidden, weights, *stacks) = tensors()
    hidden.requires_grad_()
    output = run(experts, index, hidden, weights, *stacks).sin().sum()
    (gradient,) = torch.autograd.grad(output, hidden, create_graph=True)
    (found,) = torch.autograd.grad(gradient.square().sum(), hidden)
    output = by_eager(experts, index)(hidden, weights, *stacks).sin().sum()
    (gradient,) = torch.autograd.grad(output, hidden, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), hidden)
    assert_same_numbers(found, expected, terms=10 * TERMS)


def test_what_is_computed_for_others_does_not_spoil_an_output():
    """An expert that no token takes may overflow."""
    experts = make_experts(torch.float32)
    experts.config._experts_implementation = "emo"
    _, (hidden, weights, *_) = tensors()
    hidden, weights = hidden.float(), weights.float()
    index = torch.tensor([[1, 2, 3]] * TOKENS)
    experts.gate_up_proj[0], experts.down_proj[0] = 1e30, 1e30
    found = torch.func.jvp(lambda x: experts(x, index, weights), (hidden,), (hidden,))
    assert all(part.isfinite().all() for part in found)


def test_picks_of_other_ranks_have_no_tangent(experts):
    index, (hidden, weights, *_) = tensors()
    index = torch.full_like(index, EXPERTS)
    output, tangent = torch.func.jvp(lambda x: experts(x, index, weights), (hidden,), (hidden,))
    assert not output.any() and not tangent.any()


def test_saved_tensors_may_be_packed(experts):
    index, inputs = tensors()
    seen = []

    def pack(tensor):
        seen.append(tensor.shape)
        return tensor.clone()

    gradients = []
    for packing in (False, True):
        hidden = inputs[0].clone().requires_grad_()
        if packing:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
                output = run(experts, index, hidden, *inputs[1:])
        else:
            output = run(experts, index, hidden, *inputs[1:])
        gradients.append(torch.autograd.grad(output.sin().sum(), hidden)[0])
    assert torch.Size([TOKENS, HIDDEN]) in seen and torch.equal(*gradients)


class TestWholeModels:
    @pytest.fixture(params=OURS)
    def model(self, request, make_model):
        model = make_model().requires_grad_(False)
        model.set_experts_implementation(request.param)
        return model

    @pytest.mark.parametrize("inference", [torch.no_grad, torch.enable_grad])
    def test_the_tangent_of_a_loss_is_its_gradient_along_it(self, model, inference):
        """Also without gradients, where compiled layers run."""
        model.set_attn_implementation("eager")  # PyTorch's fused attention refuses forward mode
        torch.manual_seed(0)
        tangents = {name: torch.randn_like(value) for name, value in model.named_parameters()}

        def loss(parameters):
            return torch.func.functional_call(model, parameters, (IDS,), {"labels": IDS}).loss

        with inference(), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(value, tangents[name]) for name, value in model.named_parameters()
            }
            found = forward_ad.unpack_dual(loss(duals)).tangent
        model.requires_grad_(True)
        model(IDS, labels=IDS).loss.backward()
        products = [(value.grad * tangents[name]).sum() for name, value in model.named_parameters()]
        scale = torch.stack(products).abs().sum()
        assert (found - sum(products)).abs() <= 1e-4 * scale and found.abs() > 1e-3 * scale

    def test_a_batch_of_calls_is_a_batch(self, model):
        ids = torch.stack([IDS[0], IDS[0] + 20])
        with torch.no_grad():
            found = torch.func.vmap(lambda row: model(row[None]).logits[0])(ids)
            assert_same_numbers(found, model(ids).logits, terms=network_terms(model.config, ids.numel()))

    @pytest.mark.parametrize("inference", [torch.no_grad, torch.enable_grad])
    def test_a_trace_computes_other_inputs(self, model, inference):
        other = IDS + 20
        with inference():
            traced = torch.jit.trace(lambda ids: model(ids, use_cache=False).logits, IDS)
            found, expected = traced(other), model(other).logits
            assert_same_numbers(found, expected, terms=network_terms(model.config, other.numel()))
            assert_other_numbers(found, model(IDS).logits)
        assert "transformers_emo::" not in str(traced.graph)

    def test_a_trace_of_the_loop_is_refused(self, model):
        model.set_experts_implementation("eager")
        with pytest.raises(RuntimeError, match="`torch.jit.trace` would keep the experts"):
            torch.jit.trace(lambda ids: model(ids, use_cache=False).logits, IDS)
