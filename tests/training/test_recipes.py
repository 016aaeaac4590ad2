"""`training_arguments`: the paper's settings, and batches divided among processes."""

import re

import pytest
import torch
from transformers_emo.training import training_arguments


def test_pretraining_has_the_settings_of_the_paper(tmp_path):
    arguments = training_arguments("pretrain", tmp_path, max_steps=5000, use_cpu=True)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert (arguments.weight_decay, arguments.max_grad_norm) == (0.1, 1.0)


def learning_rates(arguments, steps: int) -> list[float]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        arguments.get_warmup_steps(steps),
        steps,
        arguments.lr_scheduler_kwargs,
    )
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


def test_pretraining_warms_up_and_falls_to_a_tenth(tmp_path):
    rates = learning_rates(training_arguments("pretrain", tmp_path, max_steps=4000, use_cpu=True), 4000)
    assert rates[1000] == pytest.approx(2e-3) and rates[2000] == pytest.approx(4e-3)
    assert rates[3000] == pytest.approx((4e-3 + 4e-4) / 2) and rates[-1] == pytest.approx(4e-4)


def test_annealing_begins_where_pretraining_ends_and_falls_to_nothing(tmp_path):
    rates = learning_rates(training_arguments("anneal", tmp_path, max_steps=10, use_cpu=True), 10)
    assert rates[0] == pytest.approx(4e-4) and rates[5] == pytest.approx(2e-4) and rates[-1] == 0


def test_fine_tuning_is_one_epoch_of_batches_of_32(tmp_path):
    arguments = training_arguments("fine-tune", tmp_path, use_cpu=True)
    assert arguments.num_train_epochs == 1 and arguments.learning_rate == 5e-5
    assert arguments.get_warmup_steps(200) == 20
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 32


def test_changes_win(tmp_path):
    arguments = training_arguments(
        "fine-tune", tmp_path, learning_rate=1e-3, per_device_train_batch_size=3, use_cpu=True
    )
    assert arguments.learning_rate == 1e-3
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 1)


@pytest.mark.parametrize(("windows", "size", "steps"), [(4, None, 1), (64, None, 8), (12, 3, 4)])
def test_windows_per_step_are_accumulated(tmp_path, windows, size, steps):
    changes = {} if size is None else {"per_device_train_batch_size": size}
    arguments = training_arguments(
        "anneal", tmp_path, windows_per_step=windows, max_steps=5, use_cpu=True, **changes
    )
    assert arguments.gradient_accumulation_steps == steps
    assert arguments.per_device_train_batch_size * steps == windows


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("pre-train", {}, "no recipe 'pre-train': name one of"),
        ("pretrain", {"max_steps": 100}, "warms up for 2000 steps, and `max_steps` is 100"),
        ("anneal", {"windows_per_step": 10, "per_device_train_batch_size": 4}, "a multiple of 4"),
        ("anneal", {"windows_per_step": 0}, "`windows_per_step` is 0: give an integer of at least 1"),
        ("anneal", {"windows_per_step": "8"}, "`windows_per_step` is '8': give an integer"),
        ("anneal", {"learning_rate": "4e-3"}, "`learning_rate` is '4e-3', expected float"),
        ("anneal", {"max_steps": None}, "`max_steps` is None, expected int"),
        ("anneal", {"save_total_limit": "2"}, "`save_total_limit` is '2', expected int or none"),
        ("anneal", {"bf16": "yes"}, "`bf16` is 'yes', expected bool"),
        ("anneal", {"windows_per_step": 8, "gradient_accumulation_steps": 2}, "give one of them"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        training_arguments(recipe, tmp_path, use_cpu=True, **changes)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"max_steps": 0}, "`max_steps` is 0, expected at least 1, or -1"),
        ({"max_steps": -5}, "`max_steps` is -5, expected at least 1, or -1"),
        ({"num_train_epochs": 0}, "`num_train_epochs` is 0, expected a number above 0"),
        ({"num_train_epochs": -1.5}, "expected a number above 0"),
        ({"learning_rate": -1e-3}, "`learning_rate` is -0.001, expected at least 0"),
        ({"learning_rate": float("nan")}, "expected a finite number"),
        ({"num_train_epochs": float("inf")}, "expected a finite number"),
        ({"per_device_train_batch_size": 0}, "expected at least 1"),
        ({"per_device_eval_batch_size": -1}, "expected at least 1"),
        ({"gradient_accumulation_steps": 0}, "expected at least 1"),
        ({"warmup_steps": -1}, "expected at least 0"),
        ({"weight_decay": -0.1}, "expected at least 0"),
        ({"adam_beta2": 1.0}, "expected a number from 0 and below 1"),
        ({"adam_beta1": -0.1}, "expected a number from 0 and below 1"),
        ({"adam_epsilon": -1e-8}, "expected at least 0"),
        ({"max_grad_norm": -1.0}, "expected at least 0"),
        ({"logging_steps": 0}, "expected a number above 0"),
        ({"save_steps": -1}, "expected a number above 0"),
        ({"save_total_limit": 0}, "expected at least 1"),
        ({"dataloader_num_workers": -1}, "expected at least 0"),
        ({"seed": -1}, "expected at least 0 and at most 4294967295"),
        ({"windows_per_step": 0}, "at least 1"),
    ],
)
def test_numbers_that_train_nonsense_are_refused_by_name(tmp_path, setting, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        training_arguments("fine-tune", tmp_path, use_cpu=True, **setting)
    assert next(iter(setting)) in str(caught.value)


def test_numbers_at_the_ends_of_their_ranges_are_taken(tmp_path):
    edge = {"max_steps": -1, "learning_rate": 0.0, "weight_decay": 0, "max_grad_norm": 0.0, "warmup_steps": 0}
    arguments = training_arguments("fine-tune", tmp_path, use_cpu=True, adam_beta1=0.0, seed=0, **edge)
    assert arguments.learning_rate == 0 and arguments.max_steps == -1
