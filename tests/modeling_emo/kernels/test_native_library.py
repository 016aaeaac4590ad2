"""The compiled kernels: their numbers, for every instruction set."""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers_emo.modeling_emo.kernels.gradient_memory import empty_gradient
from transformers_emo.modeling_emo.kernels.native_library import find_kernels, load_kernels, runnable_sets

MAPS = Path("/proc/self/maps")
KERNELS = find_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no compiled kernels")
# The one that `EMO_KERNELS` names, or all that run here.
_CHOSEN = os.environ.get("EMO_KERNELS")
VARIANT = pytest.mark.parametrize(
    "variant", [] if KERNELS is None else [_CHOSEN] if _CHOSEN else runnable_sets()
)
DTYPE = st.sampled_from([torch.float32, torch.bfloat16])
# What each operation may be off, relative to the largest number.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2}


def experts_in_float64(x, gate_up, down, weights, index):
    """The output, and gate and up sorted by expert."""
    x, gate_up, down, weights = (tensor.double() for tensor in (x, gate_up, down, weights))
    out, saved = torch.zeros_like(x), []
    for e in range(len(down)):
        token, slot = torch.where(index == e)
        saved.append(x[token] @ gate_up[e].T)
        gate, up = saved[-1].chunk(2, dim=-1)
        out.index_add_(0, token, F.silu(gate) * up @ down[e].T * weights[token, slot, None])
    return out, torch.cat(saved)


def lengths_of_terms(x, gate_up, down, weights, index):
    """How long the vectors are whose numbers are summed: for the output, and for gate and up."""
    x, gate_up, down, weights = (tensor.double() for tensor in (x, gate_up, down, weights))
    out, saved = torch.zeros_like(x), [torch.zeros(0, gate_up.shape[1], dtype=x.dtype)]
    for e in range(len(down)):
        token, slot = torch.where(index == e)
        saved.append(x[token].square() @ gate_up[e].square().T)
        gate, up = (x[token] @ gate_up[e].T).chunk(2, dim=-1)
        squares = (F.silu(gate) * up).square() @ down[e].square().T
        out.index_add_(0, token, squares * weights[token, slot, None].square())
    return out.sqrt(), torch.cat(saved).sqrt()


def assert_near(found, expected, dtype, slack=1, terms=None):
    """`terms`: how long the vectors of summed terms are, where sums may be small by chance."""
    if expected.numel() == 0:
        assert found.shape == expected.shape
        return
    scale = max(each.abs().max().item() for each in (expected, expected if terms is None else terms))
    scale, atol = max(scale, 1e-3), slack * TOLERANCE[dtype]
    torch.testing.assert_close(found.double() / scale, expected / scale, atol=atol, rtol=0)


@st.composite
def expert_calls(draw):
    """Shapes on both sides of every width: of vectors, of tiles, of blocks."""
    experts = draw(st.integers(1, 6))
    width = st.one_of(st.integers(1, 70), st.sampled_from([32, 64, 96, 160]))
    return {
        "tokens": draw(st.one_of(st.integers(0, 12), st.sampled_from([31, 64, 65, 150, 300]))),
        "experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "hidden": draw(st.one_of(width, st.sampled_from([1024, 1056, 2049]))),
        "width": draw(width),
        "dtype": draw(DTYPE),
        "seed": draw(st.integers(0, 99)),
    }


@VARIANT
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(call=expert_calls())
def test_experts_are_near_float64(variant, call):
    generator = torch.Generator().manual_seed(call["seed"])
    tokens, experts, hidden, width = (call[name] for name in ("tokens", "experts", "hidden", "width"))

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(call["dtype"])

    x = random(tokens, hidden)
    gate_up = random(experts, 2 * width, hidden) / hidden**0.5
    down = random(experts, hidden, width) / width**0.5
    # One id more than there are experts: picks of another rank.
    index = (
        torch.rand(tokens, experts + 1, generator=generator).argsort(dim=1)[:, : call["top_k"]].contiguous()
    )
    weights = torch.rand(tokens, call["top_k"], generator=generator)
    expected, expected_saved = experts_in_float64(x, gate_up, down, weights, index)
    terms, saved_terms = lengths_of_terms(x, gate_up, down, weights, index)
    out, saved = load_kernels(variant).experts(x, gate_up, down, weights, index, save=True)
    assert_near(out, expected, call["dtype"], terms=terms)
    assert_near(saved[: len(expected_saved)], expected_saved, call["dtype"], terms=saved_terms)
    again, nothing = load_kernels(variant).experts(x, gate_up, down, weights, index)
    assert torch.equal(again, out) and len(nothing) == 0


@VARIANT
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.one_of(st.integers(0, 12), st.sampled_from([31, 64, 65, 97, 300])),
    experts=st.integers(1, 6),
    data=st.data(),
    hidden=st.sampled_from([32, 96, 160, 544, 1056]),
    width=st.sampled_from([32, 64, 96, 288]),
    wants=st.lists(st.booleans(), min_size=4, max_size=4),
    dtype=DTYPE,
    threads=st.sampled_from([1, 2, 3]),
)
def test_gradients_are_near_float64(variant, tokens, experts, data, hidden, width, wants, dtype, threads):
    """Sizes on both sides of every block; experts of no token and of all; picks of other ranks."""
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(tokens)
    x, grad = (torch.randn(tokens, hidden).to(dtype) for _ in range(2))
    gate_up = (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, width) / width**0.5).to(dtype)
    index = torch.rand(tokens, experts + 1).argsort(dim=1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k)
    inputs = [tensor.double().requires_grad_() for tensor in (x, gate_up, down, weights)]
    out, _ = experts_in_float64(*inputs, index)
    expected = torch.autograd.grad(out, inputs, grad.double(), materialize_grads=True)
    kernels, before = load_kernels(variant), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, saved = kernels.experts(x, gate_up, down, weights, index, save=True)
        found = kernels.experts_backward(grad, x, gate_up, down, weights, index, saved, wants)
    finally:
        torch.set_num_threads(before)
    for gradient, value, wanted in zip(found, expected, wants, strict=True):
        assert (gradient is not None) == wanted
        if wanted:
            assert_near(gradient, value, dtype, slack=10)  # a sum may be small where its terms are large


def test_gradients_of_experts_without_tokens_are_zeros():
    x, gate_up, down = torch.ones(3, 32), torch.ones(4, 64, 32), torch.ones(4, 32, 32)
    index, weights = torch.full((3, 1), 2), torch.ones(3, 1)
    _, saved = KERNELS.experts(x, gate_up, down, weights, index, save=True)
    for again in range(2):  # memory that was used before, too
        _, of_gate_up, of_down, _ = KERNELS.experts_backward(x, x, gate_up, down, weights, index, saved)
        assert not of_gate_up[[0, 1, 3]].any() and not of_down[[0, 1, 3]].any(), again
        assert of_gate_up[2].all() and of_down[2].all()
        of_gate_up.fill_(5)
        of_down.fill_(5)


def test_gradients_without_what_was_saved_are_refused():
    """They would be read past the end of it."""
    x, gate_up, down = torch.ones(3, 32), torch.ones(2, 64, 32), torch.ones(2, 32, 32)
    inputs = x, gate_up, down, torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64)
    _, nothing = KERNELS.experts(*inputs)
    with pytest.raises(ValueError, match="save=True"):
        KERNELS.experts_backward(x, *inputs, nothing)
    _, saved = KERNELS.experts(*inputs, save=True)
    with pytest.raises(ValueError, match=r"\(2, 32\)"):
        KERNELS.experts_backward(x[:2], *inputs, saved)


def test_gradients_of_sizes_that_do_not_fit_are_refused():
    kernels = KERNELS
    x, index, weights = torch.ones(1, 12), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    inputs = x, torch.ones(1, 16, 12), torch.ones(1, 12, 8), weights, index
    with pytest.raises(ValueError, match="12 and 8"):
        kernels.experts_backward(x, *inputs, torch.ones(1, 16))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the process from Linux")
def test_memory_kept_between_calls_has_a_bound():
    """Every call is of another size: all their rooms together would be some 350 MB."""
    kernels, hidden, width, top_k = KERNELS, 32, 288, 8
    gate_up, down = torch.rand(9, 2 * width, hidden), torch.rand(9, hidden, width)

    def call(tokens):
        index = torch.rand(tokens, 9).argsort(dim=1)[:, :top_k].contiguous()
        kernels.experts(torch.rand(tokens, hidden), gate_up, down, torch.rand(tokens, top_k), index)
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    sizes = [call(tokens) for tokens in range(200, 2200, 10)]
    assert sizes[-1] - sizes[0] < 120e6  # the largest call needs some 40 MB


@VARIANT
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by Linux's own numbers")
@pytest.mark.parametrize(("rows", "inputs"), [(5, 1000), (5, 993), (5, 40), (5, 7), (11, 993), (11, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_give_the_same_bits_wherever_they_lie_and_nothing_around_them_is_read(
    variant, rows, inputs, dtype
):
    """Weights begin at a page that follows a forbidden one, or somewhat later, or end where one begins."""
    page, outputs = mmap.PAGESIZE, 37
    torch.manual_seed(inputs)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    size = weight.numel() * weight.itemsize
    middle = -(-(size + 64) // page) * page
    block = mmap.mmap(-1, middle + 2 * page)
    memory = (ctypes.c_char * len(block)).from_buffer(block)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for start in (0, page + middle):
        address = ctypes.c_void_p(ctypes.addressof(memory) + start)
        assert protect(address, ctypes.c_size_t(page), 0) == 0  # PROT_NONE
    kernels = load_kernels(variant)
    expected = kernels.linear(x, weight, None)
    for start in (*range(page, page + 64, weight.itemsize), page + middle - size):
        placed = torch.frombuffer(memory, dtype=dtype, offset=start, count=weight.numel()).view_as(weight)
        placed.copy_(weight)
        assert torch.equal(kernels.linear(x, placed, None), expected), start


@VARIANT
@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 3, 7, 17, 33, 65]),
    inputs=st.one_of(st.integers(1, 80), st.sampled_from([32, 64, 96, 1024, 2049])),
    outputs=st.one_of(st.integers(1, 80), st.just(200)),
    has_bias=st.booleans(),
    dtype=DTYPE,
    seed=st.integers(0, 99),
)
def test_linear_is_near_float64(variant, rows, inputs, outputs, has_bias, dtype, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    expected = F.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    terms = (x.double().square() @ weight.double().square().T).sqrt()
    assert_near(load_kernels(variant).linear(x, weight, bias), expected, dtype, terms=terms)


@VARIANT
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 9),
    heads=st.integers(1, 4),
    half=st.integers(1, 70),
    positions=st.integers(1, 9),
    dtype=DTYPE,
    seed=st.integers(0, 99),
)
def test_norm_and_rotation_are_near_float64(variant, rows, heads, half, positions, dtype, seed):
    torch.manual_seed(seed)
    kernels, width = load_kernels(variant), 2 * half
    x, weight = (3 * torch.randn(rows, heads * width)).to(dtype), torch.randn(heads * width).to(dtype)
    expected = F.rms_norm(x.double(), weight.shape, weight.double(), 1e-6)
    assert_near(kernels.rms_norm(x, weight, 1e-6), expected, dtype)
    states, (cos, sin) = x.view(rows, heads, width), torch.randn(2, positions, width)
    at = torch.arange(rows) % positions
    first, second = states.double().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    expected = states.double() * cos[at, None].double() + turned * sin[at, None].double()
    assert_near(kernels.rotate(states, cos, sin), expected, dtype)


@pytest.mark.parametrize("gate", [-float("inf"), -1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30])
def test_very_large_gates_are_computed_right(gate):
    x = torch.ones(1, 1)
    gate_up = torch.tensor([[[gate], [1.0]]])
    index, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    out, _ = KERNELS.experts(x, gate_up, torch.ones(1, 1, 1), weights, index)
    expected = F.silu(torch.tensor(max(gate, -1e30))).view(1, 1)
    torch.testing.assert_close(
        out if gate > -1e31 else out.nan_to_num(0, 0, 0), expected, atol=1e-6, rtol=1e-6
    )


@VARIANT
def test_products_are_rounded_to_the_nearest_bfloat16(variant):
    """Of one term each, so that the product in float32 is exact. Truncated, half of them would be others."""
    kernels = load_kernels(variant)
    torch.manual_seed(0)
    x_MD, weight_ND = torch.zeros(8, 64).bfloat16(), torch.randn(512, 64).bfloat16()
    x_MD[torch.arange(8), torch.arange(8)] = torch.randn(8).bfloat16()
    exact_MN = torch.stack([x_MD[m, m].float() * weight_ND[:, m].float() for m in range(8)])
    found_MN = kernels.linear(x_MD, weight_ND, None)
    assert torch.equal(found_MN, exact_MN.bfloat16())
    truncated_MN = (exact_MN.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
    assert (found_MN != truncated_MN).float().mean() > 0.4


def test_nan_stays_nan():
    x = torch.full((1, 64), float("nan"))
    index, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = (x, torch.ones(1, 64, 64), torch.ones(1, 64, 32))
        out, _ = KERNELS.experts(*(tensor.to(dtype) for tensor in tensors), weights, index)
        assert out.isnan().all()


def _calls() -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """Every compiled function, with inputs that fit."""
    kernels, x = load_kernels(), torch.randn(3, 32)
    routing = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    experts = [x, torch.randn(4, 64, 32), torch.randn(4, 32, 32), *routing]
    _, saved = kernels.experts(*experts, save=True)
    return {
        "experts": (kernels.experts, experts),
        "experts_backward": (kernels.experts_backward, [torch.randn(3, 32), *experts, saved]),
        "linear": (kernels.linear, [x, torch.randn(5, 32), torch.randn(5)]),
        "rms_norm": (lambda *inputs: kernels.rms_norm(*inputs, 1e-6), [x, torch.randn(32)]),
        "rotate": (kernels.rotate, [torch.randn(3, 2, 16), torch.randn(3, 16), torch.randn(3, 16)]),
    }


def _spoilt() -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    fake = FakeTensorMode()
    yield "on meta", lambda tensor: tensor.to("meta")
    yield "without memory", fake.from_tensor
    yield "not contiguous", lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0]
    yield "float64", lambda tensor: tensor.double()
    yield "int32", lambda tensor: tensor.int()
    yield "a negated view", torch._neg_view


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", ["experts", "experts_backward", "linear", "rms_norm", "rotate"])
def test_inputs_on_other_devices_or_of_other_types_are_refused(name):
    """Compiled code would read at an address of a device, at null, or numbers for other ones."""
    call, inputs = _calls()[name]
    call(*inputs)
    for place in range(len(inputs)):
        for found, spoil in _spoilt():
            spoilt = [*inputs[:place], spoil(inputs[place]), *inputs[place + 1 :]]
            with pytest.raises(ValueError, match=f"do not fit each other.* {found}"):
                call(*spoilt)


@pytest.mark.parametrize(
    "name, place, shape",
    [
        ("linear", 0, (3, 31)),
        ("linear", 1, (5, 33)),
        ("linear", 2, (4,)),
        ("rms_norm", 1, (31,)),
        ("rms_norm", 0, (32,)),
        ("rotate", 0, (3, 32)),
        ("rotate", 1, (3, 15)),
        ("rotate", 2, (2, 16)),
    ],
)
def test_nothing_is_read_past_its_end(name, place, shape):
    call, inputs = _calls()[name]
    inputs[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match="do not fit each other"):
        call(*inputs)


def test_memory_for_gradients_is_where_the_weights_are():
    weight = torch.empty(4096, 4096, device="meta")
    assert empty_gradient(weight).is_meta


# Linux alone says which libraries a process has loaded; the numbers are tested everywhere.
@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists the libraries of a process (/proc/self/maps)")
def test_threads_are_those_of_torch():
    """A second OpenMP in the process would be a second pool, fighting for the same cores."""
    loaded = {line.split()[-1] for line in MAPS.read_text().splitlines() if "omp.so" in line}
    assert len(loaded) == 1
