"""Adapters that put virtual tokens before a row: documents, pools and losses are those of the row."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers_emo.training import DocumentCollator

POOLS = {"document_pool_min": 3, "document_pool_max": 5}
ROW = [5, 6, 0, 7, 8, 9, 0, 10]


def test_prefix_tuning_trains_within_pools_and_with_their_losses(make_model):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(make_model(**POOLS), config).train()
    ids = torch.tensor([ROW])
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert 3 <= output.document_pool_size <= 5
    assert output.aux_loss is not None and output.router_z_loss is not None
    output.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_documents_behind_a_prefix_do_not_see_each_other(make_model):
    """What stands in the first document does not change the logits of the second; the prefix does."""
    model = make_model(attention_within_documents=True, **POOLS)
    model.model.pool_generator = torch.Generator()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])

    def second_document(first: list[int], prefix: list[int]) -> torch.Tensor:
        model.eval()
        cache = model(torch.tensor([prefix]), use_cache=True).past_key_values
        model.train()
        ids = torch.tensor([[*first, 20, 21, 22]])
        model.model.pool_generator.manual_seed(0)
        return model(ids, labels=ids, past_key_values=cache, document_ids=documents).logits[0, 3:]

    one = second_document([5, 6, 7], [3, 4])
    torch.testing.assert_close(second_document([8, 9, 10], [3, 4]), one)
    assert not torch.allclose(second_document([5, 6, 7], [11, 12]), one)


@pytest.mark.parametrize("document_pool", [None, 4])
def test_prompt_tuning_trains_on_packed_documents_and_generates_within_pools(make_model, document_pool):
    base = make_model(**POOLS)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(base, config).train()
    output = model(**DocumentCollator(base.config)([{"input_ids": ROW}]))
    assert torch.isfinite(output.loss) and 3 <= output.document_pool_size <= 5
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 3, "document_pool": document_pool, "do_sample": False}
    assert model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).shape[1] >= 4


def test_generating_without_a_cache_is_no_training_step(make_model):
    model = make_model(**POOLS).eval()
    ids, options = torch.tensor([ROW]), {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    model.train()
    for _ in range(3):
        assert torch.equal(model.generate(ids, use_cache=False, **options), expected)
