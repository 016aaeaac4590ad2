"""Numbers in words: what is packed is the nearest that so few bits can hold, and is read as it was packed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight, pack, unpack

WAYS = [
    (bits, group, symmetric) for bits in (8, 4) for group in (16, 32, None) for symmetric in (True, False)
]


@given(st.data())
def test_every_number_comes_back_from_its_place(data):
    bits = data.draw(st.sampled_from([4, 8]))
    words = data.draw(st.integers(1, 4))
    numbers = torch.tensor(
        data.draw(
            st.lists(st.integers(0, 2**bits - 1), min_size=words * 32 // bits, max_size=words * 32 // bits)
        ),
        dtype=torch.uint8,
    )
    packed = pack(numbers, bits)
    assert packed.dtype == torch.int32 and torch.equal(unpack(packed, bits), numbers)
    for index, number in enumerate(numbers.tolist()):
        word = packed[index // (32 // bits)].item()
        assert word >> (index % (32 // bits)) * bits & (2**bits - 1) == number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group", "symmetric"), WAYS)
def test_no_number_is_further_off_than_a_step(bits, group, symmetric, dtype):
    torch.manual_seed(0)
    weight = torch.randn(3, 8, 64).to(dtype)
    packed = PackedWeight.quantise(weight, bits, group, symmetric)
    assert packed.shape == weight.shape and packed.dtype == dtype
    assert (packed.zero is None) == symmetric
    assert packed.packed.nbytes * 8 == weight.numel() * bits
    step = packed.scale.float().repeat_interleave(packed.group, dim=-1)
    # A number outside the range that the search has left to a group is cut: it may be further off.
    error = (packed.dequantise(torch.float32) - weight.float()).abs() / step
    assert (error <= 0.51).float().mean() > (0.99 if bits == 8 else 0.9)
    assert error.max() < 4


@pytest.mark.parametrize(("bits", "group", "symmetric"), WAYS)
def test_the_scale_that_is_found_is_better_than_that_of_the_range(bits, group, symmetric):
    torch.manual_seed(1)
    weight = torch.randn(16, 64)
    found = (PackedWeight.quantise(weight, bits, group, symmetric).dequantise() - weight).square().sum()
    groups = weight.view(16, -1, group or 64)
    if symmetric:
        scale, low = groups.abs().amax(-1, keepdim=True) / (2**bits - 1) * 2, 0
        nearest = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    else:
        low = groups.amin(-1, keepdim=True)
        scale = (groups.amax(-1, keepdim=True) - low) / (2**bits - 1)
        nearest = ((groups - low) / scale).round() * scale + low
    plain = (nearest.flatten(-2) - weight).square().sum()
    assert found < plain * (1 if symmetric else 1.15)  # a zero point is a whole number of steps


@pytest.mark.parametrize("bits", [8, 4])
def test_a_single_column_is_packed_along_its_length(bits):
    column = torch.arange(16, dtype=torch.uint8)[:, None]
    assert torch.equal(unpack(pack(column.mT, bits), bits), column.mT)


def test_what_fits_is_kept_exactly():
    weight = (torch.arange(-8, 8) * 0.25).repeat(3, 2)
    assert torch.equal(PackedWeight.quantise(weight, 4, 16).dequantise(), weight)
    weight = (torch.arange(-3, 13) * 0.25).repeat(3, 2)
    assert torch.equal(PackedWeight.quantise(weight, 4, 16, symmetric=False).dequantise(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_is_zeros(symmetric):
    weight = torch.zeros(2, 32)
    weight[1, 16:] = 3.0
    back = PackedWeight.quantise(weight, 4, 16, symmetric).dequantise()
    assert torch.equal(back[0], weight[0]) and not back[1, :16].any()
    assert torch.allclose(back[1, 16:], weight[1, 16:], rtol=0.01)


def test_the_weights_of_a_stack_are_those_of_each_matrix():
    torch.manual_seed(2)
    weight = torch.randn(5, 8, 32)
    stack = PackedWeight.quantise(weight, 4, 16, symmetric=False)
    for number in range(5):
        one = PackedWeight.quantise(weight[number], 4, 16, symmetric=False)
        for name, part in one.tensors.items():
            assert torch.equal(part, stack.tensors[name][number])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_damaged_weights_are_refused(bad):
    weight = torch.zeros(2, 32)
    weight[1, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        PackedWeight.quantise(weight, 4)


def test_impossible_requests_are_refused():
    for bits in (3, 2, 16, "4", True, None):
        with pytest.raises(ValueError, match="expected 8 or 4"):
            PackedWeight.quantise(torch.zeros(2, 32), bits)
    with pytest.raises(ValueError, match="groups of 24"):
        PackedWeight.quantise(torch.zeros(2, 32), 4, 24)
    with pytest.raises(ValueError, match="groups of 4"):
        PackedWeight.quantise(torch.zeros(2, 32), 4, 4)
    with pytest.raises(ValueError, match="floating point"):
        PackedWeight.quantise(torch.zeros(2, 32, dtype=torch.int32), 4)


def test_parts_that_do_not_fit_each_other_are_refused():
    good = PackedWeight.quantise(torch.ones(4, 32), 4, 16, symmetric=False)
    for changes in (
        {"packed": good.packed.long()},
        {"scale": good.scale[:, :1]},
        {"zero": good.zero.int()},
        {"zero": good.zero[:2]},
        {"group": 32},
        {"group": 0},
        {"bits": 8},
    ):
        parts = vars(good) | changes
        with pytest.raises(ValueError, match="do not fit each other"):
            PackedWeight(**parts)
