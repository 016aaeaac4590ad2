"""Products with weights in 8 and 4 bits, for every instruction set, against exact ones in float64."""

import ctypes
import mmap
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import tolerance
from torch.utils.flop_counter import FlopCounterMode
from transformers_emo.modeling_emo.kernels.native_library import find_kernels, runnable_sets
from transformers_emo.modeling_emo.kernels.packed import packed_products
from transformers_emo.modeling_emo.kernels.packed.packed_kernels import fits, load_packed_kernels
from transformers_emo.modeling_emo.kernels.packed.packed_products import (
    packed_experts,
    packed_linear,
    unpacked,
)
from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight

KERNELS = find_kernels()
needs_kernels = pytest.mark.skipif(KERNELS is None, reason="no compiled kernels")
_CHOSEN = os.environ.get("EMO_KERNELS")
VARIANTS = [] if KERNELS is None else [_CHOSEN] if _CHOSEN else runnable_sets()
# The compiled ones, and PyTorch's products.
WAY = pytest.mark.parametrize("way", [*VARIANTS, None], ids=str)
VARIANT = pytest.mark.parametrize("variant", VARIANTS)
DTYPES = [torch.float32, torch.bfloat16]
WEIGHT = {
    "bits": st.sampled_from([4, 8]),
    "group": st.sampled_from([32, 64, 128]),
    "zeros": st.sampled_from(["none", "any", "least", "most"]),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 99),
}
EITHER_MODE = pytest.mark.usefixtures("either_mode")
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def run_by(monkeypatch):
    """Makes products run by an instruction set, or by PyTorch."""

    def choose(way):
        kernels = None if way is None else load_packed_kernels(way)
        monkeypatch.setattr(packed_products, "find_packed_kernels", lambda: kernels)

    return choose


@pytest.fixture(params=[True, False], ids=["training", "inference"])
def either_mode(request):
    """Runs a test twice: where gradients are recorded, and where none are."""
    with torch.set_grad_enabled(request.param):
        yield


def random_packed(*shape, bits=4, group=32, zeros="none", dtype=torch.float32, scale=0.02) -> PackedWeight:
    """Any numbers, scales within a factor of 4 of each other, and zero points any or at an end."""
    parts = (*shape[:-1], shape[-1] // group)
    packed = torch.randint(-(2**31), 2**31, (*shape[:-1], shape[-1] * bits // 32)).to(torch.int32)
    most = 2**bits - 1
    low, high = {"any": (0, most), "least": (0, 0), "most": (most, most), "none": (0, 0)}[zeros]
    zero = None if zeros == "none" else torch.randint(low, high + 1, parts).to(torch.uint8)
    scales = (scale * 2 ** (2 * torch.rand(parts) - 1)).to(dtype)
    return PackedWeight(packed, scales, zero, bits, group)


def assert_near(found, expected, terms, dtype):
    """`terms`: how long the vectors of summed terms are, whose sum may be small by chance."""
    assert found.dtype == dtype and found.shape == expected.shape
    if expected.numel() == 0:
        return
    # In bfloat16 the result is rounded, and the activations of experts before it; all else is float32.
    scale = float(torch.maximum(terms, expected.abs()).max())
    slack = tolerance(expected, terms=3, dtype=dtype, scale=scale) + 3e-6 * scale
    torch.testing.assert_close(found.double(), expected, atol=slack, rtol=0)


def rounds(dtype, bits) -> bool:
    """Whether activations are rounded to 8 bits."""
    kernels = packed_products.find_packed_kernels()
    is_training = torch.is_grad_enabled()
    return dtype == torch.bfloat16 and not is_training and kernels is not None and kernels.has_bytes(bits)


def multiplied(x, bits):
    """The activations that are multiplied, in float64: as they are, or as whole numbers and scales."""
    if not rounds(x.dtype, bits) or x.numel() == 0:
        return x.double()
    groups = x.float().unflatten(-1, (-1, 32))
    unit = groups.abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-110) / 127
    return ((groups.double() * (1 / unit).double()).round() * unit.double()).flatten(-2)


def linear_in_float64(x, weight, bias=None):
    exact, x = weight.dequantise(torch.float64), multiplied(x, weight.bits)
    bias = None if bias is None else bias.double()
    terms = (x.square() @ exact.square().mT).sqrt()
    return F.linear(x, exact, bias), terms if bias is None else terms + bias.abs()


def experts_in_float64(x, gate_up, down, weights, index):
    """The output, and how long the vectors are whose numbers are summed for it."""
    dtype, x, weights = x.dtype, multiplied(x, down.bits), weights.double()
    first, second = gate_up.dequantise(torch.float64), down.dequantise(torch.float64)
    out, squares = torch.zeros_like(x), torch.zeros_like(x)
    for expert in range(len(second)):
        token, slot = torch.where(index == expert)
        gate, up = (x[token] @ first[expert].T).chunk(2, dim=-1)
        act, weight = F.silu(gate) * up, weights[token, slot, None]
        if rounds(dtype, down.bits):
            act = multiplied(act.to(dtype), down.bits)
        out.index_add_(0, token, act @ second[expert].T * weight)
        squares.index_add_(0, token, act.square() @ second[expert].square().T * weight.square())
    return out, squares.sqrt()


@EITHER_MODE
@WAY
@FEW
@given(
    rows=st.one_of(st.integers(0, 9), st.integers(10, 40)),
    groups=st.one_of(st.integers(1, 6), st.sampled_from([9, 16, 33])),
    outputs=st.one_of(st.integers(1, 40), st.just(97)),
    has_bias=st.booleans(),
    **WEIGHT,
)
def test_linear_is_near_float64(run_by, way, rows, groups, outputs, has_bias, seed, dtype, **kind):
    run_by(way)
    torch.manual_seed(seed)
    weight = random_packed(outputs, groups * kind["group"], dtype=dtype, **kind)
    x = torch.randn(rows, weight.shape[1]).to(dtype)
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    assert_near(packed_linear(x, weight, bias), *linear_in_float64(x, weight, bias), dtype)


@WAY
@pytest.mark.parametrize("has_bias", [False, True])
def test_many_rows_by_copies_of_some_outputs_at_a_time(run_by, monkeypatch, way, has_bias):
    run_by(way)
    monkeypatch.setattr(packed_products, "_OUTPUTS_AT_ONCE", 5)
    torch.manual_seed(0)
    weight = random_packed(13, 64, bits=8, dtype=torch.bfloat16)
    x = torch.randn(2, 20, 64).bfloat16()
    bias = torch.randn(13).bfloat16() if has_bias else None
    expected = F.linear(x.double(), weight.dequantise(torch.float64), None if bias is None else bias.double())
    assert torch.allclose(packed_linear(x, weight, bias).double(), expected, atol=0.2, rtol=0.02)


@EITHER_MODE
@VARIANT
@pytest.mark.parametrize("activations", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 33])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_may_be_of_another_dtype_and_of_whole_rows(run_by, variant, activations, rows, bits):
    run_by(variant)
    torch.manual_seed(rows)
    for inputs, group, scales in ((1152, 32, 0), (1152, 64, 1), (256, 256, 0), (384, 384, 1), (64, 64, 0)):
        dtype = DTYPES[scales]
        weight = random_packed(21, inputs, bits=bits, group=group, dtype=dtype)
        assert fits(weight)
        x = torch.randn(rows, inputs).to(activations)
        assert_near(packed_linear(x, weight), *linear_in_float64(x, weight), activations)


@EITHER_MODE
@WAY
@FEW
@given(
    tokens=st.one_of(st.integers(0, 12), st.sampled_from([31, 64, 120])),
    experts=st.integers(1, 6),
    groups=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    data=st.data(),
    **WEIGHT,
)
def test_experts_are_near_float64(run_by, way, tokens, experts, groups, data, seed, dtype, **kind):
    """Experts of no token and of all; picks of other ranks."""
    run_by(way)
    torch.manual_seed(seed)
    hidden, width = (number * kind["group"] for number in groups)
    gate_up = random_packed(experts, 2 * width, hidden, dtype=dtype, scale=0.01, **kind)
    down = random_packed(experts, hidden, width, dtype=dtype, scale=0.01, **kind)
    top_k = data.draw(st.integers(1, experts))
    index = torch.rand(tokens, experts + 1).argsort(dim=1)[:, :top_k]
    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
    found = packed_experts(x, gate_up, down, weights, index)
    assert_near(found, *experts_in_float64(x, gate_up, down, weights, index), dtype)


@EITHER_MODE
@VARIANT
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_the_same_bits_for_any_number_of_threads(run_by, variant, dtype):
    run_by(variant)
    torch.manual_seed(0)
    gate_up, down = random_packed(5, 256, 128, dtype=dtype), random_packed(5, 128, 128, dtype=dtype)
    head = random_packed(700, 1024, dtype=dtype)
    threads = torch.get_num_threads()
    for tokens in (1, 7, 90):
        index = torch.rand(tokens, 6).argsort(dim=1)[:, :3]
        x, rows, weights = (
            torch.randn(tokens, 128).to(dtype),
            torch.randn(tokens, 1024).to(dtype),
            torch.rand(tokens, 3),
        )
        found = []
        try:
            for number in (1, 2, 3, 1):
                torch.set_num_threads(number)
                found.append((packed_experts(x, gate_up, down, weights, index), packed_linear(rows, head)))
        finally:
            torch.set_num_threads(threads)
        assert all(
            torch.equal(one, first) for pair in found for one, first in zip(pair, found[0], strict=True)
        )


@EITHER_MODE
@WAY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_is_not_lost(run_by, way, dtype, rows, bits):
    """Not in the activations, where the weight is zero too, nor in the scales. Other rows do not see it."""
    run_by(way)
    torch.manual_seed(0)
    for zeros in ("none", "any"):
        weight = random_packed(9, 160, bits=bits, dtype=dtype, zeros=zeros)
        nothing = 0x88888888 if bits == 4 else 0x80808080
        middle = PackedWeight(torch.full_like(weight.packed, nothing - 2**32), weight.scale, None, bits, 32)
        for value in (float("inf"), float("-inf"), float("nan")):
            for place in (0, 33, 159):
                x = torch.randn(rows, 160).to(dtype)
                expected = packed_linear(x, weight)
                x[rows // 2, place] = value
                found = packed_linear(x, weight)
                assert not found[rows // 2].isfinite().any()
                others = torch.arange(rows) != rows // 2
                assert torch.equal(found[others], expected[others])
                assert not packed_linear(x, middle)[rows // 2].isfinite().any()
        weight.scale[4, 2] = float("nan")
        found = packed_linear(torch.randn(rows, 160).to(dtype), weight)
        assert found[:, 4].isnan().all() and found[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@EITHER_MODE
@WAY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_zeros_and_of_very_large_and_small_numbers(run_by, way, dtype, rows, bits):
    run_by(way)
    torch.manual_seed(rows)
    for zeros in ("none", "most"):
        weight = random_packed(17, 224, bits=bits, dtype=dtype, zeros=zeros)
        for sizes in ((0, 0), (1e30, 1), (1e30, 1e-30), (1e-30, 1e-36), (0, 1e-38), (1e-44, 1)):
            x = torch.randn(rows, 224) * torch.tensor([sizes[k // 32 % 2] for k in range(224)])
            x = x.to(dtype)
            expected, terms = linear_in_float64(x, weight)
            found = packed_linear(x, weight)
            assert found.isfinite().all()
            # Activations below the least normal number may count as nothing.
            least = torch.finfo(torch.float32).tiny * float(weight.dequantise().abs().sum(dim=1).max())
            scale = float(torch.maximum(terms, expected.abs()).max())
            slack = tolerance(expected, terms=3, scale=scale, dtype=dtype) + 3e-6 * scale + least
            torch.testing.assert_close(found.double(), expected, atol=slack, rtol=0)
        for size in (1e-35, 1e25):
            scaled = PackedWeight(
                weight.packed, (weight.scale.double() * size).to(dtype), weight.zero, bits, 32
            )
            x = torch.randn(rows, 224).to(dtype)
            assert_near(packed_linear(x, scaled), *linear_in_float64(x, scaled), dtype)


@WAY
def test_views_are_taken_by_value(run_by, way):
    run_by(way)
    torch.manual_seed(0)
    weight = random_packed(70, 192)
    x = torch.randn(192, 6).T
    expected, terms = linear_in_float64(x, weight)
    assert not x.is_contiguous()
    assert_near(packed_linear(x, weight), expected, terms, torch.float32)
    shape = 2, 3, 70
    found = packed_linear(x.reshape(2, 3, 192), weight)
    assert_near(found, expected.view(shape), terms.view(shape), torch.float32)
    assert_near(packed_linear(x[0], weight), expected[0], terms[0], torch.float32)
    negated = torch._neg_view(x)
    assert_near(packed_linear(negated, weight), -expected, terms, torch.float32)
    cut = PackedWeight(weight.packed[::2], weight.scale[::2], None, 4, 32)
    assert_near(packed_linear(x, cut), expected[:, ::2], terms[:, ::2], torch.float32)
    doubled = torch.stack([x, x], dim=1)[:, 0]
    gate_up, down = random_packed(3, 128, 192), random_packed(3, 192, 64)
    index, weights = torch.tensor([[0, 1, 2, 3, 2, 1]]).T, torch.rand(1, 6).T
    expected = experts_in_float64(x, gate_up, down, weights, index)
    assert_near(packed_experts(doubled, gate_up, down, weights, index), *expected, torch.float32)


@EITHER_MODE
@VARIANT
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by Linux's own numbers")
@pytest.mark.parametrize(
    ("rows", "inputs", "group"), [(1, 96, 32), (4, 1056, 32), (3, 192, 64), (12, 160, 32)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_around_the_weights_is_read(run_by, variant, rows, inputs, group, bits):
    """Numbers, scales and zeros each end where a forbidden page begins, and begin after one."""
    run_by(variant)
    torch.manual_seed(inputs)
    page, protect = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True).mprotect

    def placed(tensor, at_end):
        middle = -(-tensor.nbytes // page) * page
        block = mmap.mmap(-1, middle + 2 * page)
        memory = (ctypes.c_char * len(block)).from_buffer(block)
        for start in (0, page + middle):
            address = ctypes.c_void_p(ctypes.addressof(memory) + start)
            assert protect(address, ctypes.c_size_t(page), 0) == 0  # PROT_NONE
        start = page + (middle - tensor.nbytes if at_end else 0)
        found = torch.frombuffer(memory, dtype=tensor.dtype, offset=start, count=tensor.numel())
        return found.view_as(tensor).copy_(tensor)

    for dtype in DTYPES:
        weight = random_packed(23, inputs, bits=bits, group=group, zeros="any", dtype=dtype)
        x = torch.randn(rows, inputs).to(dtype)
        expected = packed_linear(x, weight)
        for at_end in (False, True):
            moved = weight.map(lambda tensor, at_end=at_end: placed(tensor, at_end))
            assert torch.equal(packed_linear(x, moved), expected)
            assert torch.equal(unpacked(moved, dtype), weight.dequantise(dtype))


@WAY
@FEW
@given(
    outputs=st.integers(1, 9),
    groups=st.integers(1, 9),
    to=st.sampled_from([*DTYPES, torch.float16]),
    **WEIGHT,
)
def test_unpacked_is_dequantised(run_by, way, outputs, groups, to, seed, **kind):
    run_by(way)
    torch.manual_seed(seed)
    weight = random_packed(2, outputs, groups * kind["group"], **kind)
    assert torch.equal(unpacked(weight, to), weight.dequantise(to))


@WAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_of_a_linear_layer(run_by, way, dtype):
    run_by(way)
    torch.manual_seed(0)
    weight = random_packed(40, 96, dtype=torch.float32, zeros="any")
    x, bias = torch.randn(2, 3, 96).to(dtype), torch.randn(40).to(dtype)
    grad = torch.randn(2, 3, 40).to(dtype)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, bias)]
    found = torch.autograd.grad(packed_linear(inputs[0], weight, inputs[1]), inputs, grad)
    exact = weight.dequantise(torch.float64)
    assert_near(found[0], grad.double() @ exact, (grad.double().square() @ exact.square()).sqrt(), dtype)
    assert_near(found[1], grad.double().sum((0, 1)), grad.double().square().sum((0, 1)).sqrt(), dtype)


@WAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_of_experts(run_by, way, dtype):
    run_by(way)
    torch.manual_seed(1)
    gate_up, down = (
        random_packed(4, 128, 96, bits=8, scale=0.001),
        random_packed(4, 96, 64, bits=8, scale=0.001),
    )
    index = torch.rand(9, 5).argsort(dim=1)[:, :2]  # an expert more than there are: of another rank
    x, weights, grad = torch.randn(9, 96).to(dtype), torch.rand(9, 2), torch.randn(9, 96).to(dtype)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weights)]
    found = torch.autograd.grad(packed_experts(inputs[0], gate_up, down, inputs[1], index), inputs, grad)
    exact = [tensor.double().requires_grad_() for tensor in (x, weights)]
    out, _ = experts_in_float64(exact[0], gate_up, down, exact[1], index)
    for one, other in zip(found, torch.autograd.grad(out, exact, grad.double()), strict=True):
        scale = float(other.abs().max())
        slack = tolerance(other, terms=9, dtype=dtype, scale=scale) + 1e-5 * scale
        torch.testing.assert_close(one.double(), other, atol=slack, rtol=0)


def test_gradients_are_differentiable():
    torch.manual_seed(0)
    weight, x = random_packed(8, 32), torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: packed_linear(x, weight).square(), x)
    gate_up, down = random_packed(2, 64, 32), random_packed(2, 32, 32)
    weights, index = torch.rand(3, 1, dtype=torch.float64, requires_grad=True), torch.tensor([[0], [1], [2]])
    assert torch.autograd.gradgradcheck(lambda x, w: packed_experts(x, gate_up, down, w, index), (x, weights))


def test_the_operators_keep_the_rules_of_operators():
    torch.manual_seed(0)
    weight, x = random_packed(70, 64, zeros="any"), torch.randn(3, 64, requires_grad=True)
    bias = torch.randn(70, requires_grad=True)
    ops = torch.ops.transformers_emo
    parts = weight.packed, weight.scale, weight.zero
    torch.library.opcheck(ops.packed_linear, (x, parts, (4, 32), bias, False))
    torch.library.opcheck(ops.unpacked, (parts, (4, 32), torch.bfloat16))
    gate_up, down = random_packed(3, 128, 64), random_packed(3, 64, 64, group=64)
    weights, index = torch.rand(3, 2, requires_grad=True), torch.tensor([[0, 1], [1, 2], [2, 3]])
    parts = ((gate_up.packed, gate_up.scale), (4, 32), (down.packed, down.scale), (4, 64))
    torch.library.opcheck(ops.packed_experts, (x, *parts, weights, index, False))


def test_compiled_graphs_give_the_same():
    torch._dynamo.reset()
    torch.manual_seed(0)
    weight, x = random_packed(70, 64), torch.randn(3, 64)
    compiled = torch.compile(lambda x: packed_linear(x, weight) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), packed_linear(x, weight) + 1)


@VARIANT
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_rounded_only_where_no_gradients_are_recorded(run_by, variant, bits):
    """Beside a number of 1000 a 1 is nothing in 8 bits. The other group of 32 has a scale of its own."""
    run_by(variant)
    torch._dynamo.reset()
    weight, x = PackedWeight.quantise(torch.ones(2, 64), bits, 32), torch.ones(5, 64).bfloat16()
    x[:, 7] = 1000
    compiled = torch.compile(lambda x: packed_linear(x, weight), backend="eager", fullgraph=True)
    for call in (lambda x: packed_linear(x, weight), compiled):
        assert (call(x) == 1064).all()  # 1063 in bfloat16
        with torch.no_grad():
            assert (call(x) == (1032 if load_packed_kernels(variant).has_bytes(bits) else 1064)).all()
        assert (call(x.clone().requires_grad_()) == 1064).all()


@VARIANT
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_gives_the_same_alone_and_among_others(run_by, variant, bits):
    """But for the order of sums: in bfloat16 the last bit may differ."""
    run_by(variant)
    torch.manual_seed(0)
    weight = random_packed(33, 256, bits=bits, zeros="any", dtype=torch.bfloat16)
    x = torch.randn(21, 256).bfloat16()
    with torch.no_grad():
        together = packed_linear(x, weight).float()
        alone = torch.stack([packed_linear(row, weight) for row in x]).float()
    torch.testing.assert_close(alone, together, rtol=2**-7, atol=1e-5 * float(together.abs().max()))


def test_transforms_and_modes_see_operations():
    torch.manual_seed(0)
    weight, x = random_packed(70, 64), torch.randn(4, 64)
    each = torch.func.vmap(lambda row: packed_linear(row, weight))(x)
    expected, terms = linear_in_float64(x, weight)
    assert_near(each, expected, terms, torch.float32)
    _, tangent = torch.func.jvp(lambda x: packed_linear(x, weight), (x,), (x,))
    assert_near(tangent, expected, terms, torch.float32)
    with FlopCounterMode(display=False) as counter:
        packed_linear(x, weight)
    assert counter.get_total_flops() == 2 * 4 * 64 * 70


def test_autocast_decides_the_dtype():
    torch.manual_seed(0)
    weight, x = random_packed(70, 64), torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed_linear(x, weight)
    assert_near(found, *linear_in_float64(x.bfloat16(), weight), torch.bfloat16)


def test_what_does_not_fit_is_refused():
    weight, gate_up, down = random_packed(8, 64), random_packed(2, 64, 32), random_packed(2, 32, 32)
    with pytest.raises(ValueError, match=r"\(3, 32\)"):
        packed_linear(torch.ones(3, 32), weight)
    with pytest.raises(ValueError, match=r"\(9,\)"):
        packed_linear(torch.ones(3, 64), weight, torch.ones(9))
    index, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"\(3, 64\)"):
        packed_experts(torch.ones(3, 64), gate_up, down, weights, index)
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        packed_experts(torch.ones(3, 32), gate_up, down, weights[:2], index)


@needs_kernels
def test_compiled_code_refuses_what_it_cannot_read():
    kernels, x = load_packed_kernels(), torch.ones(2, 64)
    with pytest.raises(ValueError, match="float16"):
        kernels.linear(x.half(), random_packed(8, 64), None)
    with pytest.raises(ValueError, match="not contiguous"):
        kernels.linear(torch.ones(64, 2).T, random_packed(8, 64), None)
    with pytest.raises(ValueError, match="groups of 32"):
        kernels.linear(torch.ones(2, 48), random_packed(8, 48, group=16), None)
    emptied = random_packed(8, 64)
    emptied.packed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.linear(x, emptied, None)


@needs_kernels
@pytest.mark.parametrize("rows", [8, 64])
def test_many_rows_on_amx_are_multiplied_by_pytorch(monkeypatch, rows):
    """As if the machine had it: the numbers are the same."""
    torch.manual_seed(0)
    kernels = load_packed_kernels()
    monkeypatch.setattr(kernels, "has_tiles", True)
    called = []
    monkeypatch.setattr(
        kernels, "unpack", lambda *args, plain=kernels.unpack: called.append(1) or plain(*args)
    )
    weight, x = random_packed(70, 64, dtype=torch.bfloat16), torch.randn(rows, 64).bfloat16()
    exact = PackedWeight(
        weight.packed, weight.scale.fill_(2**-5), None, 4, 32
    )  # nothing to round when unpacked
    assert_near(packed_linear(x, exact), *linear_in_float64(x, exact), torch.bfloat16)
    assert bool(called) == (rows >= 32)
    gate_up, down = (random_packed(2, *shape, dtype=torch.bfloat16) for shape in ((128, 64), (64, 64)))
    for part in (gate_up, down):
        part.scale.fill_(2**-7)
    index, weights = torch.zeros(rows, 1, dtype=torch.int64), torch.rand(rows, 1)
    found = packed_experts(x, gate_up, down, weights, index)
    expected, terms = experts_in_float64(x, gate_up, down, weights, index)
    assert_near(found, expected, 2 * terms, torch.bfloat16)  # gate and up are rounded too


def test_groups_that_compiled_code_does_not_know_run_too(run_by):
    torch.manual_seed(0)
    for group in (16, 96):
        weight, x = random_packed(8, 192, group=group), torch.randn(3, 192)
        assert not fits(weight)
        assert_near(packed_linear(x, weight), *linear_in_float64(x, weight), torch.float32)
