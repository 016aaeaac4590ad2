"""A packed weight stands where an ordinary one would: it computes as its numbers, and is never written to."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers_emo.modeling_emo.kernels.packed.packed_tensor import PackedTensor
from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight

WAYS = [(8, 32, True), (8, 16, False), (4, 16, True), (4, 32, False)]


def packed(shape=(8, 32), bits=4, group=16, symmetric=True, dtype=torch.float32):
    torch.manual_seed(0)
    return PackedTensor(PackedWeight.quantise(torch.randn(shape).to(dtype), bits, group, symmetric))


def same(first, second):
    parts = first.weight.tensors, second.weight.tensors
    assert parts[0].keys() == parts[1].keys()
    return all(torch.equal(part, parts[1][name]) for name, part in parts[0].items())


@pytest.mark.parametrize(("bits", "group", "symmetric"), WAYS)
def test_a_linear_layer_computes_with_it_and_gives_gradients(bits, group, symmetric):
    weight = packed(bits=bits, group=group, symmetric=symmetric)
    linear = nn.Linear(32, 8)
    linear.weight = weight.as_parameter()
    bias = linear.bias
    x = torch.randn(2, 3, 32, requires_grad=True)
    expected = F.linear(x, weight.dequantize(), bias)
    found = linear(x)
    torch.testing.assert_close(found, expected)
    toward = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, (x, bias), toward),
        torch.autograd.grad(expected, (x, bias), toward),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert linear.weight.grad is None


def test_operations_that_read_see_the_numbers():
    weight, numbers = packed(), packed().dequantize()
    assert weight.shape == numbers.shape and weight.dtype == numbers.dtype
    assert torch.equal(weight.sum(), numbers.sum())
    assert torch.equal(weight + 1, numbers + 1)
    assert torch.equal(torch.ones(2, 8) @ weight, torch.ones(2, 8) @ numbers)
    assert torch.equal(weight.double(), numbers.double()) or weight.double().dtype == torch.float64
    assert torch.equal(weight.int(), numbers.int())
    assert torch.equal(torch.isfinite(weight), torch.isfinite(numbers))
    stack = packed((3, 8, 32))
    assert torch.equal(stack[1].dequantize(), stack.dequantize()[1])
    assert torch.equal(stack[1:].dequantize(), stack.dequantize()[1:])
    lhs, rhs = torch.randn(3, 8, 2, requires_grad=True), torch.randn(3, 2, 32)
    added = torch.baddbmm(stack, lhs, rhs)  # how PEFT adds an adapter
    torch.testing.assert_close(added, torch.baddbmm(stack.dequantize(), lhs, rhs))
    assert torch.autograd.grad(added.sum(), lhs)[0].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.add_(1),
        lambda weight: weight.zero_(),
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.view(-1),
        lambda weight: weight.t(),
        lambda weight: weight.copy_(torch.zeros(8, 32)),
        lambda weight: weight.copy_(packed(bits=8)),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: nn.init.normal_(weight),
    ],
)
def test_operations_that_would_write_are_refused(change):
    weight, before = packed(), packed()
    with pytest.raises(ValueError, match=r"few bits|cannot be copied|was cut"):
        change(weight)
    assert same(weight, before)


def test_it_cannot_be_trained():
    weight = packed().as_parameter()
    with pytest.raises(ValueError, match="cannot be trained.*lora_config"):
        weight.requires_grad_()
    with pytest.raises(ValueError, match="cannot be trained"):
        weight.requires_grad = True
    with pytest.raises(ValueError, match="cannot be trained"):
        nn.Parameter(packed())
    linear = nn.Linear(32, 8)
    linear.weight = weight
    with pytest.raises(ValueError, match="cannot be trained"):
        linear.requires_grad_(True)
    assert not linear.requires_grad_(False).weight.requires_grad


@pytest.mark.parametrize("symmetric", [True, False])
class TestCopies:
    @pytest.fixture
    def linear(self, symmetric):
        linear = nn.Linear(32, 8)
        linear.weight = packed(symmetric=symmetric).as_parameter()
        return linear

    def test_deep_ones_share_nothing(self, linear):
        twin = copy.deepcopy(linear)
        assert isinstance(twin.weight, nn.Parameter) and same(twin.weight, linear.weight)
        twin.weight.weight.packed.zero_()
        assert not same(twin.weight, linear.weight)
        memo = {}
        assert copy.deepcopy(linear.weight, memo) is copy.deepcopy(linear.weight, memo)

    def test_pickled_ones_are_the_same(self, linear):
        twin = pickle.loads(pickle.dumps(linear))
        assert isinstance(twin.weight, nn.Parameter) and same(twin.weight, linear.weight)

    def test_saved_ones_are_read_without_trust(self, linear):
        file = io.BytesIO()
        torch.save(linear.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert same(state["weight"], linear.weight)
        other = nn.Linear(32, 8)
        other.weight = PackedTensor(linear.weight.weight.map(torch.zeros_like)).as_parameter()
        other.load_state_dict(state)
        assert same(other.weight, linear.weight)

    def test_a_state_of_another_kind_is_refused(self, linear):
        with pytest.raises(RuntimeError, match="cannot be copied into"):
            linear.load_state_dict(nn.Linear(32, 8).state_dict())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
    def test_another_dtype_is_that_of_the_scales(self, linear, dtype):
        before = linear.weight.weight
        linear.to(dtype)
        after = linear.weight.weight
        assert isinstance(linear.weight, PackedTensor) and isinstance(linear.weight, nn.Parameter)
        assert linear.weight.dtype == dtype and torch.equal(after.packed, before.packed)
        assert torch.equal(after.scale, before.scale.to(dtype))
        assert linear(torch.ones(2, 32, dtype=dtype)).dtype == dtype
