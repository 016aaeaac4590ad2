"""Expert weights that somebody put in by hand: computed rightly or refused, and never read past their end."""

import pytest
import torch
from tolerances import assert_same_numbers

IDS = torch.tensor([[5, 6, 7, 8]])


def shrunk(tensor, size):
    """A tensor whose memory was given back, all but `size` bytes."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(size)
    return tensor


# What it is the same as, for those that can be computed with.
SAME = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda t: torch.stack([t, -t], dim=1).flatten(0, 1)[::2],
    "in the middle of another": lambda t: torch.cat([t.flatten()] * 2)[3 : 3 + t.numel()].view_as(t),
    "negated view": lambda t: torch._neg_view(-t),
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "float16": lambda t: t.half(),
    "expanded": lambda t: t[:1].expand_as(t),
}
REFUSED = {
    "int8": lambda t: (t * 10).to(torch.int8),
    "uint8": lambda t: (t.abs() * 10).to(torch.uint8),
    "int32": lambda t: (t * 10).int(),
    "bool": lambda t: t > 0,
    "complex64": lambda t: t.to(torch.complex64),
    "float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda t: t.to(torch.float8_e5m2),
    "meta": lambda t: t.to("meta"),
    "fewer experts": lambda t: t[:5].clone(),
    "narrower": lambda t: t[:, :4].clone(),
    "shorter": lambda t: t[..., :4].clone(),
    "one expert": lambda t: t[0].clone(),
    "flat": lambda t: t.flatten().clone(),
    "none": lambda t: t[:0].clone(),
    "half of the memory": lambda t: shrunk(t, t.nbytes // 2),
    "no memory": lambda t: shrunk(t, 0),
}
both = pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
implementations = pytest.mark.parametrize("implementation", ["emo", "emo_sorted"])


def put(model, name, change):
    """Put another tensor in the place of a layer's parameter; parameters cannot be of whole numbers."""
    experts = model.model.layers[0].mlp.experts
    tensor = change(getattr(experts, name).data)
    delattr(experts, name)
    experts.register_buffer(name, tensor)


@both
@all_dtypes
@implementations
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_computed_with_is_refused(make_model, name, dtype, implementation, kind):
    model = make_model(experts_implementation=implementation).to(dtype)
    put(model, name, REFUSED[kind])
    for grad in (False, True):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises((ValueError, RuntimeError), match="do not fit each other|out of bounds"),
        ):
            model(IDS)


@both
@all_dtypes
@implementations
@pytest.mark.parametrize("kind", SAME)
def test_what_can_be_computed_with_gives_the_numbers_of_eager(make_model, name, dtype, implementation, kind):
    model, plain = (make_model(experts_implementation=i).to(dtype) for i in (implementation, "eager"))
    put(model, name, SAME[kind])
    put(plain, name, lambda tensor: SAME[kind](tensor).to(dtype).contiguous())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert_same_numbers(model(IDS).logits, plain(IDS).logits)


def test_other_weights_whose_memory_was_given_back_are_refused(make_model):
    model = make_model(hidden_size=1024, num_attention_heads=8).eval()
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.numel() >= 1 << 18  # so that the kernel runs
    weight.data = shrunk(weight.data, 64)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="without memory|out of bounds"):
        model(IDS)
