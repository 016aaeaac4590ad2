"""Sizes of pools in training: uniform, and of the step, the document and the layer alone."""

import pytest
import torch
from transformers_emo.modeling_emo import draw_pool_sizes, step_seed
from transformers_emo.modeling_emo.pools.document_pool import PoolRequest, document_pools

POOLS = {"document_pool_min": 3, "document_pool_max": 11}
# Two windows of three documents: 1 is the EOS, which opens a document.
IDS = torch.tensor([[5, 6, 1, 7, 8, 1, 9, 10], [5, 6, 1, 7, 9, 1, 11, 12]])


def sizes(model, ids=None, *, seed=0, embeds=None, mask=None, **request) -> torch.Tensor:
    """(L, N), as the model's forward draws them."""
    pools = document_pools(
        model.config,
        PoolRequest(True, **request),
        training=True,
        input_ids=ids,
        position_ids=None,
        attention_mask=mask,
        inputs_embeds=embeds,
        seed=step_seed(0, seed),
    )
    return torch.stack([pool.size_N for pool in pools])


class TestDraws:
    @pytest.mark.parametrize("seed", [0, 1, 2**40])
    def test_they_are_uniform_in_each_layer(self, seed):
        drawn = draw_pool_sizes(torch.arange(8000), 3, 3, 6, seed=step_seed(seed, 0))
        for layer in drawn:
            share = torch.bincount(layer, minlength=7)[3:] / 8000
            assert (share - 0.25).abs().max() < 0.03

    def test_layers_documents_and_steps_are_independent_of_each_other(self):
        documents, seeds = torch.arange(8000), (step_seed(0, 0), step_seed(0, 1))
        one, two = (draw_pool_sizes(documents, 2, 1, 100, seed=seed) for seed in seeds)
        pairs = [(one[0], one[1]), (one[0], two[0]), (one[0, :-1], one[0, 1:])]
        for first, second in pairs:
            correlation = torch.corrcoef(torch.stack([first, second]).double())[0, 1]
            assert abs(correlation) < 0.05  # four standard deviations of chance

    @pytest.mark.parametrize(("smallest", "largest"), [(0, 3), (4, 3)])
    def test_impossible_sizes_are_refused(self, smallest, largest):
        with pytest.raises(ValueError, match="impossible"):
            draw_pool_sizes(torch.arange(1), 1, smallest, largest, seed=step_seed(0, 0))


class TestDocuments:
    def test_what_stands_beside_a_window_does_not_matter(self, make_model):
        model = make_model(**POOLS)
        together = sizes(model, IDS)
        apart = torch.cat([sizes(model, row[None]) for row in IDS], dim=1)
        assert torch.equal(together, apart) and len(together.unique()) > 3

    def test_padding_does_not_matter(self, make_model):
        model = make_model(**POOLS)
        row, zeros = IDS[:1], torch.zeros(1, 3, dtype=torch.int64)
        ones = torch.ones_like(row)
        right = sizes(model, torch.cat([row, zeros], 1), mask=torch.cat([ones, zeros], 1))
        left = sizes(model, torch.cat([zeros, row], 1), mask=torch.cat([zeros, ones], 1))
        assert torch.equal(right[:, :3], sizes(model, row))
        assert torch.equal(left[:, :3], sizes(model, row))

    def test_each_document_step_and_layer_has_its_own(self, make_model):
        model = make_model(**POOLS)
        first = sizes(model, IDS)
        assert not torch.equal(first, sizes(model, IDS, seed=1))
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[:, 2], first[:, 5])  # the third documents of the windows differ
        assert torch.equal(first[:, 0], first[:, 3])  # the first ones are one document, and in one place

    def test_embeddings_tell_documents_where_there_are_no_ids(self, make_model):
        model = make_model(**POOLS)
        documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]]).expand(2, -1)
        embeds = model.get_input_embeddings()(IDS)
        together = sizes(model, embeds=embeds, document_ids=documents)
        apart = [sizes(model, embeds=row[None], document_ids=documents[:1]) for row in embeds]
        assert torch.equal(together, torch.cat(apart, dim=1)) and len(together.unique()) > 3

    def test_a_forward_draws_its_own_seed_where_none_is_set(self, make_model):
        model = make_model(**POOLS).train()
        torch.manual_seed(0)
        drawn = [model(IDS, labels=IDS).document_pool_size.item() for _ in range(8)]
        assert len(set(drawn)) > 4
        model.model.pool_seed = step_seed(0, 0)
        assert len({model(IDS, labels=IDS).document_pool_size.item() for _ in range(3)}) == 1
