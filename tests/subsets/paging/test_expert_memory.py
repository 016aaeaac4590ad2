"""`from_pretrained(..., expert_memory=...)`: the whole model's outputs, and no byte too many is read."""

import copy
import json
import os
import pickle
import threading

import pytest
import torch
from hub_server import HubServer
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tolerances import assert_same_numbers, clear_words
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers_emo import CheckpointError, EmoForCausalLM, PackedConfig
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.checkpoints.source_files import SourceChangedError
from transformers_emo.conversion import shard_experts
from transformers_emo.quantization.packed_parts import parts_of
from transformers_emo.training import lora_config

IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
EXPERT = 3 * 24 * 32 * 4  # bytes of one expert of a small model
VARIANTS = {
    "released": {},
    "no shared": {"num_shared_experts": 0},
    "two shared": {"num_shared_experts": 2},
    "always active": {"num_shared_experts": 0, "always_active_experts": [7, 3]},
    "dense first": {
        "num_experts_per_layer": [0, 12, 12],
        "dense_intermediate_size": 40,
        "dense_mlp_bias": True,
    },
    "unequal": {"num_experts_per_layer": [12, 5, 8]},
}


def load(folder, slots, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, expert_memory=slots * EXPERT, **kwargs)


def whole(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model, **kwargs):
    with torch.no_grad():
        return model(IDS, **kwargs).logits


@pytest.fixture
def reads(monkeypatch):
    """The parts of files that are read, headers not counted: (file, start, end)."""
    found, read_into = [], LocalFiles.read_into

    def recorded(self, file, start, buffer):
        header = 8 + int.from_bytes((self.folder / file).read_bytes()[:8], "little")
        if start >= header:
            found.append((file, start, start + len(buffer)))
        read_into(self, file, start, buffer)

    monkeypatch.setattr(LocalFiles, "read_into", recorded)
    return found


@pytest.mark.parametrize("slots", [4, 9, 1000], ids=["a token's", "a few", "all"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_outputs_are_those_of_the_whole_model(make_checkpoint, changes, slots):
    folder = make_checkpoint(**changes)
    paged, full = load(folder, slots), whole(folder)
    assert_same_numbers(logits(paged), logits(full))
    assert_same_numbers(logits(paged), logits(full))  # with what is in memory by now


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"document_pool": 5}, {"document_pool": 5, "num_beams": 2}],
    ids=str,
)
@pytest.mark.parametrize("slots", [4, 9])
def test_the_text_is_that_of_the_whole_model(make_checkpoint, slots, how):
    folder = make_checkpoint()
    texts = []
    for model in (load(folder, slots), whole(folder)):
        torch.manual_seed(1)
        texts.append(model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, **how))
    assert torch.equal(*texts)


@pytest.mark.parametrize("implementation", ["eager", "emo_sorted", "grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_runs_on_the_slots(make_checkpoint, implementation):
    folder = make_checkpoint()
    for slots in (4, 30):
        paged = load(folder, slots, experts_implementation=implementation)
        assert_same_numbers(logits(paged), logits(whole(folder, experts_implementation=implementation)))


def test_other_classes_and_parts_of_a_model(make_checkpoint):
    folder, subset = make_checkpoint(), [[0, 2, 3, 5, 7, 8, 11]] * 3
    assert_same_numbers(
        logits(load(folder, 5, expert_subset=subset)), logits(whole(folder, expert_subset=subset))
    )
    exclude = {0: [1, 2], 2: [5]}
    assert_same_numbers(
        logits(load(folder, 5, exclude_experts=exclude)), logits(whole(folder, exclude_experts=exclude))
    )
    paged = load(folder, 5)
    with paged.use_experts(subset):
        masked = logits(paged)
    assert_same_numbers(masked, logits(whole(folder, expert_subset=subset)))
    base = AutoModel.from_pretrained(folder, expert_memory=5 * EXPERT)
    assert base.expert_memory.report().slots == 5
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder)(IDS).last_hidden_state
        assert_same_numbers(base(IDS).last_hidden_state, expected)
    head = AutoModelForSequenceClassification.from_pretrained(folder, expert_memory=5 * EXPERT, num_labels=3)
    assert logits(head).shape == (2, 3)


@pytest.mark.parametrize("layout", ["several files", "expert by expert", "stacked", "bfloat16"])
def test_every_layout_and_dtype(make_checkpoint, tmp_path, layout):
    folder, kwargs = make_checkpoint(shards=layout == "several files"), {}
    if layout == "expert by expert":
        shard_experts(folder, tmp_path / "out", progress=False)
        folder = tmp_path / "out"
    elif layout == "stacked":
        whole(folder).save_pretrained(tmp_path, save_original_format=False)
        folder = tmp_path
    elif layout == "bfloat16":
        whole(folder).bfloat16().save_pretrained(tmp_path)
        folder, kwargs = tmp_path, {"dtype": torch.float32}
    assert_same_numbers(logits(load(folder, 6, **kwargs)), logits(whole(folder, **kwargs)))


def test_a_model_is_loaded_by_its_backbone_alone(make_checkpoint, reads):
    folder = make_checkpoint(shards=True)
    model = load(folder, 6)
    backbone = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(end - start for _, start, end in reads) == backbone + 3 * EXPERT  # one shared expert a layer
    assert model.expert_memory.report().always_used_bytes == 3 * EXPERT


def test_a_missing_expert_is_read_once_and_nothing_else(make_checkpoint, reads):
    folder = make_checkpoint(shards=True)
    for slots in (4, 100):
        model = load(folder, slots)
        reads.clear()
        logits(model)
        report = model.expert_memory.report()
        assert report.hits == 0 and report.tokens == IDS.numel()
        assert sum(end - start for _, start, end in reads) == report.bytes_read == report.misses * EXPERT
        assert len(set(reads)) == len(reads)  # none twice, however little room there is
    again = len(reads)
    logits(model)
    assert len(reads) == again and model.expert_memory.report().hits == report.misses
    model.expert_memory.reset_counts()
    assert model.expert_memory.report().hit_rate == 1 and model.expert_memory.report().bytes_per_token == 0
    assert "100.0% of the experts taken were there" in str(model.expert_memory.report())


def test_the_expert_not_used_for_longest_makes_room(make_checkpoint):
    memory = load(make_checkpoint(), 4).expert_memory

    def take(layer, *experts):
        with memory.at_work():
            return [None if group is None else sorted(group) for group in memory.groups(layer, experts, 1)]

    assert take(0, 1, 2) == take(1, 5, 6) == take(0, 1) == [None]
    assert take(2, 9) == [None]  # in place of the second expert of the first layer
    assert memory.report().resident == [[1, 11], [5, 6, 11], [9, 11]]
    assert take(1, 5, 11, 7) == [None]
    assert memory.report().resident == [[1, 11], [5, 7, 11], [9, 11]]
    assert take(1, 5, 1, 2, 3, 4, 6) == [[1, 2, 3, 5], [4, 6]]  # more than there is room for
    assert memory.report().resident[1] == [2, 3, 4, 6, 11]
    full = memory.report().resident[1][:-1]
    assert take(1, *full) == [None]
    others = sorted({*range(11)} - {*full})[:2]
    assert take(1, *full, *others) == [full, others]  # no room beside those that are there


def test_a_budget_for_less_than_a_token_is_refused_with_what_it_takes(make_checkpoint):
    folder = make_checkpoint()
    with pytest.raises(ValueError, match=f"room for 2 experts of {EXPERT}.*give at least {3 * EXPERT} bytes"):
        load(folder, 2)
    for wrong in ("6 parsecs", 0, -1, "6GiB"):
        with pytest.raises(ValueError, match="expert_memory is"):
            whole(folder, expert_memory=wrong)
    assert whole(folder, expert_memory="28KB").expert_memory.report().slots == 3


@pytest.mark.parametrize(
    "name, value",
    [("tp_plan", "auto"), ("check_weights", True), ("ignore_mismatched_sizes", True), ("state_dict", {})],
)
def test_what_does_not_go_with_it_is_refused(make_checkpoint, name, value):
    with pytest.raises(ValueError, match=f"expert_memory.*{name}"):
        load(make_checkpoint(), 5, **{name: value})


def test_a_device_map_over_several_places_is_refused(make_checkpoint):
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    with pytest.raises(ValueError, match="expert_memory.*one device"):
        load(make_checkpoint(), 5, device_map=places)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, tmp: model.train(),
        lambda model, tmp: model.save_pretrained(tmp),
        lambda model, tmp: model.push_to_hub("user/emo"),
        lambda model, tmp: model.state_dict(),
        lambda model, tmp: torch.save(model, tmp / "model.pt"),
        lambda model, tmp: pickle.dumps(model),
        lambda model, tmp: model.swap_experts([[0, 1, 2, 3, 11]] * 3),
        lambda model, tmp: model.share_backbone([[0, 1, 2, 3, 11]] * 3),
        lambda model, tmp: get_peft_model(model, lora_config(model, r=2, target_modules=["q_proj"])),
        lambda model, tmp: model.add_adapter(lora_config(model, r=2, target_modules=["q_proj"])),
        lambda model, tmp: model.half(),
        lambda model, tmp: model.to(torch.float64),
        lambda model, tmp: model.to("meta"),
        lambda model, tmp: model.requires_grad_(True)(IDS),
        lambda model, tmp: torch.export.export(model, (IDS,)),
        lambda model, tmp: torch.jit.trace(model, (IDS,)),
        lambda model, tmp: model.model.layers[0].mlp.experts.gate_up_proj,
    ],
)
def test_what_it_cannot_do_is_refused_and_changes_nothing(make_checkpoint, tmp_path, use):
    folder = make_checkpoint()
    model = load(folder, 5)
    with pytest.raises(Exception, match="expert_memory"):
        use(model, tmp_path)
    model.requires_grad_(False)
    assert not model.training and not list(tmp_path.glob("*.safetensors"))
    assert_same_numbers(logits(model), logits(whole(folder)))


def test_autocast_is_refused(make_checkpoint):
    model = load(make_checkpoint(), 5)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="expert_memory.*autocast"):
        logits(model)


def test_a_copy_has_a_memory_of_its_own(make_checkpoint):
    folder = make_checkpoint()
    model = load(folder, 5)
    logits(model)
    twin = copy.deepcopy(model)
    assert twin.expert_memory is not model.expert_memory and twin.expert_memory.report().misses == 0
    assert twin.model.layers[1].mlp.experts.memory is twin.expert_memory
    before = model.expert_memory.report()
    assert_same_numbers(logits(twin), logits(whole(folder)))
    assert model.expert_memory.report() == before


@pytest.mark.parametrize("when", ["written to", "cut short"])
def test_a_file_that_changed_meanwhile_is_refused(make_checkpoint, when):
    folder = make_checkpoint()
    model, expected = load(folder, 4), logits(whole(folder))
    file = folder / "model.safetensors"
    content = file.read_bytes()
    os.truncate(file, len(content) - (when == "cut short") * 100_000)
    if when == "written to":
        with file.open("r+b") as opened:
            opened.seek(-4, os.SEEK_END)
            opened.write(b"abcd")
    with pytest.raises(CheckpointError, match="changed after|cut short"):
        logits(model)
    file.write_bytes(content)
    stat = file.stat()
    before = model.expert_memory.files.files["model.safetensors"]
    os.utime(file, ns=(stat.st_atime_ns, before[3]))  # as it was: nothing of what failed is in the slots
    assert_same_numbers(logits(model), expected)


def test_a_file_that_was_replaced_is_refused(make_checkpoint):
    folder = make_checkpoint()
    model = load(folder, 4)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, folder / "new")
    os.replace(folder / "new", folder / "model.safetensors")
    with pytest.raises(SourceChangedError, match="expert_memory"):
        logits(model)


def test_two_threads_share_one_memory(make_checkpoint):
    folder = make_checkpoint()
    model = load(folder, 5)
    prompts = [torch.randint(2, 90, (1, 6), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    full = whole(folder)
    expected = [clear_words(full, prompt, max_new_tokens=8, do_sample=False) for prompt in prompts]
    found: dict[int, torch.Tensor] = {}

    def generate(number):
        found[number] = model.generate(prompts[number], max_new_tokens=8, do_sample=False)

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(4))


def test_an_adapter_of_a_model_with_paged_experts_is_refused_when_it_is_loaded(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    model = EmoForCausalLM.from_pretrained(folder)
    get_peft_model(model, lora_config(model, r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expert_memory.*adapters"):
        EmoForCausalLM.from_pretrained(tmp_path, expert_memory=5 * EXPERT)


FROM_THE_HUB = """
import json, torch
from transformers import AutoModelForCausalLM
import transformers_emo

def mark(name):
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session
    get_session().get(constants.ENDPOINT + "/mark/" + name)

out = {}
ids = torch.tensor([[5, 17, 60, 2, 33, 8, 90]])
kwargs = {"expert_memory": 6 * EXPERT, "expert_subset": SUBSET}
model = AutoModelForCausalLM.from_pretrained("user/emo", **kwargs)
mark("loaded")
out["logits"] = model(ids).logits.tolist()
out["read"] = model.expert_memory.report().bytes_read
mark("read")
again = AutoModelForCausalLM.from_pretrained("user/emo", local_files_only=True, **kwargs)
out["again"] = again(ids).logits.tolist()
try:
    again(torch.arange(2, 90)[None])
except OSError as error:
    out["error"] = str(error)
print(json.dumps(out))
"""


@pytest.mark.parametrize("subset", [None, [[0, 2, 3, 5, 7, 8, 11]] * 3], ids=["whole", "subset"])
@pytest.mark.parametrize("layout", ["by size", "expert by expert"])
def test_what_is_not_here_yet_is_fetched_from_the_hub_and_kept(make_checkpoint, tmp_path, layout, subset):
    folder = make_checkpoint(shards=True)
    if layout == "expert by expert":
        shard_experts(folder, tmp_path / "out", progress=False)
        folder = tmp_path / "out"
    with HubServer() as hub:
        hub.commit("user/emo", folder)
        code = FROM_THE_HUB.replace("EXPERT", str(EXPERT)).replace("SUBSET", str(subset))
        out = json.loads(hub.run(code).strip().splitlines()[-1])
        marks = [place for place, request in enumerate(hub.requests) if "/mark/" in request.path]
        sent = [
            sum(request.body_bytes for request in part if (request.file or "").endswith(".safetensors"))
            for part in (
                hub.requests[: marks[0]],
                hub.requests[marks[0] : marks[1]],
                hub.requests[marks[1] :],
            )
        ]
    full = whole(make_checkpoint(shards=True), expert_subset=subset)
    with torch.no_grad():
        expected = full(IDS[:1]).logits
    assert_same_numbers(torch.tensor(out["logits"]), expected)
    assert_same_numbers(torch.tensor(out["again"]), expected)
    headers = 60_000 if layout == "by size" else 40_000
    backbone = sum(p.nbytes for n, p in full.named_parameters() if ".experts." not in n) + 3 * EXPERT
    assert sent[0] < backbone + headers and out["read"] <= sent[1] < 1.1 * out["read"] + headers
    assert sent[2] == 0 and "offline" in out["error"]


@pytest.mark.parametrize("packing", [{"bits": 8}, {"bits": 4}, {"bits": 4, "symmetric": True}], ids=str)
def test_experts_in_few_bits_are_read_as_they_are_in_the_files(make_checkpoint, tmp_path, reads, packing):
    source = make_checkpoint(hidden_size=64, intermediate_size=32)
    config = PackedConfig(**packing)
    EmoForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(tmp_path)
    full = whole(tmp_path)
    expert = sum(
        part[0].nbytes
        for name in ("gate_up_proj", "down_proj")
        for part in parts_of(getattr(full.model.layers[0].mlp.experts, name)).values()
    )
    for slots in (4, 9, 100):
        paged = EmoForCausalLM.from_pretrained(tmp_path, expert_memory=slots * expert)
        assert paged.expert_memory.report().slots == min(slots, 33)
        reads.clear()
        assert_same_numbers(logits(paged), logits(full))
        assert sum(end - start for _, start, end in reads) == paged.expert_memory.report().bytes_read > 0
        assert len(set(reads)) == len(reads)
        inputs = {"inputs": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8}
        for how in ({}, {"document_pool": 5}, {"num_beams": 2}):
            texts = [model.generate(**inputs, do_sample=False, **how) for model in (paged, full)]
            assert torch.equal(*texts)
    subset = [[0, 2, 3, 5, 7, 8, 11]] * 3
    part = EmoForCausalLM.from_pretrained(tmp_path, expert_memory=5 * expert, expert_subset=subset)
    assert_same_numbers(logits(part), logits(whole(tmp_path, expert_subset=subset)))


def test_quantising_while_experts_are_read_is_refused_with_what_to_do(make_checkpoint):
    with pytest.raises(ValueError, match="PackedConfig.*without `expert_memory`, save it"):
        load(make_checkpoint(), 5, quantization_config=PackedConfig(bits=8))


def test_beams_of_a_padded_batch_share_the_slots(make_checkpoint):
    folder = make_checkpoint()
    ids = torch.tensor([[0, 0, 5, 17, 60], [44, 44, 3, 71, 12], [0, 9, 28, 6, 7]])
    kwargs = {"attention_mask": (ids != 0).long(), "num_beams": 3, "document_pool": 5, "max_new_tokens": 9}
    texts = [model.generate(ids, **kwargs) for model in (load(folder, 4), load(folder, 12), whole(folder))]
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[2])
