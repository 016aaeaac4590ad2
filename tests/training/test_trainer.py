"""`EmoTrainer`: balance over accumulated steps, what the logs say, the optimiser's groups, resuming."""

import copy

import pytest
import torch
from conftest import TINY
from tolerances import TRAINING, assert_other_numbers, assert_same_numbers, same_number
from training_runs import DRAWN, FIXED, make_arguments, make_trainer, make_windows
from transformers_emo import EmoConfig, EmoForSequenceClassification
from transformers_emo.training import EmoTrainer, accumulate_balance, train_only

COEFFICIENTS = {"balance_loss": 0.1, "router_z_loss": 0.001, "lm_z_loss": 1e-5}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def in_one_batch(model, ids, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    found = gradients(model)
    model.zero_grad()
    return found


class TestAccumulateBalance:
    @pytest.mark.parametrize("items", [False, True])
    def test_known_batches_give_the_gradients_of_one_large_batch(self, make_model, items):
        model = make_model(**FIXED).train()
        ids = torch.tensor([window["input_ids"] for window in make_windows(4)])
        kwargs = {"num_items_in_batch": 4 * 23} if items else {}
        expected = in_one_batch(model, ids, **kwargs)
        micro = ids.split(2)
        with accumulate_balance(model, [{"input_ids": part} for part in micro]):
            for part in micro:
                loss = model(part, labels=part, **kwargs).loss
                (loss if items else loss / 2).backward()
        for name, gradient in gradients(model).items():
            assert_same_numbers(gradient, expected[name], terms=TRAINING, name=name)

    def test_without_it_the_gradients_are_others(self, make_model):
        model = make_model(**FIXED, balance_loss_coef=1.0).train()
        ids = torch.tensor([window["input_ids"] for window in make_windows(4)])
        expected = in_one_batch(model, ids)
        for part in ids.split(2):
            (model(part, labels=part).loss / 2).backward()
        gate = "model.layers.0.mlp.gate.weight"
        assert_other_numbers(gradients(model)[gate], expected[gate], terms=TRAINING)

    def test_a_micro_batch_is_balanced_against_those_before_it(self, make_model):
        model = make_model(**FIXED).train()
        first, second = torch.tensor([window["input_ids"] for window in make_windows(2)]).split(1)
        alone = [model(ids, labels=ids) for ids in (first, second)]
        with accumulate_balance(model):
            outputs = [model(ids, labels=ids) for ids in (first, second)]
        assert torch.equal(outputs[0].aux_loss, alone[0].aux_loss)
        # 24 tokens a micro-batch; the probabilities are those of the second alone.
        naive = []
        routed, picked = 11, 3
        statistics = model.model(second, training_step=True).router_statistics
        for layer, before, own in zip(
            statistics, alone[0].expert_counts, alone[1].expert_counts, strict=True
        ):
            share = (before + own) / 48
            naive.append(routed / picked * (share * layer.prob_sum_R / 24).sum())
        assert_same_numbers(outputs[1].aux_loss, torch.stack(naive).mean())
        assert_other_numbers(outputs[1].aux_loss, alone[1].aux_loss)

    def test_counting_beforehand_leaves_the_random_state(self, make_model):
        model = make_model(**DRAWN).train()
        ids = torch.tensor([window["input_ids"] for window in make_windows(2)])
        torch.manual_seed(5)
        expected = model(ids, labels=ids)
        torch.manual_seed(5)
        with accumulate_balance(model, [{"input_ids": ids, "labels": ids}]):
            output = model(ids, labels=ids)
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.document_pool_size, expected.document_pool_size)

    def test_a_generator_of_pool_sizes_is_put_back_too(self, make_model):
        model = make_model(**DRAWN).train()
        ids = torch.tensor([window["input_ids"] for window in make_windows(2)])
        model.model.pool_generator = torch.Generator().manual_seed(1)
        expected = model(ids, labels=ids).loss
        model.model.pool_generator.manual_seed(1)
        with accumulate_balance(model, [{"input_ids": ids}]):
            assert torch.equal(model(ids, labels=ids).loss, expected)

    def test_it_ends_with_the_context(self, make_model):
        model = make_model(**FIXED).train()
        ids = torch.tensor([make_windows(1)[0]["input_ids"]])
        expected = model(ids, labels=ids).loss
        with pytest.raises(KeyboardInterrupt), accumulate_balance(model):
            model(ids, labels=ids)
            raise KeyboardInterrupt
        assert torch.equal(model(ids, labels=ids).loss, expected)

    def test_within_another_it_is_a_step_of_its_own(self, make_model):
        model = make_model(**FIXED).train()
        ids = torch.tensor([make_windows(1)[0]["input_ids"]])
        with accumulate_balance(model):
            model(ids, labels=ids)
            outer = model.balance_counts.so_far
            with accumulate_balance(model):
                model(ids, labels=ids)
            assert model.balance_counts.so_far is outer

    def test_models_of_another_kind_are_refused(self):
        with pytest.raises(ValueError, match="Expected an `EmoForCausalLM`, maybe wrapped, got a Linear"):
            accumulate_balance(torch.nn.Linear(2, 2)).__enter__()


class TestAccumulatedSteps:
    def test_exact_balance_trains_as_one_large_batch_does(self, make_model, tmp_path):
        whole = make_model(**FIXED, balance_loss_coef=1.0)
        parts = copy.deepcopy(whole)
        changes = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
        make_trainer(whole, tmp_path, per_device_train_batch_size=4, **changes).train()
        changes |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        make_trainer(parts, tmp_path, exact_balance=True, **changes).train()
        for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
            assert_same_numbers(a, b, terms=TRAINING, name=name)

    def test_the_model_is_as_before_afterwards(self, make_model, tmp_path):
        model = make_model(**FIXED)
        make_trainer(model, tmp_path, gradient_accumulation_steps=2, max_steps=1).train()
        assert model.balance_counts is None


class TestLogs:
    @pytest.mark.parametrize("steps", [1, 3])
    def test_the_parts_add_up_to_the_loss(self, make_model, tmp_path, steps):
        model = make_model(**DRAWN)
        # Ten windows in twos, three to a step: the last step has fewer micro-batches.
        trainer = make_trainer(
            model, tmp_path, make_windows(10), gradient_accumulation_steps=steps, num_train_epochs=1
        )
        trainer.train()
        logs = trainer.state.log_history[:-1]
        assert len(logs) == -(-5 // steps)
        for log in logs:
            total = log["ce_loss"] + sum(scale * log[name] for name, scale in COEFFICIENTS.items())
            assert total == same_number(log["loss"])
            assert 3 <= log["pool_size"] <= 11 and 3 <= log["experts_used"] <= 11

    def test_a_report_over_several_steps_is_their_mean(self, make_model, tmp_path):
        model = make_model(**DRAWN)
        other = copy.deepcopy(model)
        single = make_trainer(model, tmp_path, max_steps=4)
        single.train()
        double = make_trainer(other, tmp_path, max_steps=4, logging_steps=2)
        double.train()
        names = ["ce_loss", "balance_loss", "pool_size"]
        ones, twos = single.state.log_history[:-1], double.state.log_history[:-1]
        for name in names:
            expected = (ones[0][name] + ones[1][name]) / 2
            assert twos[0][name] == same_number(expected)

    def test_experts_used_are_those_that_tokens_took(self, make_model, tmp_path):
        model = make_model(document_pool_min=3, document_pool_max=3)
        window = make_windows(1, length=6)
        window[0]["document_ids"] = [0] * 6
        trainer = make_trainer(model, tmp_path, window, max_steps=1)
        trainer.train()
        assert trainer.state.log_history[0]["experts_used"] == 3  # one document: one pool of three

    def test_without_pools_there_is_the_cross_entropy_and_the_released_balance_loss(
        self, make_model, tmp_path
    ):
        model = make_model(output_router_logits="training")
        trainer = make_trainer(model, tmp_path, max_steps=1)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["ce_loss"] + 0.01 * log["balance_loss"] == same_number(log["loss"])
        assert "pool_size" not in log and "lm_z_loss" not in log

    def test_what_was_not_reported_is_not_in_the_next_run(self, make_model, tmp_path):
        trainer = make_trainer(make_model(**DRAWN), tmp_path, max_steps=3, logging_steps=2)
        for _ in range(2):  # the last step of the first run is in no report
            trainer.train()
            log = trainer.state.log_history[0]
            total = log["ce_loss"] + sum(scale * log[name] for name, scale in COEFFICIENTS.items())
            assert total == same_number(log["loss"])

    def test_evaluation_is_not_reported_as_training(self, make_model, tmp_path):
        model = make_model(**FIXED)
        changes = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": make_windows(2)}
        trainer = make_trainer(model, tmp_path, max_steps=2, **changes)
        trainer.train()
        evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
        assert len(evaluations) == 2 and "ce_loss" not in evaluations[0]


def test_models_without_a_language_model_head_are_refused(tmp_path):
    config = EmoConfig(**TINY, num_labels=2)
    with pytest.raises(ValueError, match="Expected an `EmoForCausalLM`, maybe wrapped, got a"):
        EmoTrainer(EmoForSequenceClassification(config), make_arguments(tmp_path))


def test_smoothed_labels_are_refused_as_they_would_lose_the_balance(make_model, tmp_path):
    with pytest.raises(ValueError, match="`label_smoothing_factor` is 0.1, and `Trainer` would leave"):
        make_trainer(make_model(**FIXED), tmp_path, label_smoothing_factor=0.1)


def test_weight_decay_is_for_all_but_the_input_embedding(make_model, tmp_path):
    model = make_model(**FIXED)
    trainer = make_trainer(model, tmp_path, weight_decay=0.1)
    decayed, not_decayed = trainer.create_optimizer().param_groups
    assert decayed["weight_decay"] == 0.1 and not_decayed["weight_decay"] == 0
    assert [id(p) for p in not_decayed["params"]] == [id(model.model.embed_tokens.weight)]
    assert len(decayed["params"]) == len(list(model.parameters())) - 1


def test_frozen_rows_stay_under_weight_decay(make_model, tmp_path):
    model = make_model()
    train_only(model, "routed")
    experts = model.model.layers[0].mlp.experts.down_proj
    before = experts.detach().clone()
    make_trainer(model, tmp_path, max_steps=2, weight_decay=0.5).train()
    assert torch.equal(experts[-1], before[-1]) and not torch.equal(experts[0], before[0])


@pytest.mark.parametrize("number", [8, 16], ids=["after_an_epoch", "within_an_epoch"])
@pytest.mark.parametrize("exact", [False, True])
def test_losses_after_resuming_are_bit_equal(make_model, tmp_path, exact, number):
    windows = make_windows(number)
    changes = {"gradient_accumulation_steps": 2, "max_steps": 4, "exact_balance": exact}
    saving = {"save_strategy": "steps", "save_steps": 2}
    uninterrupted = make_trainer(make_model(**DRAWN), tmp_path / "a", windows, **changes, **saving)
    uninterrupted.train()
    resumed = make_trainer(make_model(seed=9, **DRAWN), tmp_path / "b", windows, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    names = ["loss", "grad_norm", "ce_loss", "balance_loss", "router_z_loss", "pool_size", "experts_used"]
    for expected, log in zip(
        uninterrupted.state.log_history[2:4], resumed.state.log_history[2:4], strict=True
    ):
        assert {name: log[name] for name in names} == {name: expected[name] for name in names}
    for a, b in zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [3, 4], ids=["within_an_epoch", "after_an_epoch"])
def test_a_finished_run_that_is_resumed_stays_as_it_is(make_model, tmp_path, steps):
    changes = {"max_steps": steps, "save_strategy": "steps", "save_steps": steps}
    finished = make_trainer(make_model(**DRAWN), tmp_path, **changes)
    finished.train()
    resumed = make_trainer(make_model(seed=9, **DRAWN), tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert resumed.state.global_step == steps
    for a, b in zip(finished.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
