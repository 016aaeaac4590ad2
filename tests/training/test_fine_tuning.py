"""What trains, to the row, after a real step of an optimiser."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers_emo.training import KeepFrozenRows, keep_frozen_rows, train_only

TOKENS = torch.randint(2, 96, (4, 24), generator=torch.Generator().manual_seed(1))
# The balance loss gives every row of the router a gradient, and all experts taken give every row of theirs.
DENSELY_USED = {"num_experts": 4, "num_experts_per_tok": 4, "output_router_logits": True}


class Rows(Dataset):
    """The same tokens over and over."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": TOKENS[index % 4], "labels": TOKENS[index % 4]}


def changed_by(model, step):
    """The rows of each parameter that a step changes."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    return {
        name: [row for row in range(len(p)) if not torch.equal(p[row], before[name][row])]
        for name, p in model.named_parameters()
    }


def one_step(model, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **kwargs)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("what", ["all", "routed", "routed+shared", "routed+shared+router"])
@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, [3]),
        ({"num_shared_experts": 2}, [2, 3]),
        ({"num_shared_experts": 0}, []),
        ({"num_shared_experts": 0, "always_active_experts": [1]}, [1]),
    ],
    ids=["one_shared", "two_shared", "none_shared", "always_active"],
)
def test_only_the_chosen_parameters_change(make_model, what, changes, shared):
    model = make_model(**DENSELY_USED | changes)
    train_only(model, what)
    changed = changed_by(model, lambda: one_step(model))
    for name, rows in changed.items():
        if ".mlp.experts." in name:
            expected = [row for row in range(4) if what != "routed" or row not in shared]
            assert rows == expected, name
        elif ".mlp.gate." in name:
            assert bool(rows) == (what in ("all", "routed+shared+router")), name
        else:
            assert bool(rows) == (what == "all"), name


def test_a_later_choice_undoes_an_earlier_one(make_model):
    model = make_model(**DENSELY_USED)
    for what in ("routed", "routed", "routed+shared"):
        train_only(model, what)
    changed = changed_by(model, lambda: one_step(model))
    assert all(rows == [0, 1, 2, 3] for name, rows in changed.items() if ".mlp.experts." in name)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_to_the_choice_until_the_next_one(make_model, copied):
    model = make_model(**DENSELY_USED)
    train_only(model, "routed")
    model = copied(model)
    for rows in ([0, 1, 2], [0, 1, 2, 3]):
        changed = changed_by(model, lambda: one_step(model))
        assert all(changed[name] == rows for name in changed if ".mlp.experts." in name)
        model.zero_grad()
        train_only(model, "routed+shared")


def test_replaced_parameters_keep_to_the_choice(make_model):
    model = make_model(**DENSELY_USED)
    train_only(model, "routed")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().clone())
    changed = changed_by(model, lambda: one_step(model))
    assert changed["model.layers.1.mlp.experts.down_proj"] == [0, 1, 2]


def test_dense_layers_stay_as_they_are(make_model):
    model = make_model(num_experts_per_layer=[0, 4, 4], dense_intermediate_size=24, num_experts_per_tok=4)
    train_only(model, "routed")
    changed = changed_by(model, lambda: one_step(model))
    assert not any(rows for name, rows in changed.items() if ".layers.0." in name)
    assert changed["model.layers.1.mlp.experts.down_proj"] == [0, 1, 2]


def test_weight_decay_does_not_reach_frozen_rows(make_model):
    model = make_model(**DENSELY_USED)
    train_only(model, "routed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    keep_frozen_rows(model, optimizer)

    def steps():
        for _ in range(2):
            model.train()(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()

    changed = changed_by(model, steps)
    assert changed["model.layers.1.mlp.experts.gate_up_proj"] == [0, 1, 2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_keeps_to_the_choice(make_model, tmp_path, checkpointing):
    model = make_model(**DENSELY_USED)
    train_only(model, "routed")
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        weight_decay=0.5,
        learning_rate=0.01,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[KeepFrozenRows()])
    changed = changed_by(model, trainer.train)
    for name, rows in changed.items():
        assert rows == ([0, 1, 2] if ".mlp.experts." in name else []), name


def test_an_unknown_choice_is_refused(make_model):
    with pytest.raises(ValueError, match=r"'shared', expected one of \['all', 'routed'"):
        train_only(make_model(), "shared")
