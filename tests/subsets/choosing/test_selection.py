"""Choosing experts: the authors' choices, every kind of input and model, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from conftest import GOLDENS, TOY
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tolerances import assert_other_numbers, assert_same_scores
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from transformers_emo import CheckpointError, ExpertSubset, SubsetError, select_experts
from transformers_emo.subsets.choosing import selection

INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])


@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize("method", ["layerwise", "global"])
@pytest.mark.parametrize("loaded", [True, False], ids=["model", "folder"])
def test_choice_and_scores_equal_those_of_the_authors(k, method, loaded):
    base = GOLDENS / "B_subset" / "base"
    golden = json.loads((base / f"{method}_k{k}.json").read_text())
    calibration = load_file(base / "calibration.safetensors")
    batches = [f"batch{index}" for index in range(3)]
    folder = GOLDENS / "A_hf_forward" / "base" / "checkpoint"
    subset = select_experts(
        AutoModelForCausalLM.from_pretrained(folder) if loaded else folder,
        input_ids=[calibration[f"{name}.input_ids"] for name in batches],
        attention_mask=[calibration[f"{name}.attention_mask"] for name in batches],
        num_experts=k,
        method=method,
        progress=False,
    )
    assert subset.experts == golden["experts_kept_per_layer"]
    assert subset.num_tokens == sum(int(calibration[f"{name}.attention_mask"].sum()) for name in batches)
    assert_same_scores(subset.scores, golden["scores_per_layer"])


def test_padding_and_batching_do_not_matter(make_model):
    model = make_model()
    alone = select_experts(model, input_ids=[INPUT_IDS[:1], INPUT_IDS[1:, :4]], num_experts=5, progress=False)
    padded = INPUT_IDS.clone()
    padded[1, 4:] = 0
    mask = torch.ones_like(padded)
    mask[1, 4:] = 0
    together = select_experts(model, input_ids=[padded], attention_mask=[mask], num_experts=5, progress=False)
    assert together.experts == alone.experts and together.num_tokens == alone.num_tokens == 11
    assert_same_scores(together.scores, alone.scores)


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
        ({"num_experts": [4, 13]}, SubsetError, "Cannot keep 13 experts"),
        ({"num_experts": []}, SubsetError, "at least one number"),
        ({"num_experts": 4, "tokens": "labels"}, ValueError, "Unknown tokens 'labels'"),
        ({"num_experts": 4, "tokens": "answer"}, ValueError, "give `labels`"),
        ({"num_experts": 4, "stop_when_settled": 2}, ValueError, "a number from 0 to 1"),
        (
            {"num_experts": 4, "attention_mask": [torch.zeros_like(INPUT_IDS)]},
            ValueError,
            "no calibration token",
        ),
    ],
)
def test_impossible_choices_are_refused(make_model, kwargs, error, message):
    with pytest.raises(error, match=message):
        select_experts(make_model(), **{"input_ids": [INPUT_IDS], "progress": False} | kwargs)


def test_one_text_or_one_batch_needs_no_list(make_model):
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
        ({"texts": ["a"], "tokens": "prompt"}, "give `answers`, chats or `labels`"),
        ({"texts": ["a"], "dtype": "float31"}, "Unknown dtype 'float31'"),
        ({"texts": ["a"], "num_experts": 4.0}, "`num_experts` is 4.0"),
        ({"input_ids": [INPUT_IDS], "attention_mask": [INPUT_IDS[:, :3]]}, "expected the same"),
        ({"texts": ["a"], "dtype": "int8"}, "Unknown dtype 'int8'"),
        ({"texts": ["a"], "device": "gpu"}, "Cannot run on the device 'gpu'"),
        ({"texts": ["a"], "batch_size": 0}, "`batch_size` is 0, expected an integer from 1"),
        ({"texts": ["a"], "max_texts": -1}, "`max_texts` is -1"),
        ({"texts": ["a"], "max_length": 1.5}, "`max_length` is 1.5"),
        ({"texts": ["a"], "hidden_memory": float("nan")}, "`hidden_memory` is nan, expected bytes"),
        ({"texts": ["a"], "labels": [INPUT_IDS]}, "`labels` goes with `input_ids`, which is not given"),
        ({"input_ids": [INPUT_IDS], "answers": ["a"]}, "`answers` goes with `texts`"),
        ({"texts": ["a"], "answer_column": "b"}, "`answer_column` goes with `dataset`"),
    ],
)
def test_misuse_has_a_clear_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        select_experts(TOY, **{"num_experts": 4, "progress": False} | kwargs)


def test_errors_for_wrappers_and_models_without_a_source_say_what_to_give(make_model):
    with pytest.raises(ValueError, match="the one inside a wrapper"):
        select_experts(torch.nn.Sequential(make_model()), ["a"], 4)
    with pytest.raises(ValueError, match="give the `tokenizer`"):
        select_experts(make_model(), ["a"], 4)


def test_choices_of_several_sizes_equal_each_choice_alone(make_checkpoint):
    folder = make_checkpoint()
    for source in (folder, AutoModelForCausalLM.from_pretrained(folder)):
        for method in ("layerwise", "global", "easy_ep"):
            arguments = {"input_ids": [INPUT_IDS], "method": method, "progress": False}
            together = select_experts(source, num_experts=[3, 7, 12], **arguments)
            assert [len(subset.experts[0]) for subset in together] == [3, 7, 12]
            for size, subset in zip([3, 7, 12], together, strict=True):
                alone = select_experts(source, num_experts=size, **arguments)
                assert alone.experts == subset.experts
                assert_same_scores(alone.scores, subset.scores)


@pytest.mark.parametrize("method", ["global", "easy_ep", "reap", "random"])
def test_scores_of_one_pass_make_every_smaller_choice(make_model, method):
    model = make_model()
    inputs = {} if method == "random" else {"input_ids": [INPUT_IDS]}
    large, small = select_experts(model, num_experts=[10, 4], method=method, progress=False, **inputs)
    assert large.experts != small.experts == large.top(4).experts
    assert ExpertSubset.from_dict(json.loads(json.dumps(large.to_dict()))).top(4) == large.top(4)
    assert ExpertSubset.from_dict(json.loads(json.dumps(large.to_dict()))) == large


def test_choice_needs_scores_and_enough_experts(make_model):
    subset = select_experts(make_model(), input_ids=[INPUT_IDS], num_experts=4, progress=False)
    with pytest.raises(SubsetError, match="expected 2 to 12"):
        subset.top(13)
    with pytest.raises(SubsetError, match="no scores"):
        ExpertSubset([[0, 1]]).top(1)
    with pytest.raises(SubsetError, match="Unknown budget 'free'"):
        subset.top(4, budget="free")


def test_budget_by_mass_gives_more_to_layers_that_spread(make_model):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.mul_(20)  # nearly one-hot
        model.model.layers[2].mlp.gate.weight.mul_(0.01)  # nearly uniform
    arguments = {"input_ids": [INPUT_IDS], "method": "global", "progress": False}
    subset = select_experts(model, num_experts=7, budget="mass", **arguments)
    sizes = [len(ids) for ids in subset.experts]
    assert sum(sizes) == 21 and sizes[0] < 7 < sizes[2] and min(sizes) >= 4
    assert all(11 in ids for ids in subset.experts)
    uniform = select_experts(model, num_experts=7, **arguments)
    assert uniform.top(7, budget="mass", least=3).experts == subset.experts
    with pytest.raises(ValueError, match="needs scores of all layers"):
        select_experts(model, input_ids=[INPUT_IDS], num_experts=7, budget="mass")


@pytest.mark.parametrize("method", ["layerwise", "global"])
def test_choice_stops_when_it_has_settled(make_checkpoint, method):
    folder = make_checkpoint()
    batches = [INPUT_IDS[:1]] * 16  # the same text again: settled from the beginning
    arguments = {"num_experts": 5, "method": method, "progress": False}
    for source in (folder, AutoModelForCausalLM.from_pretrained(folder)):
        subset = select_experts(source, input_ids=batches, stop_when_settled=1.0, **arguments)
        assert (subset.num_texts, subset.num_tokens) == (4, 28)
        assert [step["num_texts"] for step in subset.settling] == [1, 2, 4]
        assert [step.get("jaccard") for step in subset.settling] == [None, 1.0, 1.0]
        assert subset.experts == select_experts(source, input_ids=batches[:4], **arguments).experts


def test_a_choice_has_settled_when_it_agrees_twice_in_a_row(make_model, monkeypatch):
    agreements = iter([1.0, 0.2, 1.0, 0.95, 1.0])
    monkeypatch.setattr(selection, "jaccard", lambda *_: next(agreements))
    subset = select_experts(
        make_model(),
        input_ids=[INPUT_IDS[:1]] * 64,
        num_experts=5,
        method="global",
        stop_when_settled=0.9,
        progress=False,
    )
    assert [step.get("jaccard") for step in subset.settling] == [None, 1.0, 0.2, 1.0, 0.95]


def plant_domains(model):
    """Make tokens from 48 on those of a second domain, whose experts are the odd ones."""
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.5)[:, :2] = 0
        model.model.embed_tokens.weight[:48, 0] += 1
        model.model.embed_tokens.weight[48:, 1] += 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.experts.down_proj.mul_(0.01)
            layer.mlp.gate.weight.mul_(0.3)[:, :2] = 0
            layer.mlp.gate.weight[0::2, 0] += 1
            layer.mlp.gate.weight[1::2, 1] += 1
    return model


@pytest.mark.parametrize("method", ["layerwise", "global", "easy_ep", "reap"])
def test_planted_domains_get_exactly_their_experts(make_model, tmp_path, method):
    model = plant_domains(make_model(num_experts=13))
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for first, last, parity in ((2, 48, 0), (48, 96, 1)):
        ids = torch.randint(first, last, (4, 16), generator=generator)
        own = [[*range(parity, 12, 2), 12]] * 3
        for source in (model, tmp_path):
            chosen = select_experts(source, input_ids=[ids], num_experts=7, method=method, progress=False)
            assert chosen.experts == own
        assert select_experts(model, num_experts=7, method="random").experts != own


def test_choice_that_does_not_settle_says_so(make_model, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers_emo"), "propagate", True)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(2, 96, (1, 3), generator=generator) for _ in range(5)]
    arguments = {"num_experts": 5, "method": "global", "progress": False}
    subset = select_experts(make_model(), input_ids=batches, stop_when_settled=1.0, **arguments)
    assert subset.num_texts == 5 and [step["num_texts"] for step in subset.settling] == [1, 2, 4, 5]
    assert subset.experts == select_experts(make_model(), input_ids=batches, **arguments).experts
    assert "has not settled within 5 texts" in caplog.text


def test_only_the_tokens_asked_for_count(make_checkpoint):
    folder = make_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    labels = INPUT_IDS.clone()
    labels[0, :5] = labels[1, :2] = -100
    with torch.no_grad():
        logits = model(INPUT_IDS, output_router_logits=True).router_logits[0]
    probs = logits[:, :11].softmax(-1).double().view(2, 7, 11)
    answer = labels != -100
    expected = {
        ("answer", "token"): probs[answer].mean(0),
        ("prompt", "token"): probs[~answer].mean(0),
        ("answer", "text"): (probs[0][answer[0]].mean(0) + probs[1][answer[1]].mean(0)) / 2,
        ("all", "text"): probs.mean((0, 1)),
    }
    for (tokens, weight_by), score in expected.items():
        for source in (folder, model):
            subset = select_experts(
                source,
                input_ids=[INPUT_IDS],
                labels=[labels],
                tokens=tokens,
                weight_by=weight_by,
                num_experts=4,
                progress=False,
            )
            assert_same_scores([subset.scores[0][:11]], [score.tolist()])
            assert subset.num_tokens == {"answer": 7, "prompt": 7, "all": 14}[tokens]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_shared_experts": 0},
        {"num_shared_experts": 2},
        {"num_shared_experts": 0, "always_active_experts": [11, 4]},
        {"num_experts_per_layer": [0, 12, 9], "dense_intermediate_size": 40, "dense_mlp_bias": True},
        {"num_experts_per_layer": [12, 0, 9, 0], "num_hidden_layers": 4, "dense_intermediate_size": 40},
        {"num_key_value_heads": 2, "attention_bias": True},
    ],
    ids=["no shared", "two shared", "always active", "dense first", "dense last", "grouped queries"],
)
@pytest.mark.parametrize("method", ["layerwise", "global", "reap"])
def test_a_folder_gives_what_the_loaded_model_gives(make_checkpoint, changes, method):
    folder = make_checkpoint(**changes)
    arguments = {"input_ids": [INPUT_IDS], "num_experts": 4, "method": method, "progress": False}
    streamed = select_experts(folder, **arguments)
    loaded = select_experts(AutoModelForCausalLM.from_pretrained(folder), **arguments)
    assert streamed.experts == loaded.experts and streamed.always_kept == loaded.always_kept
    assert_same_scores(streamed.scores, loaded.scores)
    model = AutoModelForCausalLM.from_pretrained(folder, expert_subset=streamed)
    assert [n for n in model.config.layer_experts if not n.is_dense][0].num_experts == 4


def test_a_saved_subset_is_chosen_from_in_root_numbering(make_checkpoint, tmp_path):
    kept = [[0, 3, 4, 8, 11], [1, 2, 5, 7, 11], [0, 6, 9, 10, 11]]
    AutoModelForCausalLM.from_pretrained(make_checkpoint(), expert_subset=kept).save_pretrained(tmp_path)
    subset = select_experts(tmp_path, input_ids=[INPUT_IDS], num_experts=3, progress=False)
    assert all(set(ids) < set(parent) for ids, parent in zip(subset.experts, kept, strict=True))
    assert subset.always_kept == [[11]] * 3


def test_legacy_folders_are_read(make_checkpoint, edit_json):
    folder = make_checkpoint()
    arguments = {"input_ids": [INPUT_IDS], "num_experts": 4, "progress": False}
    expected = select_experts(folder, **arguments)
    legacy = ["FlexOlmoNoQKNormPrenormForCausalLM"]
    edit_json(folder / "config.json", model_type="flex_olmo_noqknorm_prenorm", architectures=legacy)
    assert select_experts(folder, **arguments) == expected


def test_a_bfloat16_model_can_be_run_in_float32(make_model, tmp_path):
    make_model().bfloat16().save_pretrained(tmp_path)
    arguments = {"input_ids": [INPUT_IDS], "num_experts": 4, "progress": False}
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    subset = select_experts(tmp_path, dtype="float32", **arguments)
    expected = select_experts(exact, **arguments)
    assert_same_scores(subset.scores, expected.scores)
    coarse = select_experts(tmp_path, **arguments)
    assert_other_numbers(coarse.scores, expected.scores)


@pytest.mark.parametrize("method", ["layerwise", "global", "easy_ep", "reap"])
@pytest.mark.parametrize("changes", [{}, {"num_shared_experts": 2}, {"num_experts_per_tok": 6}], ids=str)
def test_in_bfloat16_a_folder_and_a_model_agree_to_the_last_bit(make_model, tmp_path, method, changes):
    """Where both use the same batches."""
    make_model(hidden_size=128, intermediate_size=64, num_experts=48, **changes).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(2, 96, (3, 40), generator=generator), torch.ones(3, 40)
    mask[1, 29:] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "method": method, "progress": False}
    arguments["num_experts"] = [5, 12, 30]  # of which the first is fewer than a token picks, in one variant
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert select_experts(tmp_path, dtype="bfloat16", **arguments) == select_experts(model, **arguments)


@pytest.mark.parametrize("method", ["layerwise", "global", "easy_ep", "reap", "random"])
def test_a_model_under_a_mask_is_the_model_with_those_experts(make_checkpoint, method):
    folder, kept = make_checkpoint(), [[0, 3, 4, 8, 11], [1, 2, 5, 7, 11], [0, 6, 9, 10, 11]]
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = {} if method == "random" else {"input_ids": [INPUT_IDS]}
    arguments |= {"num_experts": [3, 4], "method": method, "progress": False}
    with model.use_experts(kept):
        masked = select_experts(model, **arguments)
        with pytest.raises(SubsetError, match="Cannot keep 6 experts in layer 0: it has 5"):
            select_experts(model, **arguments | {"num_experts": 6})
    small = AutoModelForCausalLM.from_pretrained(folder, expert_subset=kept)
    for subset, expected in zip(masked, select_experts(small, **arguments), strict=True):
        assert all(set(ids) <= set(there) for ids, there in zip(subset.experts, kept, strict=True))
        if method != "random":
            assert subset.experts == expected.experts
            assert_same_scores(subset.scores, expected.scores)


def test_offloaded_models_give_the_same_choice(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    whole = AutoModelForCausalLM.from_pretrained(folder)
    offloaded = cpu_offload(AutoModelForCausalLM.from_pretrained(folder), torch.device("cpu"))
    for method in ("layerwise", "reap"):
        arguments = {"input_ids": [INPUT_IDS], "num_experts": 4, "method": method, "progress": False}
        expected = replace(select_experts(whole, **arguments), fingerprint=None)  # weights are elsewhere
        assert select_experts(offloaded, **arguments) == expected


def test_texts_chats_datasets_and_files_are_read(tmp_path):
    documents = TOY / "documents" / "c.jsonl"
    rows = [json.loads(line) for line in documents.read_text().splitlines()][:3]
    arguments = {"num_experts": 8, "max_length": 64, "progress": False}
    expected = select_experts(TOY, [row["text"] for row in rows], **arguments)
    assert expected.num_texts == 3
    for dataset in (documents, rows, Dataset.from_list(rows).to_iterable_dataset()):
        assert select_experts(TOY, dataset=dataset, max_texts=3, **arguments) == expected
    questions = [{"question": "One and one is", "answer": " two."}]
    asked = select_experts(
        TOY, dataset=questions, column="question", answer_column="answer", tokens="answer", **arguments
    )
    assert asked == select_experts(TOY, "One and one is", answers=" two.", tokens="answer", **arguments)
    assert 0 < asked.num_tokens < len(" two.")


def test_folders_that_are_no_models_are_refused(make_checkpoint, edit_json, tmp_path):
    arguments = {"input_ids": [INPUT_IDS], "num_experts": 4, "progress": False}
    with pytest.raises(CheckpointError, match="no config.json"):
        select_experts(tmp_path, **arguments)
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(ValueError, match="of type 'olmoe', expected 'emo'"):
        select_experts(tmp_path, **arguments)
    folder = make_checkpoint()
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        select_experts(tmp_path, **arguments)
    lacking = {name: t for name, t in weights.items() if name != "model.layers.1.self_attn.q_proj.weight"}
    save_file(lacking, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight of shape None"):
        select_experts(tmp_path, **arguments)
    with pytest.raises(ValueError, match="no tokenizer in"):
        select_experts(folder, ["a"], 4)


def test_arguments_that_do_not_fit_the_model_are_refused(make_model):
    with pytest.raises(ValueError, match="The model is loaded, in torch.float32"):
        select_experts(make_model(), input_ids=[INPUT_IDS], num_experts=4, dtype="bfloat16")
    with pytest.raises(TypeError, match="unexpected keyword argument 'txets'"):
        select_experts(TOY, txets=["a"], num_experts=4)
    with pytest.raises(ValueError, match="no token 96: the model has ids from 0 to 95"):
        select_experts(make_model(), input_ids=[INPUT_IDS + 6], num_experts=4)
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="layer 1 are not finite"):
        select_experts(model, input_ids=[INPUT_IDS], num_experts=4, progress=False)
