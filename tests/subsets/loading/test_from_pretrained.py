"""Loading part of a model: the right numbers, and only the wanted bytes."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import fresh_processes
import pytest
import torch
from conftest import TOY
from safetensors.torch import load_file, save_file
from tolerances import NETWORK, STORED, assert_other_numbers, assert_same_numbers, clear_words
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers_emo import EmoForCausalLM, ExpertSubset, SubsetError
from transformers_emo.checkpoints import Checkpoint, wanted_ranges
from transformers_emo.checkpoints.lazy_tensor import LazyTensor
from transformers_emo.checkpoints.local_files import LocalFiles
from transformers_emo.subsets.loading.wanted_tensors import lazy_parameters

INPUT_IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
UNIFORM = [[0, 3, 4, 8, 11], [1, 2, 5, 7, 11], [0, 6, 9, 10, 11]]
PER_LAYER = [[0, 3, 4, 8, 9, 10, 11], [5, 11], [0, 6, 11]]
VARIANTS = {
    "released": ({}, UNIFORM),
    "other sizes per layer": ({}, PER_LAYER),
    "no shared": ({"num_shared_experts": 0}, UNIFORM),
    "two shared": ({"num_shared_experts": 2}, [[*ids, 10] if 10 not in ids else ids for ids in UNIFORM]),
    "always active": (
        {"num_shared_experts": 0, "always_active_experts": [11, 4]},
        [[*{*ids, 4}] for ids in UNIFORM],
    ),
    "dense first": (
        {"num_experts_per_layer": [0, 12, 12], "dense_intermediate_size": 40, "dense_mlp_bias": True},
        [None, *PER_LAYER[1:]],
    ),
    "grouped queries": ({"num_key_value_heads": 2}, UNIFORM),
}


@pytest.fixture(params=VARIANTS)
def variant(request, make_checkpoint):
    changes, experts = VARIANTS[request.param]
    return make_checkpoint(**changes), experts


def forward(model, **kwargs):
    with torch.no_grad():
        return model(INPUT_IDS, **kwargs).logits


def masked_by_hand(model, experts):
    """Logits of the full model with -inf added to the router logits of the experts dropped."""
    linear = torch.nn.functional.linear
    bias = {}
    for layer, ids in zip(model.model.layers, experts, strict=True):
        if ids is not None:
            weight = layer.mlp.gate.weight
            dropped = torch.full((len(weight),), float("-inf"))
            bias[id(weight)] = dropped.index_fill(0, torch.tensor(ids), 0.0)
    with mock.patch("torch.nn.functional.linear", lambda x, w, b=None: linear(x, w, bias.get(id(w), b))):
        return forward(model)


def test_subset_is_the_full_model_with_the_other_logits_at_minus_infinity(variant):
    folder, experts = variant
    full = AutoModelForCausalLM.from_pretrained(folder)
    subset = AutoModelForCausalLM.from_pretrained(folder, expert_subset=experts)
    expected = masked_by_hand(full, experts)
    assert_other_numbers(forward(full), expected)  # the mask does matter here
    assert_same_numbers(forward(subset), expected)
    with full.use_experts(experts):
        assert_same_numbers(forward(full), expected)


def test_tensors_kept_are_the_original_bytes(variant, tmp_path):
    folder, experts = variant
    model = AutoModelForCausalLM.from_pretrained(folder, expert_subset=experts)
    model.save_pretrained(tmp_path)
    original, saved = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    expected = {}
    for name, tensor in original.items():
        parts = name.split(".")
        if ".mlp.experts." in name:
            layer, expert = int(parts[2]), int(parts[5])
            if expert not in experts[layer]:
                continue
            parts[5] = str(sorted(experts[layer]).index(expert))
        elif name.endswith("mlp.gate.weight"):
            tensor = tensor[sorted(experts[int(parts[2])])]
        expected[".".join(parts)] = tensor
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name


def test_saved_subset_stands_alone(variant, tmp_path):
    folder, experts = variant
    model = AutoModelForCausalLM.from_pretrained(folder, expert_subset=experts)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(forward(again), forward(model))
    assert again.config.retained_experts == [ids and sorted(ids) for ids in experts]
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert again.generate(INPUT_IDS, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_subset_of_a_saved_subset_is_the_subset_of_the_full_model(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM).save_pretrained(tmp_path)
    inner = [[3, 8, 11], [1, 7, 11], [0, 10, 11]]  # ids of the root model
    direct = AutoModelForCausalLM.from_pretrained(folder, expert_subset=inner)
    composed = AutoModelForCausalLM.from_pretrained(tmp_path, expert_subset=inner)
    assert torch.equal(forward(direct), forward(composed))
    assert composed.config.retained_experts == inner
    assert composed.config.root_experts_per_layer == [12, 12, 12]
    with pytest.raises(SubsetError, match="is not in this model"):
        AutoModelForCausalLM.from_pretrained(tmp_path, expert_subset=[[1, 11], [1, 11], [0, 11]])


def test_keeping_every_expert_changes_nothing(make_checkpoint):
    folder = make_checkpoint()
    everything = AutoModelForCausalLM.from_pretrained(folder, expert_subset=[list(range(12))] * 3)
    assert torch.equal(forward(everything), forward(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize("form", ["path", "str", "subset", "dict", "list", "name", "authors"])
def test_every_way_to_name_a_subset(make_checkpoint, tmp_path, form):
    folder = make_checkpoint()
    subset = ExpertSubset(UNIFORM)
    subset.save(tmp_path / "math.json")
    subset.save(folder / "subsets" / "math.json")
    value = {
        "path": tmp_path / "math.json",
        "str": str(tmp_path / "math.json"),
        "subset": subset,
        "dict": {"experts": UNIFORM},
        "list": UNIFORM,
        "name": "math",
        "authors": {"experts_kept_per_layer": UNIFORM, "prune_keep_k": 5, "num_shared_experts": 1},
    }[form]
    model = AutoModelForCausalLM.from_pretrained(folder, expert_subset=value)
    assert model.config.retained_experts == UNIFORM


def test_sharded_and_single_files_and_stacked_experts_load_alike(make_checkpoint, tmp_path):
    single, sharded = make_checkpoint(), make_checkpoint(shards=True)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.down_proj" in Checkpoint.from_folder(tmp_path).tensors
    logits = [
        forward(EmoForCausalLM.from_pretrained(f, expert_subset=PER_LAYER))
        for f in (single, sharded, tmp_path)
    ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_base_model_and_heads_load_subsets(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    causal = AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)
    base = AutoModel.from_pretrained(folder, expert_subset=UNIFORM)
    with torch.no_grad():
        assert torch.equal(base(INPUT_IDS).last_hidden_state, causal.model(INPUT_IDS).last_hidden_state)
    base.save_pretrained(tmp_path)  # its tensors are named without "model."
    inner = [[0, 11], [1, 11], [0, 11]]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, expert_subset=inner)
    assert again.config.num_experts == 2
    head = AutoModelForSequenceClassification.from_pretrained(folder, expert_subset=UNIFORM, num_labels=3)
    assert head(INPUT_IDS).logits.shape == (2, 3)


class TestComposition:
    """`expert_subset` together with what else `from_pretrained` takes."""

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto"])
    def test_dtype(self, make_checkpoint, dtype):
        folder = make_checkpoint()
        model = AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM, dtype=dtype)
        expected = (
            torch.float32 if dtype == "auto" else dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        )
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        full = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with full.use_experts(UNIFORM):
            assert_same_numbers(forward(model), forward(full), terms=NETWORK if dtype == "auto" else STORED)

    def test_attention_and_experts_implementation(self, make_checkpoint):
        model = AutoModelForCausalLM.from_pretrained(
            make_checkpoint(),
            expert_subset=UNIFORM,
            attn_implementation="eager",
            experts_implementation="batched_mm",
        )
        assert model.config._attn_implementation == "eager"
        assert model.config._experts_implementation == "batched_mm"

    @pytest.mark.parametrize("kwargs", [{"dtype": "auto"}, {"torch_dtype": "auto"}], ids=str)
    def test_automatic_dtype_of_a_class(self, make_checkpoint, kwargs):
        model = EmoForCausalLM.from_pretrained(make_checkpoint(), expert_subset=UNIFORM, **kwargs)
        assert model.dtype == torch.float32

    def test_path_with_dots_and_links(self, make_checkpoint, tmp_path, monkeypatch):
        folder = make_checkpoint(shards=True)
        linked = tmp_path / "latest"
        linked.symlink_to(folder)
        monkeypatch.chdir(tmp_path)
        for path in (f"../{tmp_path.name}/latest", linked, folder / ".." / folder.name):
            model = AutoModelForCausalLM.from_pretrained(path, expert_subset=UNIFORM)
            assert model.config.num_experts == 5

    def test_default_device(self, make_checkpoint):
        folder = make_checkpoint()
        lazies = lazy_parameters(
            Checkpoint.from_folder(folder), EmoForCausalLM.config_class.from_pretrained(folder), UNIFORM
        )
        with torch.device("meta"):
            assert lazies["model.layers.0.mlp.gate.weight"][...].device.type == "cpu"

    def test_adapter_folder_loads_the_subset_of_its_base(self, make_checkpoint, tmp_path):
        peft = pytest.importorskip("peft", reason="peft is an optional part of Transformers")
        folder = make_checkpoint()
        base = EmoForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)
        adapted = peft.get_peft_model(
            base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        )
        adapted.peft_config["default"].base_model_name_or_path = os.fspath(folder)
        adapted.save_pretrained(tmp_path)
        expected = forward(adapted)
        for cls in (EmoForCausalLM, AutoModelForCausalLM):
            assert torch.equal(forward(cls.from_pretrained(tmp_path, expert_subset=UNIFORM)), expected)

    def test_device_map_auto(self, make_checkpoint):
        folder = make_checkpoint()
        model = AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM, device_map="auto")
        expected = AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)
        assert torch.equal(forward(model), forward(expected))

    @pytest.mark.parametrize("subset", [UNIFORM, None], ids=["subset", "full"])
    def test_disk_offload(self, make_checkpoint, tmp_path, subset):
        folder = make_checkpoint()
        device_map = {
            "model.embed_tokens": "cpu",
            "model.layers": "disk",
            "model.norm": "cpu",
            "lm_head": "cpu",
        }
        device_map["model.rotary_emb"] = "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            folder, expert_subset=subset, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        expected = AutoModelForCausalLM.from_pretrained(folder, expert_subset=subset)
        assert torch.equal(forward(model), forward(expected))

    def test_config_given_and_changed(self, make_checkpoint):
        folder = make_checkpoint()
        config = EmoForCausalLM.config_class.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, expert_subset=UNIFORM)
        assert model.config.num_experts == 5 and config.num_experts == 12
        model = EmoForCausalLM.from_pretrained(folder, expert_subset=UNIFORM, router_aux_loss_coef=0.5)
        assert model.config.router_aux_loss_coef == 0.5

    def test_loading_info_is_clean(self, make_checkpoint):
        _, info = AutoModelForCausalLM.from_pretrained(
            make_checkpoint(), expert_subset=UNIFORM, output_loading_info=True
        )
        assert not any(
            info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        )

    def test_quantisation_while_loading(self, make_checkpoint):
        pytest.importorskip("torchao", reason="torchao is an optional part of Transformers")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        folder = make_checkpoint()
        config = TorchAoConfig(Int8WeightOnlyConfig())
        model = AutoModelForCausalLM.from_pretrained(
            folder, expert_subset=UNIFORM, quantization_config=config
        )
        plain = AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)
        assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
        close = torch.nn.functional.cosine_similarity(forward(model), forward(plain), dim=-1)
        assert close.min() > 0.98


class TestBytes:
    def test_only_wanted_bytes_are_read(self, make_checkpoint, monkeypatch):
        folder = make_checkpoint(shards=True)
        reads = []
        read_into = LocalFiles.read_into

        def recorded(self, file, start, buffer):
            reads.append((file, start, start + len(buffer)))
            read_into(self, file, start, buffer)

        monkeypatch.setattr(LocalFiles, "read_into", recorded)
        model = AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)
        tensors = sum(parameter.numel() * 4 for parameter in model.parameters())
        header_end = {
            file.name: 8 + int.from_bytes(file.read_bytes()[:8], "little")
            for file in folder.glob("*.safetensors")
        }
        data = [read for read in reads if read[1] >= header_end[read[0]]]
        assert sum(end - start for _, start, end in data) == tensors

    @pytest.mark.skipif(
        not Path("/proc/self/io").exists(), reason="counts reads with the Linux kernel's own counter"
    )
    def test_the_kernel_counts_no_more_than_the_kept_tensors(self, make_checkpoint):
        # In a process of its own. A memory map would read without being counted: there must be none.
        folder = make_checkpoint(
            num_hidden_layers=2, hidden_size=128, intermediate_size=128, num_experts=64, vocab_size=1000
        )
        code = f"""
import os, torch, transformers_emo
from pathlib import Path
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({os.fspath(TOY)!r})  # so that every module is imported
counted = lambda: int(Path("/proc/self/io").read_text().split()[1])  # rchar, its first line
before = counted()
model = AutoModelForCausalLM.from_pretrained({os.fspath(folder)!r}, expert_subset=[[0, 20, 40, 63]] * 2)
read = counted() - before
# Only now, for this file is read too: it is long where PyTorch has many libraries.
assert {os.fspath(folder)!r} not in Path("/proc/self/maps").read_text()
print(read, sum(p.numel() * 4 for p in model.parameters()))
"""
        run = fresh_processes.run(code, check=True)
        read, kept = map(int, run.stdout.split()[-2:])
        headers = 2 * (8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little"))
        assert read <= 1.02 * kept + headers + 20_000  # 20 kB: the config files

    def test_wanted_ranges_name_just_the_kept_tensors(self, make_checkpoint):
        folder = make_checkpoint(shards=True)
        config = EmoForCausalLM.config_class.from_pretrained(folder)
        lazies = lazy_parameters(Checkpoint.from_folder(folder), config, UNIFORM)
        ranges = wanted_ranges(lazies.values())
        model = AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)
        wanted = sum(end - start for spans in ranges.values() for start, end in spans)
        assert wanted == sum(parameter.numel() * 4 for parameter in model.parameters())


class TestMasks:
    """`use_experts` and `generate(expert_subset=...)` on a full model."""

    def test_generate_with_a_subset_is_the_loaded_subset(self, make_checkpoint):
        folder = make_checkpoint()
        full = AutoModelForCausalLM.from_pretrained(folder)
        subset = AutoModelForCausalLM.from_pretrained(folder, expert_subset=PER_LAYER)
        for kwargs in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
            expected = clear_words(subset, INPUT_IDS, max_new_tokens=8, **kwargs)
            ids = full.generate(INPUT_IDS, max_new_tokens=8, expert_subset=PER_LAYER, **kwargs)
            assert torch.equal(ids, expected)

    def test_mask_ends_with_the_context_even_after_an_error(self, make_model):
        model = make_model()
        before = forward(model)
        with pytest.raises(RuntimeError, match="stop"), model.use_experts(UNIFORM):
            assert_other_numbers(forward(model), before)
            raise RuntimeError("stop")
        assert torch.equal(forward(model), before)

    def test_threads_with_subsets_of_their_own_do_not_mix(self, make_model):
        model = make_model()
        subsets = [UNIFORM, PER_LAYER]

        def generate(index):
            return model.generate(INPUT_IDS, expert_subset=subsets[index], max_new_tokens=8, do_sample=False)

        expected = [generate(0), generate(1)]
        with ThreadPoolExecutor(4) as pool:
            for index, ids in enumerate(pool.map(generate, [0, 1] * 6)):
                assert torch.equal(ids, expected[index % 2])
        assert model.model.expert_masks == [None] * 3

    def test_masks_nest(self, make_model):
        model = make_model()
        with model.use_experts(PER_LAYER):
            outer = forward(model)
            with model.use_experts(UNIFORM):
                assert_other_numbers(forward(model), outer)
            assert torch.equal(forward(model), outer)

    def test_weights_and_router_logits_stay_as_they_are(self, make_model):
        model = make_model()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        plain = model(INPUT_IDS, output_router_logits=True).router_logits
        with model.use_experts(UNIFORM):
            masked = model(INPUT_IDS, output_router_logits=True).router_logits
        assert torch.equal(
            masked[0], plain[0]
        )  # raw logits: the first layer's input does not depend on the mask
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    def test_gradients_reach_only_the_kept_experts(self, make_model):
        model = make_model().train()
        with model.use_experts(UNIFORM):
            model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
        for layer, ids in zip(model.model.layers, UNIFORM, strict=True):
            dropped = [e for e in range(12) if e not in ids]
            assert layer.mlp.experts.down_proj.grad[dropped].abs().sum() == 0
            assert layer.mlp.gate.weight.grad[dropped].abs().sum() == 0

    def test_shared_experts_cannot_be_masked(self, make_model):
        model = make_model()
        for subset in (ExpertSubset([[0, 1]] * 3, drop_shared=True), [[0, 1]] * 3):
            with pytest.raises(SubsetError, match="cannot be a mask|drops expert 11"):
                model.generate(INPUT_IDS, expert_subset=subset)

    def test_subset_model_takes_root_ids(self, make_checkpoint):
        folder = make_checkpoint()
        small = AutoModelForCausalLM.from_pretrained(folder, expert_subset=UNIFORM)
        inner = [[3, 8, 11], [1, 7, 11], [0, 10, 11]]
        with small.use_experts(inner):
            masked = forward(small)
        expected = forward(AutoModelForCausalLM.from_pretrained(folder, expert_subset=inner))
        assert_same_numbers(masked, expected)


def test_whole_model_is_read_without_the_checkpoint_staying_mapped(make_checkpoint):
    folder = make_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    if Path("/proc/self/maps").exists():
        assert os.fspath(folder) not in Path("/proc/self/maps").read_text()
    (folder / "model.safetensors").write_bytes(b"")  # what is loaded does not depend on the file
    assert torch.isfinite(forward(model)).all()


def test_whole_model_beside_tensors_of_rare_dtypes_loads(make_checkpoint):
    folder = make_checkpoint()
    expected = forward(EmoForCausalLM.from_pretrained(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors["extra"] = torch.zeros(3, dtype=torch.uint32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(forward(EmoForCausalLM.from_pretrained(folder)), expected)


def test_whole_model_with_other_shapes_is_left_to_transformers(make_checkpoint, edit_json):
    folder = make_checkpoint()
    edit_json(folder / "config.json", num_experts=16)
    model = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.config.num_experts == 16


def test_weights_for_a_device_are_read_straight_into_it(make_checkpoint, monkeypatch):
    """Each layer where the map wants it; no tensor is whole in the host's memory before."""
    folder, devices = make_checkpoint(), {}
    read = LazyTensor._read_rows

    def note(lazy, *rows):
        devices[lazy.pieces[0].start] = lazy.device
        return read(lazy, *rows)

    monkeypatch.setattr(LazyTensor, "_read_rows", note)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "meta", "lm_head": "meta"}
    layers = {"model.layers.0": "cpu", "model.layers.1": "meta", "model.layers.2": "meta"}
    for place, found in (({"": "meta"}, {"meta"}), (places | layers, {"meta", None}), ("cpu", {None})):
        devices.clear()
        EmoForCausalLM.from_pretrained(folder, expert_subset=[[0, 3, 11]] * 3, device_map=place)
        assert {device and device.type for device in devices.values()} == found
