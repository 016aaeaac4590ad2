"""A model in few bits is the model of the numbers that it keeps: loaded, saved, cut, swapped, adapted."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers_emo import (
    CheckpointError,
    EmoForCausalLM,
    EmoForSequenceClassification,
    PackedConfig,
    extract_subset,
    select_experts,
    write_back,
)
from transformers_emo.modeling_emo.kernels.packed.packed_tensor import PackedTensor
from transformers_emo.modeling_emo.kernels.packed.packed_weights import PackedWeight
from transformers_emo.subsets.fingerprint import agreement

IDS = torch.tensor([[5, 17, 60, 2, 33, 8, 90], [44, 44, 3, 71, 12, 9, 28]])
FIRST = [[0, 3, 4, 8, 11], [1, 2, 5, 7, 11], [0, 6, 9, 10, 11]]
SECOND = [[0, 1, 4, 9, 11], [1, 2, 3, 7, 11], [5, 6, 9, 10, 11]]
SIZES = {"intermediate_size": 32}
WAYS = {
    "4": PackedConfig(4, 16, True),
    "4 with zeros": PackedConfig(4, 32, symmetric=False),
    "8": PackedConfig(8),
    "8 with zeros": PackedConfig(8, 16, symmetric=False),
    "4, head 4": PackedConfig(4, 16, True, head_bits=4),
}
VARIANTS = {
    "released": ({}, FIRST),
    "other sizes per layer": ({}, [[0, 3, 4, 8, 9, 10, 11], [5, 11], [0, 6, 11]]),
    "dense first": (
        {"num_experts_per_layer": [0, 12, 12], "dense_intermediate_size": 64, "dense_mlp_bias": True},
        [None, *FIRST[1:]],
    ),
    "tied head": ({"tie_word_embeddings": True}, FIRST),
}


@pytest.fixture(params=WAYS)
def packing(request):
    return WAYS[request.param]


@pytest.fixture
def folder(make_checkpoint):
    return make_checkpoint(**SIZES)


def load(folder, **kwargs):
    return EmoForCausalLM.from_pretrained(folder, **kwargs)


def packed_names(model):
    return {name for name, tensor in model.state_dict().items() if isinstance(tensor, PackedTensor)}


def reference(model):
    """The same network with the numbers as ordinary tensors."""
    config = copy.deepcopy(model.config)
    config.quantization_config = None
    plain = type(model)(config).eval().to(model.dtype)
    state = {
        name: tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    plain.load_state_dict(state)
    return plain


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def assert_same_state(first, second):
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert isinstance(tensor, PackedTensor) == isinstance(other[name], PackedTensor), name
        if isinstance(tensor, PackedTensor):
            parts, others = tensor.weight.tensors, other[name].weight.tensors
            assert parts.keys() == others.keys(), name
            assert all(torch.equal(part, others[kind]) for kind, part in parts.items()), name
        else:
            assert torch.equal(tensor, other[name]), name


class TestLoading:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("cut", [False, True])
    def test_weights_are_the_nearest_and_the_rest_is_as_it_was(self, make_checkpoint, packing, variant, cut):
        changes, subset = VARIANTS[variant]
        folder = make_checkpoint(**SIZES | changes)
        kwargs = {"expert_subset": subset} if cut else {}
        plain, model = load(folder, **kwargs), load(folder, quantization_config=packing, **kwargs)
        expected = {
            name
            for name in plain.state_dict()
            if ".self_attn." in name or ("mlp" in name and name.endswith(("_proj", "_proj.weight")))
        }
        if variant != "tied head":
            expected.add("lm_head.weight")
        assert packed_names(model) == expected
        for name, tensor in plain.state_dict().items():
            found = model.state_dict()[name]
            if name in expected:
                group, bits = packing.group_of(tensor.shape[-1]), packing.bits
                if name == "lm_head.weight":
                    bits = packing.head_bits
                tensor = PackedWeight.quantise(tensor, bits, group, packing.symmetric).dequantise()
                found = found.dequantize()
            assert torch.equal(found, tensor), name
        assert model.lm_head.weight is model.model.embed_tokens.weight or variant != "tied head"
        torch.testing.assert_close(logits(model), logits(reference(model)), rtol=1e-4, atol=1e-5)
        assert not any(isinstance(p, PackedTensor) and p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_another_dtype(self, folder, packing, dtype):
        model = load(folder, quantization_config=packing, dtype=dtype)
        assert model.dtype == dtype == model.lm_head.weight.dtype
        found, expected = model(IDS).logits, reference(model)(IDS).logits
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1)
        # Where no gradients are recorded, activations may be rounded to 8 bits.
        torch.testing.assert_close(logits(model).float(), expected.float(), rtol=0.3, atol=0.3)

    def test_whole_and_part_of_the_auto_classes(self, folder):
        for kwargs in ({}, {"expert_subset": FIRST}):
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PackedConfig(), **kwargs)
            assert len(packed_names(model)) == 3 * 6 + 1
            assert model.config.quantization_config == PackedConfig()
            assert model.hf_quantizer.quantization_config == PackedConfig() and model.is_quantized

    def test_a_classifier_stays_as_it_is(self, folder):
        model = EmoForSequenceClassification.from_pretrained(
            folder, quantization_config=PackedConfig(8), num_labels=3
        )
        assert type(model.score.weight.data) is torch.Tensor and len(packed_names(model)) == 3 * 6

    def test_modules_can_be_left_out(self, folder, tmp_path):
        packing = PackedConfig(
            4, 16, modules_to_not_convert=["lm_head", r"re:.*layers\.1\.", "self_attn.v_proj"]
        )
        model = load(folder, quantization_config=packing)
        names = packed_names(model)
        assert "lm_head.weight" not in names and not any("layers.1." in name for name in names)
        assert "model.layers.0.self_attn.v_proj.weight" not in names and len(names) == 2 * 5
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert_same_state(model, again)
        assert again.config.quantization_config.modules_to_not_convert == packing.modules_to_not_convert
        assert "model.layers.1.mlp.experts.0.gate_proj.weight" in load_file(tmp_path / "model.safetensors")
        assert_same_state(
            load(tmp_path, expert_subset=FIRST),
            load(folder, expert_subset=FIRST, quantization_config=packing),
        )

    def test_memory_never_holds_the_weights_in_both_forms(self, folder, monkeypatch):
        """Each weight is read and quantised before the next one is read."""
        held = []
        plain = PackedWeight.quantise.__func__

        def quantise(cls, weight, *args, **kwargs):
            held.append(weight.numel())
            return plain(cls, weight, *args, **kwargs)

        monkeypatch.setattr(PackedWeight, "quantise", classmethod(quantise))
        model = load(folder, quantization_config=PackedConfig(4, 16, True))
        assert len(held) == len(packed_names(model))


class TestSaving:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_what_is_saved_is_loaded_without_the_original(self, make_checkpoint, packing, variant, tmp_path):
        changes, subset = VARIANTS[variant]
        model = load(make_checkpoint(**SIZES | changes), expert_subset=subset, quantization_config=packing)
        model.save_pretrained(tmp_path)
        for again in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
            assert_same_state(model, again)
            assert torch.equal(logits(model), logits(again))
            assert not any(isinstance(p, PackedTensor) and p.requires_grad for p in again.parameters())
        again.save_pretrained(tmp_path / "again", max_shard_size="40KB")
        assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
        assert_same_state(model, load(tmp_path / "again"))
        assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
            (tmp_path / "config.json").read_text()
        )

    def test_the_files_are_those_of_compressed_tensors(self, folder, tmp_path):
        load(folder, quantization_config=PackedConfig(4, 16, symmetric=False)).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        expert = "model.layers.2.mlp.experts.7.up_proj.weight"
        assert {
            name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if name.startswith(expert)
        } == {
            f"{expert}_packed": (torch.int32, (32, 4)),
            f"{expert}_scale": (torch.float32, (32, 2)),
            f"{expert}_zero_point": (torch.int32, (4, 2)),
            f"{expert}_shape": (torch.int64, (2,)),
        }
        assert tensors[f"{expert}_shape"].tolist() == [32, 32]
        assert "model.layers.2.mlp.gate.weight" in tensors and "model.embed_tokens.weight" in tensors
        config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
        weights = config["config_groups"]["group_0"]["weights"]
        assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 16)
        assert weights["type"] == "int" and weights["symmetric"] is False

    def test_a_part_of_what_is_saved(self, folder, packing, tmp_path):
        load(folder, quantization_config=packing).save_pretrained(tmp_path)
        part = load(tmp_path, expert_subset=FIRST)
        assert_same_state(part, load(folder, expert_subset=FIRST, quantization_config=packing))
        part.save_pretrained(tmp_path / "part")
        assert_same_state(part, load(tmp_path / "part"))
        with pytest.raises(ValueError, match="bits already"):
            load(tmp_path, quantization_config=PackedConfig(4, 8 * 2 if packing.group_size != 16 else 32))
        assert_same_state(part, load(tmp_path, expert_subset=FIRST, quantization_config=packing))

    def test_copies(self, folder, packing):
        model = load(folder, quantization_config=packing)
        expected = logits(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin), expected)
        other = load(folder, expert_subset=None, quantization_config=packing)
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits(other), expected)
        low = copy.deepcopy(model).to(torch.bfloat16)
        assert low.dtype == torch.bfloat16 == low.model.layers[0].mlp.experts.down_proj.dtype
        torch.testing.assert_close(logits(low), logits(reference(low)), rtol=0.1, atol=0.1)

    def test_code_that_cannot_read_them_is_not_saved_beside_them(self, folder, tmp_path):
        with pytest.raises(ValueError, match="cannot read quantised weights"):
            load(folder, quantization_config=PackedConfig()).save_pretrained(tmp_path, include_code=True)

    def test_weights_are_checked(self, folder, packing, tmp_path):
        load(folder, quantization_config=packing, check_weights=True).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight_scale"][3] = float("inf")
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight \(0 NaN, \d+ infinite\)"):
            load(tmp_path, check_weights=True)

    def test_back_to_ordinary_weights(self, folder, packing, tmp_path):
        model = load(folder, quantization_config=packing)
        expected = logits(reference(model))
        model.dequantize()
        assert not packed_names(model)
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(load(tmp_path)), expected)


class TestExtraction:
    def test_of_experts_that_were_chosen_on_the_model(self, folder, packing, tmp_path, caplog):
        subset = select_experts(folder, input_ids=[IDS], num_experts=5, progress=False)
        assert subset.fingerprint is not None
        extract_subset(folder, subset, tmp_path / "out", quantization_config=packing, progress=False)
        assert load(tmp_path / "out").config.retained_experts == subset.experts
        extract_subset(tmp_path / "out", subset, tmp_path / "again", progress=False)
        assert_same_state(load(tmp_path / "out"), load(tmp_path / "again"))
        assert not [record for record in caplog.records if "looks like another" in record.message]

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_it_writes_what_loading_and_saving_gives(
        self, make_checkpoint, packing, variant, dtype, tmp_path
    ):
        changes, subset = VARIANTS[variant]
        folder = make_checkpoint(**SIZES | changes)
        extract_subset(
            folder, subset, tmp_path / "out", dtype=dtype, quantization_config=packing, progress=False
        )
        kwargs = {} if dtype is None else {"dtype": dtype}
        load(folder, expert_subset=subset, quantization_config=packing, **kwargs).save_pretrained(
            tmp_path / "in"
        )
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "in"))
        assert one.keys() == other.keys()
        assert all(t.dtype == other[name].dtype and torch.equal(t, other[name]) for name, t in one.items())
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "in")]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]

    def test_in_shards(self, folder, packing, tmp_path):
        extract_subset(
            folder,
            FIRST,
            tmp_path / "out",
            quantization_config=packing,
            max_shard_size="20KB",
            progress=False,
        )
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        assert_same_state(
            load(tmp_path / "out"), load(folder, expert_subset=FIRST, quantization_config=packing)
        )

    def test_of_a_model_in_few_bits_copies_them(self, folder, packing, tmp_path):
        load(folder, quantization_config=packing).save_pretrained(tmp_path / "full")
        extract_subset(tmp_path / "full", FIRST, tmp_path / "out", progress=False)
        assert_same_state(
            load(tmp_path / "out"), load(folder, expert_subset=FIRST, quantization_config=packing)
        )
        with pytest.raises(ValueError, match="bits already"):
            extract_subset(
                tmp_path / "full",
                FIRST,
                tmp_path / "no",
                quantization_config=PackedConfig(8, 32),
                progress=False,
            )


class TestExperts:
    def test_masks_and_pools(self, folder, packing):
        model = load(folder, quantization_config=packing)
        plain = reference(model)
        with model.use_experts(FIRST), plain.use_experts(FIRST):
            torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
        found, expected = (logits(each, document_pool=4) for each in (model, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        texts = [
            each.generate(IDS, document_pool=4, max_new_tokens=4, do_sample=False) for each in (model, plain)
        ]
        assert torch.equal(*texts)

    @pytest.mark.parametrize("origin", ["quantised while loading", "saved"])
    def test_swapping(self, folder, packing, tmp_path, origin):
        kwargs = {"quantization_config": packing}
        if origin == "saved":
            load(folder, quantization_config=packing).save_pretrained(tmp_path / "full")
            folder, kwargs = tmp_path / "full", {}
        model = load(folder, expert_subset=FIRST, **kwargs)
        twin = model.share_backbone(SECOND)
        expected = load(folder, expert_subset=SECOND, **kwargs)
        assert_same_state(twin, expected)
        assert twin.model.layers[0].self_attn.q_proj.weight is model.model.layers[0].self_attn.q_proj.weight
        before = logits(model)
        assert torch.equal(logits(load(folder, expert_subset=FIRST, **kwargs)), before)
        model.swap_experts(SECOND)
        assert_same_state(model, expected)
        model.swap_experts([ids[1:] for ids in SECOND])
        assert_same_state(model, load(folder, expert_subset=[ids[1:] for ids in SECOND], **kwargs))
        model.save_pretrained(tmp_path / "swapped")
        assert_same_state(model, load(tmp_path / "swapped"))

    def test_swapping_from_what_is_kept_otherwise_is_refused(self, folder, tmp_path):
        load(folder, quantization_config=PackedConfig(8)).save_pretrained(tmp_path)
        for model in (
            load(folder, expert_subset=FIRST),
            load(folder, expert_subset=FIRST, quantization_config=WAYS["4"]),
        ):
            before = logits(model)
            with pytest.raises(CheckpointError, match="holds experts in 8 bits"):
                model.swap_experts(SECOND, source=tmp_path)
            assert torch.equal(logits(model), before)

    def test_writing_back_and_choosing_want_the_weights_as_they_were(self, folder, tmp_path):
        load(folder, quantization_config=PackedConfig(8)).save_pretrained(tmp_path / "packed")
        tuned = load(folder, expert_subset=FIRST, quantization_config=PackedConfig(8))
        for full, part in ((folder, tuned), (tmp_path / "packed", folder), (folder, tmp_path / "packed")):
            with pytest.raises(CheckpointError, match="quantised"):
                write_back(full, part, out=tmp_path / "out", progress=False)
        with pytest.raises(CheckpointError, match="quantised"):
            select_experts(tmp_path / "packed", texts=["a"], num_experts=4)

    def test_a_choice_made_on_the_model_as_it_was_gives_no_warning(self, folder, packing, caplog, tmp_path):
        subset = select_experts(load(folder), input_ids=[IDS], num_experts=5, progress=False)
        model = load(folder, quantization_config=packing)
        model.save_pretrained(tmp_path)
        with model.use_experts(subset):
            pass
        load(tmp_path, expert_subset=subset)
        assert not [record for record in caplog.records if "looks like another" in record.message]
        others = select_experts(model, input_ids=[IDS], num_experts=5, progress=False)
        assert agreement(others.fingerprint, subset.fingerprint) > 0.9

    def test_other_implementations_are_refused(self, folder):
        with pytest.raises(ValueError, match="grouped_mm"):
            load(folder, quantization_config=PackedConfig(8), experts_implementation="grouped_mm")
        eager = load(folder, quantization_config=PackedConfig(8), experts_implementation="eager")
        torch.testing.assert_close(
            logits(eager), logits(load(folder, quantization_config=PackedConfig(8))), rtol=1e-4, atol=1e-5
        )

    def test_inference_mode(self, folder, packing):
        model = load(folder, quantization_config=packing)
        with torch.inference_mode():
            found = model(IDS).logits
        assert torch.equal(found, logits(model))


class TestTraining:
    TARGETS = {
        "attention": {"target_modules": ["q_proj", "v_proj"]},
        "experts": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
        "one part of the experts": {"target_parameters": ["mlp.experts.down_proj"]},
        "attention, experts and router": {
            "target_modules": ["q_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        },
    }

    def adapted(self, model, names=("default",), **targets):
        peft = pytest.importorskip("peft")
        from transformers_emo.training import lora_config

        torch.manual_seed(0)
        config = lora_config(model, r=2, **targets)
        adapted = peft.get_peft_model(model, config)
        for name in names[1:]:
            adapted.add_adapter(name, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        adapted.base_model.set_adapter(list(names))
        return adapted

    @pytest.mark.parametrize("targets", TARGETS)
    @pytest.mark.parametrize("names", [("default",), ("default", "other")])
    def test_adapters_get_the_gradients_that_they_get_on_the_numbers(self, folder, packing, targets, names):
        model = load(folder, quantization_config=packing)
        expected = self.adapted(reference(model), names, **self.TARGETS[targets])
        found = self.adapted(model, names, **self.TARGETS[targets])
        gradients = []
        for each in (expected, found):
            embeds = each.get_base_model().model.embed_tokens(IDS).detach().requires_grad_()
            loss = each(inputs_embeds=embeds, labels=IDS).loss
            loss.backward()
            of_adapters = {n: p.grad for n, p in each.named_parameters() if "lora_" in n}
            gradients.append({"loss": loss.detach(), "inputs": embeds.grad} | of_adapters)
            assert not any(p.grad is not None for n, p in each.named_parameters() if "lora_" not in n)
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert gradient.any(), name
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)

    def test_gradient_checkpointing_changes_no_gradient(self, folder, packing):
        gradients = []
        for checkpointing in (False, True):
            model = load(folder, quantization_config=packing)
            adapted = self.adapted(model, **self.TARGETS["attention, experts and router"]).train()
            if checkpointing:
                adapted.enable_input_require_grads()
                model.gradient_checkpointing_enable()
            adapted(IDS, labels=IDS).loss.backward()
            gradients.append({n: p.grad for n, p in adapted.named_parameters() if "lora_" in n})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)

    def test_an_adapter_is_saved_and_loaded(self, folder, packing, tmp_path):
        from peft import PeftModel

        adapted = self.adapted(
            load(folder, expert_subset=FIRST, quantization_config=packing), **self.TARGETS["attention"]
        )
        expected = logits(adapted)
        adapted.save_pretrained(tmp_path)
        base = load(folder, expert_subset=FIRST, quantization_config=packing)
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), expected)

    @pytest.mark.parametrize("targets", ["attention", "experts"])
    def test_merging_an_adapter_is_refused(self, folder, targets):
        model = load(folder, quantization_config=PackedConfig(4, 16, True))
        before = copy.deepcopy(model)
        adapted = self.adapted(model, **self.TARGETS[targets])
        with pytest.raises(ValueError, match="dequantize"):
            adapted.merge_and_unload()
        assert_same_state(before, adapted.unload())

    def test_an_adapter_is_merged_into_what_was_dequantised(self, folder):
        model = load(folder, quantization_config=PackedConfig(4, 16, True))
        adapted = self.adapted(model, **self.TARGETS["experts"])
        expected = logits(adapted)
        model.dequantize()
        torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)

    def test_trainer_trains_an_adapter(self, folder, tmp_path):
        from transformers import Trainer, TrainingArguments

        model = load(folder, quantization_config=PackedConfig(4, 16, True))
        before = copy.deepcopy(model)
        adapted = self.adapted(model, **self.TARGETS["attention, experts and router"])
        factors = {n: p.clone() for n, p in adapted.named_parameters() if "lora_" in n}
        rows = [{"input_ids": row, "labels": row} for row in IDS]
        arguments = TrainingArguments(tmp_path, max_steps=2, use_cpu=True, report_to=[], learning_rate=0.01)
        Trainer(adapted, arguments, train_dataset=rows).train()
        changed = [
            n for n, p in adapted.named_parameters() if n in factors and not torch.equal(p, factors[n])
        ]
        assert changed == list(factors)
        assert_same_state(before, adapted.unload())

    def test_the_weights_themselves_are_not_trained(self, folder, tmp_path):
        from transformers import Trainer, TrainingArguments

        model = load(folder, quantization_config=PackedConfig(4, 16, True))
        with pytest.raises(ValueError, match="cannot be trained"):
            model.requires_grad_(True)
        with pytest.raises(ValueError, match="quantized"):
            Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))


class TestRefusals:
    def test_settings(self):
        for kwargs, message in (
            ({"bits": 3}, "bits is 3, expected 8 or 4"),
            ({"group_size": 48 + 1}, "group_size is 49"),
            ({"group_size": 0}, "group_size is 0"),
            ({"group_size": "32"}, "group_size is '32'"),
            ({"symmetric": 1}, "symmetric is 1"),
            ({"head_bits": 6}, "bits is 6"),
            ({"modules_to_not_convert": "lm_head"}, "expected a list"),
        ):
            with pytest.raises(ValueError, match=message):
                PackedConfig(**kwargs)
        with pytest.raises(TypeError, match="'group'"):
            PackedConfig(group=32)

    def test_a_group_that_does_not_divide_the_rows(self, folder):
        for kwargs in ({}, {"expert_subset": FIRST}):
            with pytest.raises(ValueError, match="32 inputs.*groups of 64"):
                load(folder, quantization_config=PackedConfig(4, 64), **kwargs)

    def test_weights_that_are_no_safetensors(self, folder):
        state = load(folder).state_dict()
        with pytest.raises(ValueError, match="safetensors"):
            EmoForCausalLM.from_pretrained(
                None, config=load(folder).config, state_dict=state, quantization_config=PackedConfig()
            )

    def test_damaged_weights(self, folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        tensors[name][0, 0] = float("nan")
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(
            CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj cannot be quantised.*NaN"
        ):
            load(folder, quantization_config=PackedConfig())
        with pytest.raises(CheckpointError, match="cannot be quantised.*NaN"):
            extract_subset(
                folder, [[3, 11]] * 3, folder / "out", quantization_config=PackedConfig(), progress=False
            )
        assert not (folder / "out").exists()

    @pytest.mark.parametrize("cut", [False, True])
    def test_files_that_do_not_fit_their_config(self, folder, tmp_path, edit_json, cut):
        load(folder, quantization_config=PackedConfig(4, 16, True)).save_pretrained(tmp_path)
        whole = load_file(tmp_path / "model.safetensors")
        config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        kwargs = {"expert_subset": FIRST} if cut else {}
        expert, query = (
            "model.layers.0.mlp.experts.3.up_proj.weight",
            "model.layers.0.self_attn.q_proj.weight",
        )

        def refused(message, change=None, **settings):
            tensors = dict(whole)
            if change is not None:
                change(tensors)
            save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
            edit_json(tmp_path / "config.json", quantization_config=config | settings)
            with pytest.raises(CheckpointError, match=message):
                load(tmp_path, **kwargs)

        for name in (expert, query):
            refused(f"{name}_scale is missing", lambda t, n=name: t.pop(f"{n}_scale"))
            refused(f"{name} is there packed and", lambda t, n=name: t.update({n: torch.zeros(32, 32)}))
            refused(
                f"{name} is not in 4 bits",
                lambda t, n=name: t.update({f"{n}_scale": t[f"{n}_scale"][:, :1].clone()}),
            )
            refused(
                f"{name} is not in 4 bits",
                lambda t, n=name: t.update({f"{n}_packed": t[f"{n}_packed"].float()}),
            )
            refused("_g_idx", lambda t, n=name: t.update({f"{n}_g_idx": torch.zeros(32)}))
        refused("lacks|missing", lambda t: [t.pop(n) for n in list(t) if n.startswith(query)])
        refused(
            "expected 12", lambda t: [t.pop(n) for n in list(t) if n.startswith(expert.rpartition(".up")[0])]
        )
        other = PackedConfig(8, 16).to_dict()["config_groups"]
        refused("is not in 8 bits", config_groups=other)
        other = PackedConfig(4, 16, symmetric=False).to_dict()["config_groups"]
        refused("_zero_point is missing", config_groups=other)

    @pytest.mark.parametrize("cut", [False, True])
    def test_what_is_quantised_in_another_way(self, folder, tmp_path, edit_json, cut):
        load(folder, quantization_config=PackedConfig(4, 16, True)).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        kwargs = {"expert_subset": FIRST} if cut else {}

        def weights(**changes):
            group = copy.deepcopy(config["config_groups"]["group_0"])
            group["weights"] |= changes
            return {"config_groups": {"group_0": group}}

        def group(**changes):
            return {"config_groups": {"group_0": config["config_groups"]["group_0"] | changes}}

        eight = PackedConfig(8, 16).to_dict()["config_groups"]["group_0"]
        for settings, message in (
            (group(input_activations={"num_bits": 8}), "input_activations"),
            (group(output_activations={"num_bits": 8}), "output_activations"),
            (group(format="int-quantized"), "`format` is 'int-quantized'"),
            (weights(num_bits=2), "`num_bits` is 2, expected 4 or 8"),
            (weights(type="float"), "`type` is 'float'"),
            (weights(strategy="block"), "`strategy` is 'block'"),
            (weights(strategy="tensor"), "`strategy` is 'tensor'"),
            (weights(actorder="group"), "`actorder` is 'group'"),
            (weights(dynamic=True), "`dynamic` is True"),
            (weights(group_size=None), "`group_size` is None"),
            ({"config_groups": {}}, "`config_groups`"),
            ({"config_groups": config["config_groups"] | {"group_1": eight}}, "one kind of weights"),
            ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
            ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
            ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
            ({"quantization_status": "frozen"}, "`quantization_status` is 'frozen'"),
            ({"ignore": "lm_head"}, "`ignore`"),
        ):
            edit_json(tmp_path / "config.json", quantization_config=config | settings)
            with pytest.raises(CheckpointError, match=message):
                load(tmp_path, **kwargs)

    def test_experts_that_torchao_quantised(self, folder, edit_json):
        """Versions before this one wrote such models."""
        experts = {r"re:.*\.mlp\.experts\.(gate_up|down)_proj": {"_type": "Int8WeightOnlyConfig"}}
        edit_json(
            folder / "config.json",
            quantization_config={"quant_method": "torchao", "quant_type": {"default": {"_data": experts}}},
        )
        for kwargs in ({}, {"expert_subset": FIRST}):
            with pytest.raises(CheckpointError, match=r"torchao.*unquantised model.*PackedConfig"):
                load(folder, **kwargs)


class TestCompiling:
    def test_compiled_code_computes_the_same(self, folder, packing):
        model = load(folder, quantization_config=packing)
        expected = logits(model)
        torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), expected)

    def test_transforms_and_modes_see_it(self, folder):
        from torch.utils.flop_counter import FlopCounterMode

        model = load(folder, quantization_config=PackedConfig(8))
        expected = logits(model)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            found = model(IDS).logits
        torch.testing.assert_close(found, expected)
        assert counter.get_total_flops() > 2 * IDS.numel() * model.lm_head.weight.numel()


class TestConversions:
    """What needs the weights as they were says so."""

    @pytest.fixture
    def packed(self, folder, tmp_path):
        load(folder, quantization_config=PackedConfig(4, 16, True)).save_pretrained(tmp_path / "packed")
        return tmp_path / "packed"

    def test_conversions_are_refused(self, packed, tmp_path):
        from transformers_emo.conversion import (
            convert_to_olmo_core,
            export_model,
            shard_experts,
            upgrade_checkpoint,
        )

        for convert in (
            lambda: shard_experts(packed, tmp_path / "out", progress=False),
            lambda: export_model(packed, tmp_path / "out", to="qwen2-moe", progress=False),
            lambda: convert_to_olmo_core(packed, tmp_path / "out", progress=False),
            lambda: upgrade_checkpoint(packed, tmp_path / "out"),
        ):
            with pytest.raises(CheckpointError, match="are quantised"):
                convert()
        assert not (tmp_path / "out").exists()
