"""Ranks that share one model, by every way of Transformers: they compute what one process does, or refuse."""

from itertools import product

import parallel_runs
import pytest
import torch
from conftest import tiny_model
from parallel_runs import EXCHANGES, IDS, SUBSET, ways
from ranks import launch
from tolerances import TRAINING, assert_same_numbers, same_number
from transformers.distributed import DistributedConfig
from transformers_emo import EmoConfig, EmoForCausalLM, select_experts
from transformers_emo.modeling_emo.parallel import check_distribution
from transformers_emo.subsets.rewriting.extract import extract_subset
from transformers_emo.subsets.rewriting.write_back import write_back

# Of more experts than the two ranks' sizes of pools could agree on by chance.
MODEL = {"num_experts": 16, "document_pool_min": 3, "document_pool_max": 15}
SHARED = [(way, part) for way in ways(2) for part in (False, True)]
# Those that save together: with older versions only FSDP does.
SAVED = [way for way in ways(2) if EXCHANGES or way == "fsdp"]


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


class TestShares:
    @pytest.mark.parametrize(("way", "part"), SHARED)
    def test_each_rank_reads_what_it_holds_and_no_more(self, ranks, way, part):
        for rank in ranks:
            assert rank[way, part]["read"] <= 1.05 * rank[way, part]["held"]

    @pytest.mark.parametrize("way", SAVED)
    def test_what_they_saved_together_is_read_in_part(self, ranks, folder, alone, way):
        experts = [[0, 3, 4, 7, 15], [0, 4, 7, 9, 15], [3, 4, 7, 9, 15]]
        saved = folder / f"saved {way}"
        model = EmoForCausalLM.from_pretrained(saved, expert_subset=experts)
        expected = EmoForCausalLM.from_pretrained(folder / "model", expert_subset=experts)
        for name, parameter in expected.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name

    @pytest.mark.parametrize("way", SAVED)
    def test_experts_are_chosen_from_what_they_saved_together(self, ranks, folder, alone, way, tmp_path):
        alone(True).save_pretrained(tmp_path)
        choose = {"num_experts": 5, "input_ids": [row.tolist() for row in IDS], "progress": False}
        chosen = [select_experts(place, **choose).experts for place in (folder / f"saved {way}", tmp_path)]
        assert chosen[0] == chosen[1] and len(chosen[0][0]) == 5

    @pytest.mark.parametrize("way", SAVED)
    def test_a_part_of_it_is_extracted(self, ranks, folder, way, tmp_path):
        experts = [[0, 3, 4, 7, 15]] * 3
        extract_subset(folder / f"saved {way}", experts, tmp_path / "part", progress=False)
        model = EmoForCausalLM.from_pretrained(tmp_path / "part")
        expected = EmoForCausalLM.from_pretrained(folder / "model", expert_subset=experts)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))

    @pytest.mark.parametrize("way", SAVED)
    def test_a_part_is_written_back_into_it(self, ranks, folder, way, tmp_path):
        saved, experts = folder / f"saved {way}", [[0, 3, 4, 7, 15]] * 3
        part = EmoForCausalLM.from_pretrained(saved, expert_subset=experts)
        with torch.no_grad():
            part.model.layers[0].mlp.experts.down_proj[:4] += 1
        part.save_pretrained(tmp_path / "part")
        write_back(saved, tmp_path / "part", out=tmp_path / "whole", progress=False)
        model = EmoForCausalLM.from_pretrained(tmp_path / "whole", expert_subset=experts)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), part.parameters(), strict=True))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four ranks")
    tiny_model(**MODEL).save_pretrained(folder / "model")
    launch(parallel_runs.__file__, folder, ranks=4)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(4)]


@pytest.mark.slow
@pytest.mark.skipif(not EXCHANGES, reason="older versions do not combine ways")
class TestFourRanks:
    # Six experts, those of the part, do not go round four ranks. That this is refused is tested below.
    @pytest.mark.parametrize(
        ("way", "part"), [case for case in product(ways(4), [False, True]) if case != ("ep over all", True)]
    )
    def test_products_train_as_one_process_and_read_their_shares(self, four_ranks, alone, way, part):
        expected = parallel_runs.train(alone(part))
        for rank in four_ranks:
            losses = rank[way, part]["losses"]
            assert losses == {
                name: same_number(value, terms=TRAINING) for name, value in expected["losses"].items()
            }
            assert rank[way, part]["read"] <= 1.05 * rank[way, part]["held"]
        for name, gradient in expected["gradients"].items():
            found = four_ranks[0][way, part]["gradients"][name]
            assert_same_numbers(found, gradient, terms=TRAINING, name=name)


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
