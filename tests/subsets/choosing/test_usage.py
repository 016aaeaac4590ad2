"""Experts chosen by what a server's requests used, in place of text."""

import json

import pytest
import torch
from conftest import TOY
from transformers_emo import EmoConfig, EmoForCausalLM, SubsetError, select_experts
from transformers_emo.cli import main
from transformers_emo.subsets import ExpertUsage
from transformers_emo.subsets.choosing.scores import RouterProbability

IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def traffic():
    """What a server with toy-emo would have seen: router logits of each layer, and the experts taken."""
    model = EmoForCausalLM.from_pretrained(TOY, dtype="float32")
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out: seen.append((out[0], out[2])))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return model, seen


@pytest.fixture(scope="module")
def usage(traffic):
    model, seen = traffic
    sums = []
    for layer, (logits_TE, _) in zip(model.config.layer_experts, seen, strict=True):
        score = RouterProbability(layer)
        score.add_logits(logits_TE, torch.ones(len(logits_TE)))
        sums.append((score.result() * len(logits_TE)).tolist())
    return ExpertUsage(sums, IDS.numel())


def test_probabilities_choose_as_the_global_method_does(traffic, usage, tmp_path):
    model, _ = traffic
    usage.save(tmp_path / "usage.json")
    for of in (model, TOY):
        wanted = select_experts(model, input_ids=[IDS], num_experts=[8, 16], method="global", progress=False)
        chosen = select_experts(of, usage=tmp_path / "usage.json", num_experts=[8, 16], progress=False)
        assert [subset.experts for subset in chosen] == [subset.experts for subset in wanted]
        assert {(subset.method, subset.num_tokens, subset.num_texts) for subset in chosen} == {
            ("usage", 40, None)
        }
        assert chosen[0].fingerprint == wanted[0].fingerprint


def test_picks_that_vllm_reports_are_counted(traffic):
    model, seen = traffic
    ids_TLK = torch.stack([picked_TK for _, picked_TK in seen], dim=1)
    usage = ExpertUsage.of_routed_experts([ids_TLK[:30].numpy(), ids_TLK[30:]], model.config)
    layer = model.config.layer_experts[0]
    assert usage.num_tokens == 40
    assert sum(usage.usage[0]) == 40 * layer.top_k
    assert usage.usage[0][layer.num_experts - 1] == 40  # every token takes the shared expert
    best = max(range(layer.num_routed), key=lambda e: (usage.usage[0][e], -e))
    assert best in select_experts(model, usage=usage, num_experts=2, progress=False).experts[0]


def test_a_layer_can_keep_more_where_the_traffic_is_spread(traffic, usage):
    model, _ = traffic
    subset = select_experts(model, usage=usage, num_experts=8, budget="mass", progress=False)
    assert sum(map(len, subset.experts)) == 8 * len(subset.experts)


def test_the_command_chooses_by_a_file(usage, tmp_path, capsys):
    usage.save(tmp_path / "usage.json")
    out = tmp_path / "mine.json"
    assert (
        main(["select", str(TOY), str(out), "--usage", str(tmp_path / "usage.json"), "--experts", "8"]) == 0
    )
    assert "8 experts a layer, from 40 tokens of requests" in capsys.readouterr().out
    assert json.loads(out.read_text())["method"] == "usage"


@pytest.mark.parametrize("words", [["--text", "x"], ["--method", "global"], ["--seed", "1"]])
def test_the_command_takes_nothing_else_with_it(usage, tmp_path, words, capsys):
    usage.save(tmp_path / "usage.json")
    command = ["select", str(TOY), str(tmp_path / "mine.json"), "--usage", str(tmp_path / "usage.json")]
    assert main([*command, *words]) != 0
    assert "no part in a choice by --usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", [{"texts": ["x"]}, {"method": "global"}, {"stop_when_settled": 0.9}, {"input_ids": [IDS]}]
)
def test_text_and_usage_together_are_refused(usage, more):
    with pytest.raises(ValueError, match="stands in place of text"):
        select_experts(TOY, usage=usage, num_experts=8, progress=False, **more)


@pytest.mark.parametrize(
    ("sums", "tokens", "kind", "words"),
    [
        ([[1.0]], 0, "probability", "no request was counted yet"),
        ([[float("nan")]], 1, "probability", "finite numbers"),
        ([[-1.0]], 1, "probability", "finite numbers"),
        ([[None]], 1, "probability", "finite numbers"),
        ("x", 1, "probability", "finite numbers"),
        ([[1.0]], 1, "guesses", "expected one of probability, picks"),
    ],
)
def test_damaged_usage_is_refused(sums, tokens, kind, words):
    with pytest.raises(SubsetError, match=words):
        ExpertUsage(sums, tokens, kind)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "emo-expert-usage"}', '{"experts": [[1]]}'])
def test_other_files_are_refused(text, tmp_path):
    path = tmp_path / "usage.json"
    path.write_text(text)
    with pytest.raises(SubsetError, match="holds no usage"):
        ExpertUsage.load(path)


def test_usage_of_another_model_or_of_a_subset_is_refused():
    config = EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    with pytest.raises(SubsetError, match="of another model"):
        ExpertUsage([[1.0] * 5], 1).scores(config)
    with pytest.raises(SubsetError, match="says nothing of expert 1"):
        ExpertUsage([[1.0, None, 1.0, 1.0]], 1).scores(config)
    with pytest.raises(SubsetError, match="shape"):
        ExpertUsage.of_routed_experts([torch.zeros(2, 3)], config)
    with pytest.raises(SubsetError, match="taken expert 9"):
        ExpertUsage.of_routed_experts([torch.full((2, 1, 2), 9)], config)
