"""One pass over the layers against the algorithms written out naively; and how little it reads and holds."""

import gc
import weakref

import pytest
import torch
from tolerances import assert_same_scores
from transformers import AutoConfig, AutoModelForCausalLM
from transformers_emo import select_experts
from transformers_emo.checkpoints import Checkpoint
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.subsets.choosing import layer_passes
from transformers_emo.subsets.choosing.layer_sources import CheckpointLayers


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
    assert_same_scores([layer[:11] for layer in subset.scores], scores)
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
    model.requires_grad_(False)
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
    assert_same_scores(subset.scores, expected.tolist())
    for ids, score in zip(subset.experts, expected[:, :11], strict=True):
        assert ids == sorted([*score.topk(4).indices.tolist(), 11])


def merged(ranges):
    out = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


@pytest.mark.parametrize("sizes", [4, [3, 6]])
def test_only_the_experts_that_are_kept_are_read(make_checkpoint, monkeypatch, sizes):
    folder, read = make_checkpoint(), []
    read_into = LocalFiles.read_into

    def note(self, file, start, buffer):
        read.append((start, start + len(buffer)))
        read_into(self, file, start, buffer)

    header = Checkpoint.from_folder(folder).tensors
    monkeypatch.setattr(LocalFiles, "read_into", note)
    ids = torch.tensor([[5, 17, 60, 2, 33, 8, 90]])
    chosen = select_experts(folder, input_ids=[ids], num_experts=sizes, progress=False)
    choices = [subset.experts for subset in (chosen if isinstance(chosen, list) else [chosen])]
    kept = [{e for ids in layer for e in ids} for layer in zip(*choices, strict=True)]
    wanted = [(0, 8), (8, min(span.start for span in header.values()))]
    for name, span in header.items():
        if name == "model.embed_tokens.weight":
            row = (span.end - span.start) // span.shape[0]
            wanted += [(span.start + i * row, span.start + (i + 1) * row) for i in ids.unique().tolist()]
        elif ".experts." in name:
            layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
            if layer < 2 and expert in kept[layer]:  # of the last layer, only the router is needed
                wanted.append((span.start, span.end))
        elif ".layers." in name:
            wanted.append((span.start, span.end))
    assert merged(read) == merged(wanted)
    spans = [(span.start, span.end) for name, span in header.items() if ".experts." in name]
    of_experts = [r for r in read if any(start <= r[0] < end for start, end in spans)]
    assert len(of_experts) == len(set(of_experts))  # each once, whatever the number of choices


@pytest.mark.parametrize(
    ("method", "sizes"), [("layerwise", [5] * 3), ("global", [12] * 3), ("reap", [12] * 4)]
)
def test_memory_holds_one_layer_at_most(make_checkpoint, monkeypatch, method, sizes):
    read, held = [], []
    experts = CheckpointLayers.experts

    def note(self, index, kept):
        gc.collect()
        assert all(stacked() is None for stacked in read)
        parameters = [
            p for i, layer in enumerate(self.network.layers) for p in layer.parameters() if i != index
        ]
        assert all(p.is_meta for p in parameters) and self.embedding_VD is None
        stacked, ids = experts(self, index, kept)
        read.append(weakref.ref(stacked))
        held.append(stacked.num_experts)
        return stacked, ids

    monkeypatch.setattr(CheckpointLayers, "experts", note)
    batches = padded_batches()
    select_experts(
        make_checkpoint(num_hidden_layers=4),
        input_ids=[ids for ids, _ in batches],
        num_experts=5,
        method=method,
        progress=False,
    )
    assert held == sizes  # of the last layer, experts are needed only for their outputs


@pytest.mark.parametrize("method", ["layerwise", "easy_ep"])
def test_hidden_states_on_disk_change_nothing(make_checkpoint, method):
    folder, batches = make_checkpoint(), padded_batches()
    arguments = {
        "input_ids": [ids for ids, _ in batches],
        "attention_mask": [mask for _, mask in batches],
        "num_experts": [4, 6] if method == "layerwise" else 4,
        "method": method,
        "progress": False,
    }
    expected = select_experts(folder, **arguments)
    for limit in (0, 4000):  # a batch has 3 * 9 * 32 float32 numbers
        assert select_experts(folder, hidden_memory=limit, **arguments) == expected


def test_outputs_of_experts_do_not_depend_on_how_tokens_are_divided(make_checkpoint, monkeypatch):
    folder, batches = make_checkpoint(), padded_batches()
    arguments = {
        "input_ids": [ids for ids, _ in batches],
        "num_experts": 4,
        "method": "reap",
        "progress": False,
    }
    expected = select_experts(folder, **arguments)
    monkeypatch.setattr(layer_passes, "_OUTPUT_TOKENS", 5)
    got = select_experts(folder, **arguments)
    assert_same_scores(got.scores, expected.scores)


def test_the_content_of_padding_does_not_matter(make_checkpoint):
    folder, batches = make_checkpoint(), padded_batches()
    arguments = {"num_experts": 5, "progress": False, "attention_mask": [mask for _, mask in batches]}
    for method in ("layerwise", "easy_ep"):
        expected = select_experts(folder, input_ids=[ids for ids, _ in batches], method=method, **arguments)
        other = [torch.where(mask.bool(), ids, 77) for ids, mask in batches]
        assert select_experts(folder, input_ids=other, method=method, **arguments) == expected
