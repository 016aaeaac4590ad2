"""A model whose forwards take pools where the caller says nothing of pools (`emo run --document-pool`)."""

import pytest
import torch
from transformers import DynamicCache
from transformers_emo.modeling_emo.pools.prompt_pool import cached_pools

POOL = 4
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def model(make_model):
    model = make_model()
    model.model.default_document_pool = POOL
    return model


@pytest.fixture
def plain(make_model):
    return make_model()


def ids_of(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_each_row_is_one_document_and_padding_does_not_count(model, plain):
    rows = [ids_of(1, 9), ids_of(1, 5, seed=1)]
    alone = [plain(row, document_pool=POOL).logits for row in rows]
    assert not torch.allclose(alone[0], plain(rows[0]).logits, atol=1e-3)
    for row, logits in zip(rows, alone, strict=True):
        torch.testing.assert_close(model(row).logits, logits)
    padded = torch.zeros(2, 9, dtype=torch.long)
    padded[0], padded[1, :5] = rows[0], rows[1]
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], alone[0][0])
    torch.testing.assert_close(logits[1, :5], alone[1][0])


def test_an_eos_within_a_row_begins_no_document(model):
    """As in the prompts of `generate`; a conversation may have one after every turn."""
    row = ids_of(1, 8)
    row[0, 3] = model.config.eos_token_id
    model(row, past_key_values=(cache := DynamicCache(config=model.config)))
    generated = model.generate(row, return_dict_in_generate=True, **SETTINGS)
    for ours, theirs in zip(
        cached_pools(cache).outside, cached_pools(generated.past_key_values).outside, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_padding_that_cannot_be_told_is_refused(model, plain):
    with pytest.raises(ValueError, match="pools of 2 rows without a 2-D `attention_mask`.*--batch_size 1"):
        model(ids_of(2, 5))
    plain(ids_of(2, 5))


def test_a_loop_of_forwards_keeps_the_pools_of_its_prompt(model, plain):
    ids = ids_of(1, 7)
    expected = plain.generate(ids, document_pool=POOL, **SETTINGS)
    assert torch.equal(model.generate(ids, **SETTINGS), expected)
    cache, new = DynamicCache(config=model.config), ids
    for _ in range(SETTINGS["max_new_tokens"]):
        new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
    assert torch.equal(ids, expected)


def test_a_cache_of_tokens_read_without_pools_is_refused(model, plain):
    cache = DynamicCache(config=model.config)
    plain(ids_of(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="were read without document pools"):
        model(ids_of(1, 1), past_key_values=cache)


def test_the_choice_of_the_caller_wins(model, plain):
    ids = ids_of(1, 7)
    assert torch.equal(model(ids, document_pool=False).logits, plain(ids).logits)
    torch.testing.assert_close(model(ids, document_pool=6).logits, plain(ids, document_pool=6).logits)
    assert torch.equal(model.generate(ids, document_pool=False, **SETTINGS), plain.generate(ids, **SETTINGS))
    assert torch.equal(
        model.generate(ids, document_pool=6, **SETTINGS), plain.generate(ids, document_pool=6, **SETTINGS)
    )


def test_in_training_and_with_given_documents_each_document_has_a_pool(model, plain):
    ids = ids_of(2, 8)
    ids[0, 4] = model.config.eos_token_id
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]])
    torch.testing.assert_close(
        model(ids, document_ids=documents).logits,
        plain(ids, document_ids=documents, document_pool=POOL).logits,
    )
    loss = model.train()(ids, labels=ids).loss
    torch.testing.assert_close(loss, plain.train()(ids, labels=ids, document_pool=POOL).loss)


def test_generation_that_cannot_keep_pools_refuses(model):
    with pytest.raises(ValueError, match="leave out `--document-pool` of `emo run`"):
        model.init_continuous_batching()
