"""The first selection methods: the authors' choices, ties, padding, and what is refused."""

import json

import pytest
import torch
from conftest import GOLDENS, TOY
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers_emo import SubsetError, select_experts

INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])


@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize("method", ["layerwise", "global"])
@pytest.mark.parametrize("loaded", [True, False], ids=["model", "folder"])
def test_choice_and_scores_are_the_authors(k, method, loaded):
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


def naive_layerwise(folder, batches, size):
    """The authors' way: for every layer the whole model again, cut down as far as it is chosen."""
    num_layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    kept = []
    scores = []
    for index in range(num_layers):
        experts = [*kept, *[list(range(12))] * (num_layers - index)]
        model = AutoModelForCausalLM.from_pretrained(folder, expert_subset=experts)
        sums, tokens = torch.zeros(11, dtype=torch.float64), 0
        for ids, mask in batches:
            with torch.no_grad():
                logits = model(ids, attention_mask=mask, output_router_logits=True).router_logits[index]
            counted = mask.flatten().bool()
            sums += logits[counted, :11].softmax(-1).double().sum(0)
            tokens += int(counted.sum())
        scores.append((sums / tokens).tolist())
        ranked = sorted(range(11), key=lambda e: (-scores[-1][e], e))
        kept.append(sorted([*ranked[: size - 1], 11]))
    return kept, scores


def padded_batches():
    generator = torch.Generator().manual_seed(3)
    batches = []
    for left in (False, True):
        ids = torch.randint(2, 96, (3, 9), generator=generator)
        mask = torch.ones_like(ids)
        for row, padding in enumerate((0, 2, 5)):
            place = slice(0, padding) if left else slice(9 - padding, 9)
            ids[row, place] = 0
            mask[row, place] = 0
        batches.append((ids, mask))
    return batches


@pytest.mark.parametrize("loaded", [True, False], ids=["model", "folder"])
@pytest.mark.parametrize("size", [3, 6, 11])
def test_one_pass_equals_the_naive_algorithm(make_checkpoint, size, loaded):
    folder, batches = make_checkpoint(shards=True, num_hidden_layers=5), padded_batches()
    kept, scores = naive_layerwise(folder, batches, size)
    subset = select_experts(
        AutoModelForCausalLM.from_pretrained(folder) if loaded else folder,
        input_ids=[ids for ids, _ in batches],
        attention_mask=[mask for _, mask in batches],
        num_experts=size,
        progress=False,
    )
    assert subset.method == "layerwise" and subset.experts == kept
    torch.testing.assert_close(
        torch.tensor(subset.scores)[:, :11], torch.tensor(scores), atol=1e-6, rtol=0, check_dtype=False
    )
    assert (
        kept
        != select_experts(
            folder, input_ids=[batches[0][0]], num_experts=size, method="random", progress=False
        ).experts
    )


@pytest.mark.parametrize("loaded", [True, False], ids=["model", "folder"])
@pytest.mark.parametrize("method", ["easy_ep", "reap"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_scores_of_outputs_equal_brute_force(make_checkpoint, method, loaded, implementation):
    folder, batches = make_checkpoint(), padded_batches()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation)
    inputs, outputs = {}, {}

    def note(index, args, output):
        inputs.setdefault(index, []).append(args[0])
        outputs.setdefault(index, []).append(output[0])

    hooks = [
        layer.mlp.register_forward_hook(lambda _, args, output, index=index: note(index, args, output))
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for ids, mask in batches:
            model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    expected = torch.zeros(3, 12, dtype=torch.float64)
    counts = torch.zeros(3, 12, dtype=torch.float64)
    for index, layer in enumerate(model.model.layers):
        gate, experts = layer.mlp.gate, layer.mlp.experts
        for (_, mask), h_BSD, y_BSD in zip(batches, inputs[index], outputs[index], strict=True):
            for h, y in zip(h_BSD[mask.bool()], y_BSD[mask.bool()], strict=True):
                logits = gate.weight @ h
                probs = logits[:11].softmax(0)
                picks = {int(e): float(probs[e]) for e in probs.topk(3).indices} | {11: 1.0}
                cosine = float(h @ (h + y) / h.norm() / (h + y).norm())
                for e, weight in picks.items():
                    half = experts.gate_up_proj[e] @ h
                    out = experts.down_proj[e] @ (half[:24] / (1 + (-half[:24]).exp()) * half[24:])
                    change = max(0.0, 1 - cosine) if method == "easy_ep" else 1.0
                    expected[index, e] += weight * float(out.norm()) * change
                    counts[index, e] += 1
    if method == "reap":
        expected /= counts.clamp(min=1)
    subset = select_experts(
        model if loaded else folder,
        input_ids=[ids for ids, _ in batches],
        attention_mask=[mask for _, mask in batches],
        num_experts=5,
        method=method,
        progress=False,
    )
    torch.testing.assert_close(
        torch.tensor(subset.scores, dtype=torch.float64), expected, atol=1e-5, rtol=1e-4
    )
    for ids, score in zip(subset.experts, expected[:, :11], strict=True):
        assert ids == sorted([*score.topk(4).indices.tolist(), 11])
