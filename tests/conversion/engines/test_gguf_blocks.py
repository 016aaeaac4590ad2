"""The blocks of 8 bits that a GGUF is written with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers_emo import CheckpointError
from transformers_emo.conversion.engines.gguf_blocks import q8_0_blocks

gguf = pytest.importorskip("gguf")

_NUMBERS = st.floats(-8e6, 8e6, width=32, allow_subnormal=False)


def _theirs(numbers: torch.Tensor) -> bytes:
    return gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType.Q8_0).tobytes()


@given(st.lists(st.lists(_NUMBERS, min_size=32, max_size=32), min_size=1, max_size=3))
def test_bytes_are_those_of_the_gguf_package(blocks):
    numbers = torch.tensor(blocks).flatten()
    assert q8_0_blocks(numbers).numpy().tobytes() == _theirs(numbers)


def test_bytes_of_many_blocks_are_those_of_the_gguf_package():
    numbers = torch.randn(40_000 * 32, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert q8_0_blocks(numbers).numpy().tobytes() == _theirs(numbers)


def test_halves_are_rounded_away_from_zero():
    numbers = torch.zeros(32)
    numbers[:4] = torch.tensor([127.0, 2.5, -2.5, 0.49999997])
    assert q8_0_blocks(numbers)[2:6].view(torch.int8).tolist() == [127, 3, -3, 0]


def test_zeros_stay_zeros():
    assert not q8_0_blocks(torch.zeros(64)).any()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e7])
def test_numbers_without_a_scale_are_refused(number):
    numbers = torch.ones(64)
    numbers[40] = number
    with pytest.raises(CheckpointError, match=r"blk\.0.* not finite, or too large"):
        q8_0_blocks(numbers, "blk.0.ffn_up_exps.weight")
