"""The one tolerance of these tests: no order of sums goes beyond it, and no wrong network stays within it."""

import pytest
import torch
from tolerances import (
    STORED,
    assert_clear_choice,
    assert_other_numbers,
    assert_same_numbers,
    assert_same_scores,
    same_number,
)

IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("terms", [16, 600, 4096])
def test_products_in_float32_are_those_in_float64(terms, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=generator) for shape in ((40, terms), (terms, 40)))
    exact = left.double() @ right.double()
    order = torch.randperm(terms, generator=generator)
    one_by_one = torch.zeros(40, 40)
    for place in order.tolist():
        one_by_one += left[:, place, None] * right[None, place]
    for product in (left @ right, left[:, order] @ right[order], one_by_one):
        assert_same_numbers(product, exact, terms=terms)
    assert_other_numbers((left.bfloat16() @ right.bfloat16()).float(), exact, terms=terms)


@torch.no_grad()
def shared_expert_left_out(model):
    model.model.layers[1].mlp.experts.down_proj[-1] = 0


@torch.no_grad()
def two_experts_swapped(model):
    weight = model.model.layers[2].mlp.experts.down_proj
    weight[[3, 4]] = weight[[4, 3]]


@torch.no_grad()
def gate_and_up_swapped(model):
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))


@torch.no_grad()
def one_matrix_rounded_to_bfloat16(model):
    weight = model.model.layers[2].self_attn.o_proj.weight
    weight.copy_(weight.bfloat16())


def another_base_of_rotations(model):
    model.model.rotary_emb.inv_freq *= 1.01


WRONG = [
    shared_expert_left_out,
    two_experts_swapped,
    gate_and_up_swapped,
    one_matrix_rounded_to_bfloat16,
    another_base_of_rotations,
]


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
@torch.no_grad()
def test_logits_of_a_wrong_network_are_other_numbers(make_model, spoil):
    model, right = make_model(), make_model()
    spoil(model)
    logits, expected = model(IDS).logits, right(IDS).logits
    with pytest.raises(AssertionError):
        assert_same_numbers(logits, expected)
    assert_other_numbers(logits, expected)


@torch.no_grad()
def test_a_position_too_far_makes_other_numbers(make_model):
    model, positions = make_model(), torch.arange(7)[None]
    expected = model(IDS, position_ids=positions).logits
    assert_same_numbers(model(IDS, position_ids=positions + 50).logits, expected)  # distances are the same
    positions[:, 4:] += 1
    assert_other_numbers(model(IDS, position_ids=positions).logits, expected)


@torch.no_grad()
def test_half_precision_is_told_from_another_network(make_model):
    expected = make_model()(IDS).logits
    assert_same_numbers(make_model().bfloat16()(IDS).logits, expected.bfloat16(), terms=STORED)
    wrong = make_model()
    gate_and_up_swapped(wrong)
    with pytest.raises(AssertionError):
        assert_same_numbers(wrong.bfloat16()(IDS).logits, expected.bfloat16(), terms=STORED)


def test_numbers_scores_and_choices_are_told_apart():
    assert same_number(2.5) == 2.5 * (1 + 1e-7) and same_number(2.5) != 2.5 * (1 + 1e-4)
    assert_same_scores([[0.25, None], None], [[0.25 + 1e-8, None], None])
    for other in ([[0.2502, None], None], [[0.25, 0.0], None], [[0.25, None], [0.1, 0.2]]):
        with pytest.raises(AssertionError):
            assert_same_scores([[0.25, None], None], other)
    assert_clear_choice(torch.tensor([[3.0, 2.0, 1.0]]), k=2)
    with pytest.raises(AssertionError, match="choose other inputs"):
        assert_clear_choice(torch.tensor([[3.0, 2.0, 2.000001]]), k=2)
    with pytest.raises(AssertionError, match="shape|and"):
        assert_same_numbers(torch.zeros(2, 1), torch.zeros(1, 2))
