"""The first selection methods: the authors' choices, ties, padding, and what is refused."""

import json

import pytest
import torch
from conftest import GOLDENS, TOY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_emo import SubsetError, select_experts

INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])


@pytest.mark.parametrize("k", [4, 8])
def test_global_choice_and_scores_are_the_authors(k):
    base = GOLDENS / "B_subset" / "base"
    golden = json.loads((base / f"global_k{k}.json").read_text())
    calibration = load_file(base / "calibration.safetensors")
    batches = [f"batch{index}" for index in range(3)]
    subset = select_experts(
        GOLDENS / "A_hf_forward" / "base" / "checkpoint",
        input_ids=[calibration[f"{name}.input_ids"] for name in batches],
        attention_mask=[calibration[f"{name}.attention_mask"] for name in batches],
        num_experts=k,
        progress=False,
    )
    assert subset.experts == golden["experts_kept_per_layer"]
    assert subset.num_tokens == sum(int(calibration[f"{name}.attention_mask"].sum()) for name in batches)
    torch.testing.assert_close(
        torch.tensor(subset.scores), torch.tensor(golden["scores_per_layer"]), atol=2e-6, rtol=0
    )


def test_padding_and_batching_do_not_matter(make_model):
    model = make_model()
    alone = select_experts(model, input_ids=[INPUT_IDS[:1], INPUT_IDS[1:, :4]], num_experts=5, progress=False)
    padded = INPUT_IDS.clone()
    padded[1, 4:] = 0
    mask = torch.ones_like(padded)
    mask[1, 4:] = 0
    together = select_experts(model, input_ids=[padded], attention_mask=[mask], num_experts=5, progress=False)
    assert together.experts == alone.experts and together.num_tokens == alone.num_tokens == 11
    torch.testing.assert_close(torch.tensor(together.scores), torch.tensor(alone.scores))


def test_shared_and_always_active_experts_are_always_kept(make_model):
    for changes, protected in (
        ({"num_shared_experts": 2}, {10, 11}),
        ({"num_shared_experts": 0, "always_active_experts": [4, 7]}, {4, 7}),
    ):
        model = make_model(**changes)
        for method in ("global", "random"):
            inputs = {"input_ids": [INPUT_IDS]} if method == "global" else {}
            subset = select_experts(model, num_experts=5, method=method, progress=False, **inputs)
            assert all(protected <= set(ids) and len(ids) == 5 for ids in subset.experts)


def test_dense_layers_are_left_out(make_model):
    model = make_model(num_experts_per_layer=[0, 12, 12], dense_intermediate_size=40)
    subset = select_experts(model, input_ids=[INPUT_IDS], num_experts=4, progress=False)
    assert subset.experts[0] is None and subset.scores[0] is None
    assert [len(ids) for ids in subset.experts[1:]] == [4, 4]


def test_ties_go_to_the_smaller_id(make_model):
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    subset = select_experts(model, input_ids=[INPUT_IDS], num_experts=4, progress=False)
    assert subset.experts == [[0, 1, 2, 11]] * 3


def test_random_choices_are_nested_and_depend_on_the_seed(make_model):
    model = make_model()
    choices = [select_experts(model, num_experts=k, method="random", seed=3).experts for k in range(2, 13)]
    for smaller, larger in zip(choices, choices[1:], strict=False):
        assert all(set(a) < set(b) for a, b in zip(smaller, larger, strict=True))
    assert choices[2] != select_experts(model, num_experts=4, method="random", seed=4).experts


def test_choice_on_a_subset_is_in_root_numbering(make_checkpoint):
    folder = make_checkpoint()
    kept = [[0, 3, 4, 8, 11], [1, 2, 5, 7, 11], [0, 6, 9, 10, 11]]
    small = AutoModelForCausalLM.from_pretrained(folder, expert_subset=kept)
    subset = select_experts(small, input_ids=[INPUT_IDS], num_experts=3, progress=False)
    assert all(set(ids) < set(parent) for ids, parent in zip(subset.experts, kept, strict=True))
    assert [score is None for score in subset.scores[0]] == [e not in kept[0] for e in range(12)]
    assert AutoModelForCausalLM.from_pretrained(folder, expert_subset=subset).config.num_experts == 3


def test_texts_choose_better_than_chance_on_a_trained_model():
    documents = [json.loads(line) for line in (TOY / "documents" / "python.jsonl").read_text().splitlines()]
    assert {document["split"] for document in documents} >= {"calibration", "test"}
    texts = [document["text"] for document in documents if document["split"] == "calibration"]
    chosen = select_experts(TOY, texts[:2], num_experts=8, max_length=256, progress=False)
    model = AutoModelForCausalLM.from_pretrained(TOY)
    random = select_experts(model, num_experts=8, method="random")
    test = next(document["text"] for document in documents if document["split"] == "test")
    ids = AutoTokenizer.from_pretrained(TOY)(test, return_tensors="pt")["input_ids"][:, :256]
    losses = {}
    for name, subset in (("full", None), ("chosen", chosen), ("random", random)):
        with torch.no_grad(), model.use_experts(subset or [list(range(32))] * 4):
            losses[name] = model(ids, labels=ids).loss.item()
    assert losses["chosen"] < losses["full"] + 0.3 < losses["random"]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_experts": 13}, SubsetError, "Cannot keep 13 experts in layer 0: it has 12"),
        ({"num_experts": 1}, SubsetError, "expected 2 to 12"),
        ({"num_experts": 4, "method": "best"}, ValueError, "Unknown method 'best'"),
        ({"num_experts": 4, "input_ids": None}, ValueError, "Give either"),
        ({"num_experts": 4, "texts": ["a"]}, ValueError, "Give either"),
        (
            {"num_experts": 4, "attention_mask": [torch.zeros_like(INPUT_IDS)]},
            ValueError,
            "no calibration token",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(make_model, kwargs, error, message):
    with pytest.raises(error, match=message):
        select_experts(make_model(), **{"input_ids": [INPUT_IDS], "progress": False} | kwargs)


def test_one_text_and_one_batch_are_taken_as_such(make_model):
    text = "Theorem plus_comm"
    one = select_experts(TOY, text, 8, progress=False)
    assert one.num_tokens == select_experts(TOY, [text], 8, progress=False).num_tokens < len(text)
    model = make_model()
    expected = select_experts(model, input_ids=[INPUT_IDS], num_experts=4, progress=False)
    for batch in (INPUT_IDS, INPUT_IDS.tolist(), [INPUT_IDS.tolist()]):
        assert (
            select_experts(model, input_ids=batch, num_experts=4, progress=False).experts == expected.experts
        )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"texts": []}, "no calibration token"),
        ({"texts": ["", ""]}, "no calibration token"),
        ({"texts": ["a"], "num_experts": 4.0}, "`num_experts` is 4.0"),
        ({"input_ids": [INPUT_IDS], "attention_mask": [INPUT_IDS[:, :3]]}, "expected the same"),
    ],
)
def test_misuse_has_a_clear_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        select_experts(TOY, **{"num_experts": 4, "progress": False} | kwargs)


def test_wrappers_and_models_from_nowhere_say_what_to_give(make_model):
    with pytest.raises(ValueError, match="the one inside a wrapper"):
        select_experts(torch.nn.Sequential(make_model()), ["a"], 4)
    with pytest.raises(ValueError, match="give the `tokenizer`"):
        select_experts(make_model(), ["a"], 4)
