"""The summary of a request: which domains' experts it used."""

import json

import pytest
import torch
from conftest import TOY, tiny_model
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM, ExpertSubset, SubsetError
from transformers_emo.modeling_emo import RoutedExperts
from transformers_emo.subsets import DomainMonitor

EMO_TINY = TOY.parent / "emo-tiny"
# Layers of 4 experts, the last of them shared; one token a sequence.
IDS = torch.tensor([[[[0, 3]], [[1, 3]]], [[[2, 3]], [[-1, -1]]]])
WEIGHTS = torch.tensor([[[[0.6, 1.0]], [[0.2, 1.0]]], [[[0.5, 1.0]], [[0.0, 0.0]]]])
DOMAINS = {"low": ExpertSubset([[0, 3], [0, 1, 3]]), "high": ExpertSubset([[2, 3], [2, 3]])}


def routed(num_prompt=1):
    return RoutedExperts(IDS, WEIGHTS, torch.ones(2, 1, dtype=torch.bool), num_prompt, 0, [4, 4], [[3], [3]])


def test_shares_are_of_the_routing_mass_without_shared_experts():
    first, second = DomainMonitor(DOMAINS)(routed())
    assert first.domains["low"].share == pytest.approx(1)
    assert first.domains["high"].share == 0
    assert first.domains["low"].by_chance == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert (first.nearest, second.nearest) == ("low", "high")
    assert {(t.layer, t.expert) for t in first.top_experts} == {(0, 0), (1, 1)}
    assert second.domains["high"].excess == pytest.approx(1 - 1 / 3)
    assert json.loads(json.dumps(first.to_dict()))["nearest"] == "low"


def test_a_part_without_tokens_has_no_share_and_no_nearest_domain():
    first, _ = DomainMonitor(DOMAINS)(routed(), "new")
    assert (first.num_tokens, first.nearest, first.top_experts) == (0, None, [])
    assert all(share.share == 0 for share in first.domains.values())


def test_domains_of_another_model_are_refused():
    with pytest.raises(SubsetError, match="3 layers, and this one has 2"):
        DomainMonitor({"other": ExpertSubset([[0], [1], [2]])})(routed())
    with pytest.raises(SubsetError, match="expert 9 of layer 1, and the model has 4"):
        DomainMonitor({"other": ExpertSubset([[0], [9]])})(routed())
    with pytest.raises(SubsetError, match="numbering of a model that was cut down"):
        DomainMonitor({"cut": ExpertSubset([[0], [1]], local_ids=True)})
    with pytest.raises(SubsetError, match="no domain to tell"):
        DomainMonitor.of(tiny_model())


def test_texts_of_emo_tiny_are_told_by_their_domain():
    model, tokenizer = EmoForCausalLM.from_pretrained(EMO_TINY), AutoTokenizer.from_pretrained(EMO_TINY)
    monitor, right, domains = (
        DomainMonitor.of(model),
        0,
        ("chinese", "french", "german", "python", "sql", "coq"),
    )
    for domain in domains:
        line = (EMO_TINY / "documents" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()[0]
        prompt = tokenizer(json.loads(line)["text"], return_tensors="pt", truncation=True, max_length=64)
        out = model.generate(**prompt, return_experts=True, max_new_tokens=2, do_sample=False)
        right += monitor(out.experts, "prompt")[0].nearest == domain
    assert right >= len(domains) - 1  # by chance it would be one in sixteen


def test_an_excluded_domain_has_no_share_left():
    model, tokenizer = EmoForCausalLM.from_pretrained(EMO_TINY), AutoTokenizer.from_pretrained(EMO_TINY)
    prompt = tokenizer("def read(path):", return_tensors="pt")
    out = model.generate(**prompt, exclude_experts="python", return_experts=True, max_new_tokens=4)
    [request] = DomainMonitor.of(model)(out.experts)
    assert request.domains["python"].share == 0
