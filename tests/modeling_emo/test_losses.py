"""The balance loss against a naive one, and its edge cases."""

import pytest
import reference
import torch
from tolerances import assert_same_numbers
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers_emo.configuration import EmoConfig, LayerExperts
from transformers_emo.modeling_emo import EmoForCausalLM, lm_z_loss, load_balancing_loss
from transformers_emo.modeling_emo.losses import RouterStatistics, cross_entropy_and_z_loss


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("num_items", [None, 50])
def test_loss_is_the_naive_one(shared, num_items):
    torch.manual_seed(0)
    settings = {
        "num_hidden_layers": 3,
        "num_experts": 10,
        "num_experts_per_tok": 4,
        "num_shared_experts": shared,
    }
    logits = [torch.randn(24, 10) for _ in range(3)]
    mask = torch.rand(4, 6) > 0.3
    got = load_balancing_loss(
        logits, EmoConfig(**settings).layer_experts, token_mask=mask, num_items_in_batch=num_items
    )
    expected = reference.balance_loss(settings, [x.double() for x in logits], mask.flatten(), num_items)
    assert_same_numbers(got, expected)


def test_masked_tokens_have_no_influence():
    torch.manual_seed(0)
    layer = LayerExperts(8, 1, (), 3)
    logits, mask = torch.randn(10, 8), torch.arange(10) < 6
    expected = load_balancing_loss([logits[:6]], [layer])
    logits[6:] = 1e4
    assert_same_numbers(load_balancing_loss([logits], [layer], token_mask=mask), expected)


def test_gradient_reaches_routed_logits_only():
    logits = torch.randn(10, 8, requires_grad=True)
    load_balancing_loss([logits], [LayerExperts(8, 2, (), 4)]).backward()
    assert logits.grad[:, :6].abs().sum() > 0 and torch.equal(logits.grad[:, 6:], torch.zeros(10, 2))


def test_batch_without_a_counted_token_has_no_loss():
    logits = torch.randn(4, 8, requires_grad=True)
    loss = load_balancing_loss([logits], [LayerExperts(8, 1, (), 3)], token_mask=torch.zeros(4))
    loss.backward()
    assert loss == 0 and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    "layer", [LayerExperts(8, 1, (), 1), LayerExperts(1, 1, (), 1), LayerExperts(8, 0, (0, 1), 2)]
)
def test_layer_without_a_choice_has_nothing_to_balance(layer):
    assert load_balancing_loss([torch.randn(4, layer.num_experts)], [layer]) == 0


def test_always_active_expert_among_the_shared_ones_is_left_out_once():
    torch.manual_seed(0)
    logits = torch.randn(6, 8)
    loss = load_balancing_loss([logits], [LayerExperts(8, 1, (7,), 3)])
    assert torch.isfinite(loss) and loss > 0


def test_layers_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="router logits of 1 layers and the experts of 2"):
        load_balancing_loss([torch.zeros(2, 4)], [LayerExperts(4, 0, (), 1)] * 2)


def test_autocast_leaves_the_losses_in_float32():
    torch.manual_seed(0)
    layer, logits = LayerExperts(8, 0, (), 3), torch.randn(500, 8)
    found = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            probs = logits.softmax(-1)
            statistics = RouterStatistics.of(logits, probs, probs.topk(3).indices, None)
            found[enabled] = [*statistics, load_balancing_loss([logits], [layer])]
    for expected, value in zip(found[False], found[True], strict=True):
        assert value.dtype == expected.dtype and torch.equal(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(5)])
def test_fused_cross_entropy_and_z_loss_equal_the_two_computed_apart(dtype, num_items):
    torch.manual_seed(0)
    fused = (3 * torch.randn(2, 9, 33)).to(dtype).requires_grad_()
    apart = fused.detach().clone().requires_grad_()
    labels = torch.randint(0, 33, (2, 9))
    labels[0, 3:5] = -100
    losses = cross_entropy_and_z_loss(fused, labels, num_items)
    expected = ForCausalLMLoss(apart, labels, 33, num_items), lm_z_loss(apart, labels, num_items)
    assert_same_numbers(losses, expected)
    (losses[0] + 0.3 * losses[1]).backward()
    (expected[0] + 0.3 * expected[1]).backward()
    assert_same_numbers(fused.grad, apart.grad)


def test_a_loss_function_of_ones_own_is_used_with_pools():
    config = EmoConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=3, document_pool_min=3, document_pool_max=7,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = EmoForCausalLM(config).train()
    ids = torch.randint(2, 32, (1, 12))
    torch.manual_seed(0)
    standard = model(ids, labels=ids)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: (
        2 * ForCausalLMLoss(logits, labels, vocab_size)
    )
    torch.manual_seed(0)
    own = model(ids, labels=ids)
    assert_same_numbers(own.ce_loss, 2 * standard.ce_loss)
    assert_same_numbers(own.lm_z_loss, standard.lm_z_loss)
