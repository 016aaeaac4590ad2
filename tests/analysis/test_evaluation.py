"""Losses by document: those of one document at a time, however they are batched."""

import pytest
import torch
from tolerances import assert_same_numbers, network_terms, same_number
from transformers_emo.analysis import document_losses

LENGTHS = (7, 1, 12, 3, 12, 20)


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 96, (length,), generator=generator) for length in LENGTHS]


def naive(model, ids, after=1):
    """Summed loss and right guesses of one document, token by token."""
    loss, correct = 0.0, 0
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    for place in range(after, len(ids)):
        logprobs = logits[place - 1].log_softmax(-1)
        loss -= float(logprobs[ids[place]])
        correct += int(logprobs.argmax()) == int(ids[place])
    return loss, correct


@pytest.mark.parametrize("batch_tokens", [1, 30, 2048])
def test_losses_are_the_same_as_for_each_document_alone(make_model, documents, batch_tokens):
    model = make_model()
    counts = []
    losses = document_losses(model, documents, batch_tokens=batch_tokens, on_batch=counts.append)
    assert sum(counts) == len(documents)
    assert losses.tokens_N.tolist() == [length - 1 for length in LENGTHS]
    expected = [naive(model, ids) for ids in documents]
    assert_same_numbers(losses.loss_N, [loss for loss, _ in expected])
    assert losses.correct_N.tolist() == [correct for _, correct in expected]
    assert losses.loss == same_number(sum(loss for loss, _ in expected) / (sum(LENGTHS) - len(LENGTHS)))
    assert losses.accuracy == sum(correct for _, correct in expected) / (sum(LENGTHS) - len(LENGTHS))


def test_many_logits_are_computed_in_parts(make_model):
    model = make_model(max_position_embeddings=1024)
    ids = torch.arange(700) % 96
    losses = document_losses(model, [ids])
    assert_same_numbers(losses.loss_N, [naive(model, ids)[0]], terms=network_terms(model.config, len(ids)))


def test_experts_are_masked_for_the_call_only(make_model, documents):
    model = make_model()
    subset = [[0, 3, 5, 11], [1, 2, 3, 11], [4, 6, 8, 11]]
    with model.use_experts(subset):
        expected = [naive(model, ids)[0] for ids in documents]
    masked = document_losses(model, documents, expert_subset=subset)
    assert_same_numbers(masked.loss_N, expected)
    assert document_losses(model, documents).loss != masked.loss


def test_first_tokens_can_be_left_out(make_model, documents):
    model = make_model()
    losses = document_losses(model, documents, after=5)
    assert losses.tokens_N.tolist() == [2, 0, 7, 0, 7, 15]
    expected = [naive(model, ids, after=5)[0] for ids in documents]
    assert_same_numbers(losses.loss_N, expected)


def test_the_model_is_in_training_mode_again_afterwards(make_model, documents):
    model = make_model().train()
    losses = document_losses(model, documents)
    assert model.training and losses.loss == document_losses(model.eval(), documents).loss


def test_documents_without_a_token_to_predict_are_refused(make_model):
    with pytest.raises(ValueError, match="No token to predict"):
        document_losses(make_model(), [torch.tensor([5])])
