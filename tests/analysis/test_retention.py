"""The retention curve: equal to measuring one thing after the other, and resumable."""

import json

import pytest
import torch
from conftest import TOY
from parallel_runs import CountedReads
from tolerances import same_number
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM, select_experts
from transformers_emo.analysis import (
    Domain,
    Journal,
    draw,
    encode_documents,
    measure_retention,
    num_experts_at,
    read_domains,
    retention,
)
from transformers_emo.analysis.weight_sample import sum_of_weights, weight_sample

METHODS = ["layerwise", "global", "easy_ep", "random"]
PLAN = {
    "methods": METHODS,
    "shares": [0.5, 0.1, 0.05],
    "seeds": [0, 1],
    "num_calibration": 2,
    "window": 20,
    "progress": False,
}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY)


@pytest.fixture
def domains():
    whole = read_domains(TOY / "documents", ["coq", "man_fr"], max_test=3)
    return [Domain(d.name, d.calibration[:5], (*d.test, "a b")) for d in whole]


@pytest.fixture
def models(make_model):
    return {"one": make_model(0, vocab_size=4096), "two": make_model(1, vocab_size=4096)}


def test_numbers_are_the_same_as_for_each_choice_alone(models, domains, tokenizer, tmp_path):
    found = measure_retention(models, domains, tmp_path, tokenizer=tokenizer, **PLAN)
    # 12 experts, one of them shared: 0.1 of them is the next above 1.2, and 0.05 would leave the shared one.
    assert {(m.share, m.num_experts) for m in found.measurements} == {(1.0, 12), (0.5, 6), (0.1, 2)}
    assert len(found.measurements) == 2 * 2 * (1 + 2 * 4 * 2)
    texts = {domain.name: domain for domain in domains}
    for m in found.measurements:
        model, domain = models[m.model], texts[m.domain]
        subset = [list(range(12))] * 3
        if m.method != "full":
            drawn = draw(domain.calibration, 2, m.seed, m.domain)
            ids = [row[None] for row in encode_documents(tokenizer, drawn, 20)]
            random = retention.random.Random(f"{m.seed}/{m.domain}").getrandbits(31)
            subset = select_experts(
                model,
                input_ids=ids,
                num_experts=m.num_experts,
                method=m.method,
                seed=random,
                progress=False,
            )
        for ids, loss, tokens in zip(
            encode_documents(tokenizer, domain.test, 20), m.loss, m.tokens, strict=True
        ):
            with torch.no_grad(), model.use_experts(subset):
                expected = model(ids[None], labels=ids[None]).loss.item() * (len(ids) - 1)
            assert loss == same_number(expected) and tokens == len(ids) - 1


def test_an_interrupted_run_is_continued(models, domains, tokenizer, tmp_path, monkeypatch):
    plan = PLAN | {"tokenizer": tokenizer}
    whole = measure_retention(models, domains, tmp_path / "whole", **plan)
    real, calls = retention.document_losses, []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(retention, "document_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_retention(models, domains, tmp_path / "cut", **plan)
    kept = len(Journal(tmp_path / "cut" / Journal.NAME).measurements)
    assert 8 <= kept < len(whole.measurements)
    resumed = measure_retention(models, domains, tmp_path / "cut", **plan)
    assert resumed.measurements == whole.measurements
    calls.clear()
    measure_retention(models, domains, tmp_path / "cut", **plan)
    assert not calls


def test_more_can_be_added_later(models, domains, tokenizer, tmp_path):
    plan = PLAN | {"tokenizer": tokenizer}
    whole = measure_retention(models, domains, tmp_path / "whole", **plan)
    part = {"methods": ["random"], "shares": [0.5], "seeds": [1]}
    measure_retention({"one": models["one"]}, domains[:1], tmp_path / "parts", **plan | part)
    parts = measure_retention(models, domains, tmp_path / "parts", **plan)
    assert len(parts.measurements) == len(whole.measurements)
    for method in METHODS:
        assert parts.loss("two", method, 0.5) == whole.loss("two", method, 0.5)
        assert parts.loss("one", method, 0.5) == same_number(whole.loss("one", method, 0.5))


def test_a_trained_model_keeps_its_quality_with_chosen_experts(tmp_path):
    domains = read_domains(TOY / "documents", ["c", "man_de"], max_test=6)
    seen = {}
    found = measure_retention(
        {"toy": TOY},
        domains,
        tmp_path,
        methods=["layerwise", "random"],
        shares=[0.25],
        window=128,
        progress=False,
        visit=lambda name, model, documents: seen.update({name: (model, documents)}),
    )
    full, chosen, random = (
        found.loss("toy", method, share)
        for method, share in (("full", 1), ("layerwise", 0.25), ("random", 0.25))
    )
    assert chosen - full < 0.15 < 0.5 < random - full
    assert found.accuracy("toy", "layerwise", 0.25) > found.accuracy("toy", "random", 0.25)
    model, documents = seen["toy"]
    assert isinstance(model, EmoForCausalLM) and [len(d) for d in documents.values()] == [6, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["best"]}, "Unknown method 'best'"),
        ({"methods": ["random", "random"]}, "name each once"),
        ({"shares": [0.0]}, "a number above 0 and at most 1"),
        ({"shares": [1.5]}, "a number above 0 and at most 1"),
        ({"seeds": []}, "no seeds"),
        ({"num_calibration": 0}, "at least 1 document"),
        ({"num_calibration": 5}, "every seed would draw the same 5"),
        ({"window": 1}, "`window` is 1 tokens"),
        ({"window": 10**6}, "the models' context"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_measured(
    models, domains, tokenizer, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(retention, "document_losses", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        measure_retention(models, domains, tmp_path, **PLAN | {"tokenizer": tokenizer} | changes)


def test_a_domain_named_twice_is_refused(models, domains, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="domains are .* name each once"):
        measure_retention(models, domains[:1] * 2, tmp_path, tokenizer=tokenizer, **PLAN)


def test_other_texts_or_weights_are_refused(models, domains, tokenizer, tmp_path):
    plan = PLAN | {"tokenizer": tokenizer, "methods": ["random"], "shares": [0.5]}
    measure_retention({"one": models["one"]}, domains, tmp_path, **plan)
    with pytest.raises(ValueError, match="weights of one"):
        measure_retention({"one": models["two"]}, domains, tmp_path, **plan)
    other = [Domain(d.name, d.calibration, d.test[:1]) for d in domains]
    with pytest.raises(ValueError, match="texts of coq"):
        measure_retention({"one": models["one"]}, other, tmp_path, **plan)


def test_a_run_that_an_earlier_version_began_goes_on(models, domains, tokenizer, tmp_path, monkeypatch):
    plan = PLAN | {"tokenizer": tokenizer, "methods": ["random"], "shares": [0.5]}
    monkeypatch.setattr(retention, "weight_sample", sum_of_weights)
    measure_retention({"one": models["one"]}, domains, tmp_path, **plan)
    monkeypatch.undo()
    again = measure_retention({"one": models["one"]}, domains, tmp_path, **plan | {"shares": [0.5, 0.1]})
    assert {one.share for one in again.measurements} == {1.0, 0.5, 0.1}
    with pytest.raises(ValueError, match="weights of one"):
        measure_retention({"one": models["two"]}, domains, tmp_path, **plan)


def test_weights_are_read_once_whatever_is_measured(domains, tmp_path):
    with CountedReads() as reads:
        measure_retention({"toy": TOY}, domains, tmp_path, **PLAN)
    weights = sum(p.nbytes for p in EmoForCausalLM.from_pretrained(TOY).parameters())
    assert weights <= reads.bytes <= 1.1 * weights


def test_one_changed_expert_is_noticed_and_the_sample_is_small(make_model):
    model = make_model()
    before = weight_sample(model)
    assert before == weight_sample(make_model())
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[7] *= 1.001
    assert weight_sample(model) != before
    assert weight_sample(model.to(torch.bfloat16)) != before


def test_models_with_different_tokens_are_not_compared(make_checkpoint, domains, tmp_path):
    folder = make_checkpoint(vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((TOY / name).read_text())
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][:100]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="'toy' and 'other' cut the same text into different tokens"):
        measure_retention({"toy": TOY, "other": folder}, domains, tmp_path, **PLAN)


def test_shares_need_layers_of_one_size(make_model):
    dense = make_model(num_experts_per_layer=[0, 12, 12], dense_intermediate_size=40).config
    assert num_experts_at(dense, 0.5) == 6
    mixed = make_model(num_experts_per_layer=[8, 12, 12]).config
    with pytest.raises(ValueError, match=r"layers have \[8, 12\] experts"):
        num_experts_at(mixed, 0.5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_tokens": 0}, "`batch_tokens` is 0, expected at least 1"),
        ({"batch_tokens": -5}, "`batch_tokens` is -5, expected at least 1"),
        ({"window": 0}, "`window` is 0 tokens, expected 2"),
        ({"window": -1}, "`window` is -1 tokens, expected 2"),
        ({"shares": [0.5, 0.0]}, "`share` is 0.0, expected a number above 0"),
        ({"shares": [float("nan")]}, "`share` is nan, expected a number above 0"),
        ({"num_calibration": 0}, "expected at least 1 document"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_measured(domains, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        measure_retention({"toy": TOY}, domains, tmp_path / "out", **setting)
    assert not (tmp_path / "out").exists()


def test_models_of_repositories_are_read_with_what_the_caller_says_of_the_hub(domains, tmp_path, monkeypatch):
    asked = []

    def pinned(model, hub_kwargs):
        asked.append((model, hub_kwargs))
        raise PermissionError

    monkeypatch.setattr(retention, "pinned", pinned)
    hub = {"revision": "v2", "token": "hf_secret", "cache_dir": str(tmp_path)}
    with pytest.raises(PermissionError):
        measure_retention({"toy": TOY, "theirs": "me/emo"}, domains, tmp_path, **hub)
    assert asked == [("me/emo", hub)]
    with pytest.raises(TypeError, match="unexpected keyword argument 'revison'"):
        measure_retention({"toy": TOY}, domains, tmp_path, revison="v2")
