"""Ranks that share one model, by every way of Transformers: they compute what one process does, or refuse."""

import parallel_runs
import pytest
import torch
from conftest import tiny_model
from parallel_runs import EXCHANGES, IDS, SUBSET, ways
from ranks import launch
from tolerances import TRAINING, assert_same_numbers, same_number
from transformers.distributed import DistributedConfig
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.modeling_emo.parallel import check_distribution

# Of more experts than the two ranks' sizes of pools could agree on by chance.
MODEL = {"num_experts": 16, "document_pool_min": 3, "document_pool_max": 15}
SHARED = [(way, part) for way in ways(2) for part in (False, True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model(**MODEL).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    launch(parallel_runs.__file__, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder):
    """The model, or a part of it, in one process."""

    def load(part: bool = False):
        return EmoForCausalLM.from_pretrained(folder / "model", expert_subset=SUBSET if part else None)

    return load


class TestTraining:
    @pytest.mark.parametrize(("way", "part"), SHARED)
    def test_losses_and_pools_are_those_of_one_process(self, ranks, alone, way, part):
        expected = parallel_runs.train(alone(part))["losses"]
        for rank in ranks:
            losses = rank[way, part]["losses"]
            assert losses == {name: same_number(value, terms=TRAINING) for name, value in expected.items()}

    @pytest.mark.parametrize(("way", "part"), SHARED)
    def test_gradients_are_those_of_one_process(self, ranks, alone, way, part):
        expected = parallel_runs.train(alone(part))["gradients"]
        for name, gradient in expected.items():
            assert_same_numbers(ranks[0][way, part]["gradients"][name], gradient, terms=TRAINING, name=name)


class TestPipeline:
    def test_it_computes_and_generates_as_one_process(self, ranks, alone):
        model = alone()
        with torch.no_grad():
            logits = model(IDS).logits
        generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
        for rank in ranks:
            assert_same_numbers(rank["pipeline"]["logits"], logits)
            assert torch.equal(rank["pipeline"]["generated"], generated)

    @pytest.mark.parametrize("name", ["document_pool", "labels", "prompt_pool"])
    def test_what_its_stages_would_drop_is_refused_in_all_of_them(self, ranks, name):
        for rank in ranks:
            assert f"this forward asks for `{name}`" in rank["pipeline"]["errors"][name]

    def test_a_stage_is_not_saved_as_if_it_were_the_model(self, ranks, folder):
        for rank in ranks:
            assert "has a part of the layers" in rank["pipeline"]["errors"]["save"]
        assert not (folder / "pipeline").exists()


class TestRefused:
    def test_documents_where_sequences_are_split(self, ranks):
        for rank in ranks:
            assert len(rank["split sequences"]) == 2
            assert all("none sees a whole document" in error for error in rank["split sequences"])

    def test_experts_that_do_not_go_round(self, ranks):
        for rank in ranks:
            assert "layer 0 has 5: load 4 or 6 experts" in rank["odd"]

    def test_only_numbers_that_a_token_can_pick_from_are_named(self):
        config = EmoConfig(num_experts=5, num_experts_per_tok=5)
        settings = (
            {"ep_size": 2, "fsdp_size": 2} if EXCHANGES else {"enable_expert_parallel": True, "tp_size": 2}
        )
        with pytest.raises(ValueError, match="load 6 experts"):
            check_distribution(config, DistributedConfig(**settings))

    def test_heads_that_do_not_go_round(self):
        config = EmoConfig(num_attention_heads=8, num_key_value_heads=2)
        check_distribution(config, DistributedConfig(tp_size=2))
        with pytest.raises(ValueError, match="shares 2 heads of attention among 4"):
            check_distribution(config, DistributedConfig(tp_size=4))
