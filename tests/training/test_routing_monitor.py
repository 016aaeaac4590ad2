"""What `RoutingMonitor` reports is what the routers did, each token counted once."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from ranks import launch
from training_runs import DRAWN, make_documents, make_trainer, make_windows
from transformers import Trainer
from transformers_emo.training import EmoTrainer, Recipe, RoutingMonitor, build_trainer

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def monitored(folder, model=None, *, every=1, per_layer=False, **changes) -> list[dict[str, float]]:
    """The reports of a short run, step by step."""
    model = tiny_model(**DRAWN) if model is None else model
    trainer = make_trainer(model, folder, **{"max_steps": 1, **changes})
    trainer.add_callback(RoutingMonitor(trainer, every=every, per_layer=per_layer))
    trainer.train()
    return [log for log in trainer.state.log_history if "routing_balance" in log]


def told(log: dict[str, float], *left_out: str) -> dict[str, float]:
    return {name: value for name, value in log.items() if "routing" in name and name not in left_out}


def by_hand(model, rows: list[list[int]]) -> dict[str, float]:
    """The same numbers from the router logits, token by token."""
    layers = []
    for logits_TE in model.eval()(torch.tensor(rows), output_router_logits=True).router_logits:
        routed = model.config.layer_experts[0].num_routed
        probs_TR = logits_TE[:, :routed].float().softmax(-1)
        picks = probs_TR.topk(model.config.layer_experts[0].top_k - 1).indices.tolist()
        counts = [sum(one.count(expert) for one in picks) for expert in range(routed)]
        shares = [count / sum(counts) for count in counts]
        bits = -sum(share * math.log2(share) for share in shares if share)
        document, documents = 0, []
        for row in rows:
            for token in row:  # 1 is EOS, and the first token of a document for routers
                document += token == 1
                documents.append(document)
            document += 1
        equal = {True: [], False: []}
        for one, of_one in enumerate(documents):
            for two, of_two in enumerate(documents):
                if one != two:
                    equal[of_one == of_two].append(len(set(picks[one]) & set(picks[two])))
        alike = [sum(values) / len(values) for values in (equal[True], equal[False])]
        layers.append(
            {
                "experts_used": sum(count > 0 for count in counts),
                "effective_experts": 2**bits,
                "balance": bits / math.log2(routed),
                "largest_share": max(shares) * routed,
                "entropy": -(probs_TR * probs_TR.log2()).sum(-1).mean().item(),
                "document_coherence": alike[0] / alike[1],
            }
        )
    report = {f"routing_{name}": sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
    report["routing_effective_experts_min"] = min(layer["effective_experts"] for layer in layers)
    report["routing_largest_share"] = max(layer["largest_share"] for layer in layers)
    return report


def test_numbers_are_those_of_the_router_logits(tmp_path):
    model, windows = tiny_model(), make_windows(2)
    expected = by_hand(model, [window["input_ids"] for window in windows])
    (log,) = monitored(tmp_path, model, windows=windows, learning_rate=0.0, trainer=Trainer)
    assert told(log) == pytest.approx(expected, rel=1e-4)
    assert expected["routing_document_coherence"] != pytest.approx(1, abs=0.01)


def test_pools_and_experts_are_those_that_the_trainer_counts_itself(tmp_path):
    trainer = make_trainer(tiny_model(**DRAWN), tmp_path, max_steps=3, gradient_accumulation_steps=2)
    trainer.add_callback(RoutingMonitor(trainer))
    trainer.train()
    logs = trainer.state.log_history
    own = [log for log in logs if "experts_used" in log]  # logged too, beside ours
    ours = [log for log in logs if "routing_experts_used" in log]
    assert len(own) == len(ours) == 3
    for one, other in zip(own, ours, strict=True):
        assert one["experts_used"] == pytest.approx(other["routing_experts_used"])
        assert one["pool_size"] == pytest.approx(other["routing_pool_size"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_twice_count_once(tmp_path, reentrant):
    plain = monitored(tmp_path / "a", gradient_accumulation_steps=2)
    again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert told(monitored(tmp_path / "b", gradient_accumulation_steps=2, **again)[0]) == pytest.approx(
        told(plain[0])
    )


def test_the_forward_that_counts_for_an_exact_balance_is_not_counted(tmp_path):
    plain = monitored(tmp_path / "a", gradient_accumulation_steps=2)
    exact = monitored(tmp_path / "b", gradient_accumulation_steps=2, exact_balance=True)
    assert told(exact[0]) == pytest.approx(told(plain[0]))


def test_micro_batches_add_up_to_the_batch(tmp_path):
    whole = monitored(tmp_path / "a", per_device_train_batch_size=4)
    parts = monitored(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    # Pairs of tokens are taken within a micro-batch.
    left_out = "routing_document_coherence"
    assert told(parts[0], left_out) == pytest.approx(told(whole[0], left_out), rel=1e-5)


def test_padding_is_not_counted(tmp_path):
    documents = [{"input_ids": ids} for ids in make_documents(4)]
    assert len({len(document["input_ids"]) for document in documents}) > 1
    padded = monitored(tmp_path / "a", windows=documents, per_device_train_batch_size=4)
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    single = monitored(tmp_path / "b", windows=documents, **alone)
    left_out = "routing_document_coherence"
    assert told(padded[0], left_out) == pytest.approx(told(single[0], left_out), rel=1e-5)
    assert left_out in padded[0] and left_out not in single[0]  # one document a micro-batch: no two differ


def test_two_processes_say_what_one_says(tmp_path):
    launch(str(Path(__file__).with_name("monitored_ranks.py")), tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    alone = monitored(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for logs in ranks:
        assert told(logs[0]) == pytest.approx(told(alone[0]), rel=1e-5)


def test_steps_between_looks_have_no_hooks(tmp_path):
    model, hooks = tiny_model(**DRAWN), []
    model.register_forward_pre_hook(lambda module, args: hooks.append(len(module.model._forward_hooks)))
    logs = monitored(tmp_path, model, every=2, max_steps=5)
    assert [log["step"] for log in logs] == [1, 2, 4] and hooks == [1, 1, 0, 1, 0]


def test_tensorboard_gets_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = monitored(tmp_path, max_steps=2, report_to=["tensorboard"], per_layer=True)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    for name, value in told(logs[1]).items():
        points = events.Scalars(f"train/{name}")
        assert [point.step for point in points] == [1, 2]
        assert points[1].value == pytest.approx(value, rel=1e-5)
    assert "train/routing_layer_2_balance" in events.Tags()["scalars"]


def collapsed(*layers: int, **config):
    """A model whose routers, in some layers, give every token the experts 0, 1 and 2."""
    model = tiny_model(**config)
    model.model.embed_tokens.weight.data[:, 0] = 30.0  # the same in every token, and larger than all else
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[:, 0] = 0.0
    for number in layers:
        weight = model.model.layers[number].mlp.gate.weight.data.zero_()
        weight[:, 0] = -0.2 * torch.arange(len(weight))
    return model


@pytest.mark.parametrize(("config", "setting"), [(DRAWN, "balance_loss_coef"), ({}, "router_aux_loss_coef")])
def test_a_layer_that_collapses_is_named_once_and_early(tmp_path, config, setting):
    plan = {"learning_rate": 0.0, "per_device_train_batch_size": 4}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitored(tmp_path, collapsed(1, **config), max_steps=2, **plan)
        assert not [w for w in caught if "collapsed" in str(w.message)]
        logs = monitored(tmp_path, collapsed(1, **config), max_steps=6, **plan)
    (warning,) = (str(w.message) for w in caught if "collapsed" in str(w.message))
    assert "Expert layer 1 has collapsed: at step 3" in warning and f"Raise `{setting}`" in warning
    assert logs[0]["routing_effective_experts_min"] == pytest.approx(3)


def test_a_sound_model_is_not_warned_about(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Expert layer")
        monitored(tmp_path, max_steps=5, per_device_train_batch_size=4)


def test_a_recipe_can_ask_for_it(tmp_path):
    path = RECIPES / "pretrain.yaml"
    for wanted in (True, False):
        changes = {"output_dir": str(tmp_path), "routing_monitor": wanted}
        trainer = build_trainer(Recipe.read(path, changes))
        found = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert (RoutingMonitor in found) == wanted


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (lambda: tiny_model(), {"every": 0}, "`every` is 0, expected at least 1"),
        (lambda: torch.nn.Linear(2, 2), {}, "is a Linear, expected an EMO"),
    ],
)
def test_what_cannot_be_monitored_is_refused(tmp_path, model, options, said):
    trainer = make_trainer(tiny_model(), tmp_path, trainer=EmoTrainer)
    trainer.model = model()
    with pytest.raises(ValueError, match=said):
        RoutingMonitor(trainer, **options)


def test_compiled_training_is_refused(tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path)
    trainer.args.torch_compile = True
    with pytest.raises(ValueError, match="compiled code calls no hooks"):
        RoutingMonitor(trainer)
