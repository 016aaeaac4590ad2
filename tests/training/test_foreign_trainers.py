"""What trainers with a loss of their own get: the plain network, and a reference that is the same model.

TRL's calls, made again as TRL makes them; `test_trl.py` runs TRL itself where it is installed.
"""

import copy
import logging
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import TINY, TOY
from tolerances import assert_same_numbers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers_emo import (
    EmoConfig,
    EmoForCausalLM,
    EmoForSequenceClassification,
    EmoForTokenClassification,
    ExpertSubset,
    select_experts,
)
from transformers_emo.modeling_emo import forward_inputs

INPUT_IDS = torch.tensor([[5, 17, 1, 2, 33, 8, 90], [44, 44, 3, 71, 1, 1, 28]])
POOLS = {"document_pool_min": 3, "document_pool_max": 5, "attention_within_documents": True}
SUBSET = [[0, 1, 2, 3, 4, 5, 6, 31]] * 4
CHOSEN, REJECTED = (
    torch.tensor([[5, 6, 7, 8, 9], [5, 6, 1, 17, 33]]),
    torch.tensor([[5, 6, 3, 2, 9], [5, 6, 4, 4, 4]]),
)


def by_decoder(model, ids):
    """As TRL from 1.0 on: the decoder alone, then the head. Its wrapper takes `labels` for itself."""
    return model.lm_head(model.base_model(ids, use_cache=False).last_hidden_state)


def by_model(model, ids):
    return model(ids).logits


def answer_logps(model, ids, logits_of):
    logps = F.log_softmax(logits_of(model, ids)[:, 1:-1].float(), dim=-1)
    return logps.gather(-1, ids[:, 2:, None]).sum((1, 2))


def dpo_loss(policy, reference, logits_of) -> torch.Tensor:
    margins = []
    for ids in (CHOSEN, REJECTED):
        with torch.no_grad():
            expected = answer_logps(reference, ids, logits_of)
        margins.append(answer_logps(policy, ids, logits_of) - expected)
    return -F.logsigmoid(0.1 * (margins[0] - margins[1])).mean()


def reference_of(model) -> EmoForCausalLM:
    """As TRL's `create_model_from_path(config._name_or_path)`: none of the arguments of the first loading."""
    name = model.config._name_or_path
    auto_map = AutoConfig.from_pretrained(name).auto_map or {}
    assert "AutoModelForCausalLM" not in auto_map
    return AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype).eval()


@pytest.mark.parametrize("logits_of", [by_decoder, by_model])
@pytest.mark.parametrize("config", [{}, POOLS], ids=["without_pools", "with_pools"])
@pytest.mark.parametrize("subset", [None, SUBSET], ids=["full", "subset"])
def test_a_first_dpo_loss_is_log_2(subset, config, logits_of):
    policy = EmoForCausalLM.from_pretrained(TOY, expert_subset=subset, dtype=torch.float32, **config).train()
    loss = dpo_loss(policy, reference_of(policy), logits_of)
    assert_same_numbers(loss.detach(), torch.tensor(math.log(2)))
    loss.backward()
    assert policy.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_a_reference_may_be_loaded_with_the_config_of_the_policy():
    policy = EmoForCausalLM.from_pretrained(
        TOY, expert_subset=SUBSET, dtype=torch.float32, attention_dropout=0.5
    )
    reference = AutoModelForCausalLM.from_pretrained(policy.config._name_or_path, config=policy.config)
    assert reference.config.retained_experts == policy.config.retained_experts == SUBSET
    assert reference.config.attention_dropout == 0.5
    assert reference.config.num_experts_per_tok == policy.config.num_experts_per_tok
    assert_same_numbers(reference(INPUT_IDS).logits, policy.eval()(INPUT_IDS).logits)


class TestStepsOfTraining:
    @pytest.mark.parametrize("logits_of", [by_decoder, by_model])
    def test_without_labels_training_mode_computes_what_evaluation_does(self, make_model, logits_of):
        model = make_model(**POOLS)
        expected = logits_of(model, INPUT_IDS)
        assert torch.equal(logits_of(model.train(), INPUT_IDS), expected)

    def test_labels_and_training_step_draw_pools(self, make_model):
        model = make_model(**POOLS).train()
        for kwargs in ({"labels": INPUT_IDS}, {"training_step": True}, {"document_pool": True}):
            assert 3 <= model(INPUT_IDS, **kwargs).document_pool_size <= 5
        assert model.model(INPUT_IDS).router_statistics is None
        assert model.model(INPUT_IDS, training_step=True).router_statistics is not None

    @pytest.mark.parametrize("cls", [EmoForSequenceClassification, EmoForTokenClassification])
    def test_heads_draw_them_with_labels_only(self, make_model, cls):
        model = cls(EmoConfig(**TINY | POOLS)).eval()
        expected = model(INPUT_IDS).logits
        sizes = []
        model.model.register_forward_hook(lambda *args: sizes.append(args[-1].document_pool_size))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert torch.equal(model.train()(INPUT_IDS).logits, expected)
        labels = INPUT_IDS % 2 if cls is EmoForTokenClassification else INPUT_IDS[:, 0] % 2
        model(INPUT_IDS, labels=labels)
        model(INPUT_IDS, None, None, None, None, labels)
        assert sizes[0] is None and all(3 <= size <= 5 for size in sizes[1:]) and len(sizes) == 3

    def test_what_is_left_out_is_said_once(self, make_model, caplog):
        forward_inputs.logger.warning_once.cache_clear()
        caplog.set_level(logging.WARNING)
        model = make_model(**POOLS).train()
        model.generate(INPUT_IDS, max_new_tokens=2, use_cache=False)
        model(INPUT_IDS, labels=INPUT_IDS)
        model(INPUT_IDS, document_pool=False)
        make_model().train()(INPUT_IDS)
        assert "draws no document pools" not in caplog.text
        for _ in range(2):
            model(INPUT_IDS)
        assert caplog.text.count("draws no document pools") == 1


class TestNameOfAPart:
    def test_it_loads_the_part_again(self, tmp_path):
        part = EmoForCausalLM.from_pretrained(TOY, expert_subset=SUBSET)
        name = part.config.name_or_path
        assert name == str(TOY) and type(str(name)) is str and type(f"{name}") is str
        again = EmoForCausalLM.from_pretrained(name)
        assert again.config.retained_experts == SUBSET
        assert torch.equal(again(CHOSEN).logits, part(CHOSEN).logits)
        assert EmoForCausalLM.from_pretrained(str(name)).config.num_experts == 32
        other = EmoForCausalLM.from_pretrained(name, expert_subset=[[0, 1, 2, 31]] * 4)
        assert other.config.num_experts == 4

    def test_copies_and_pickles_keep_it_and_files_take_it_for_a_string(self, tmp_path):
        part = EmoForCausalLM.from_pretrained(TOY, expert_subset=SUBSET)
        for config in (copy.deepcopy(part.config), pickle.loads(pickle.dumps(part.config))):
            assert EmoForCausalLM.from_pretrained(config.name_or_path).config.retained_experts == SUBSET
        name = part.config.name_or_path
        assert yaml.safe_load(yaml.dump({"base_model": name})) == {"base_model": str(TOY)}
        assert yaml.safe_load(yaml.safe_dump([name])) == [str(TOY)]
        part.save_pretrained(tmp_path)
        saved = EmoForCausalLM.from_pretrained(tmp_path)
        assert type(saved.config.name_or_path) is str
        assert reference_of(saved).config.retained_experts == SUBSET

    def test_a_part_of_a_part_a_swap_and_a_part_without_shared_experts(self, tmp_path):
        EmoForCausalLM.from_pretrained(TOY, expert_subset=SUBSET).save_pretrained(tmp_path)
        fewer = [[1, 2, 5, 31]] * 4
        part = EmoForCausalLM.from_pretrained(tmp_path, expert_subset=fewer)
        assert reference_of(part).config.retained_experts == fewer
        part.swap_experts([[1, 2, 6, 31]] * 4)
        assert torch.equal(reference_of(part)(CHOSEN).logits, part(CHOSEN).logits)
        bare = ExpertSubset([[0, 1, 2, 3]] * 4, drop_shared=True)
        part = EmoForCausalLM.from_pretrained(TOY, expert_subset=bare)
        assert reference_of(part).config.retained_experts == bare.experts

    def test_a_swap_back_to_all_experts_names_the_whole_model(self):
        model = EmoForCausalLM.from_pretrained(TOY, expert_subset=SUBSET)
        model.swap_experts([list(range(32))] * 4)
        assert reference_of(model).config.num_experts == 32

    def test_choosing_experts_by_that_name_reads_the_whole_model(self):
        part = EmoForCausalLM.from_pretrained(TOY, expert_subset=SUBSET)
        subset = select_experts(part.config.name_or_path, texts=["Theorem"], num_experts=8, progress=False)
        assert subset.root_experts_per_layer == [32] * 4


def test_auto_map_is_empty_and_not_saved(make_model, tmp_path):
    model = make_model()
    assert model.config.auto_map == {}
    model.save_pretrained(tmp_path / "plain")
    assert "auto_map" not in (tmp_path / "plain" / "config.json").read_text()
    model.save_pretrained(tmp_path / "code", include_code=True)
    assert '"auto_map"' in (tmp_path / "code" / "config.json").read_text()
    assert model.config.auto_map == {} and "auto_map" not in model.config.to_dict()
