from pathlib import Path

import fresh_processes
import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("torchao", reason="torchao is an optional part of Transformers")
from torchao.quantization import quantize_
from transformers_emo.modeling_emo.kernels.quantised_experts import Int4Experts, quantised_experts

TINY = Path(__file__).parents[3] / "model_cards" / "emo-tiny"
SUBSET = "python"


def load(dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(TINY, expert_subset=SUBSET, dtype=dtype, **kwargs).eval()


@pytest.fixture(scope="module")
def ids():
    text = "import os\n\ndef main(path):\n    for name in os.listdir(path):\n        print(name)\n" * 4
    return AutoTokenizer.from_pretrained(TINY)(text, return_tensors="pt").input_ids


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "group_size", "least"), [(8, None, 0.995), (8, 32, 0.995), (4, None, 0.98), (4, 64, 0.98)]
)
def test_a_quantised_subset_gives_nearly_the_same_logits(ids, dtype, bits, group_size, least):
    model = load(dtype, quantization_config=quantised_experts(bits, group_size=group_size))
    plain = load(dtype)
    experts, before = model.model.layers[1].mlp.experts, plain.model.layers[1].mlp.experts
    assert experts.down_proj.shape == before.down_proj.shape
    assert type(experts.down_proj.data) is not torch.Tensor
    assert type(model.model.layers[1].self_attn.q_proj.weight) is torch.nn.Parameter
    assert type(model.model.layers[1].mlp.gate.weight) is torch.nn.Parameter
    expected, got = logits(plain, ids), logits(model, ids)
    assert not torch.equal(got, expected)
    assert cosine_similarity(got, expected, dim=-1).mean() > least
    labels = ids[:, 1:].flatten()
    loss, plain_loss = (
        torch.nn.functional.cross_entropy(each[0, :-1], labels).item() for each in (got, expected)
    )
    assert abs(loss - plain_loss) < 0.1


@pytest.mark.parametrize("name", ["emo", "emo_sorted"])
def test_our_implementations_by_name_run_as_by_default(ids, name):
    expected = logits(load(quantization_config=quantised_experts(8)), ids)
    model = load(quantization_config=quantised_experts(8), experts_implementation=name)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_subset_generates(ids, bits):
    model = load(quantization_config=quantised_experts(bits))
    prompt = ids[:, :12]
    out = model.generate(prompt, max_new_tokens=6, do_sample=False)
    # What the cache gives is what reading everything anew gives.
    again = logits(model, out[:, :-1])[0, 11:].argmax(-1)
    assert out[0, 12:].tolist() == again.tolist()


def test_experts_of_4_bits_are_the_nearest_of_16_steps_in_each_group():
    torch.manual_seed(0)
    weight = torch.randn(3, 64, 96)
    stacked = Int4Experts.from_hp(weight, group_size=32)
    for expert in range(3):
        back = torch.nn.functional.linear(torch.eye(96), stacked[expert]).T
        groups, error = weight[expert].view(64, 3, 32), (back - weight[expert]).view(64, 3, 32)
        step = (groups.amax(-1) - groups.amin(-1)) / 15
        assert (error.abs().amax(-1) <= 0.75 * step).all()
    assert stacked.qdata.nbytes * 8 == weight.nbytes


def test_a_loaded_model_is_quantised_as_one_that_is_loading(ids):
    whole = load(quantization_config=quantised_experts(4))
    later = load(experts_implementation="eager")
    quantize_(later, quantised_experts(4).quant_type, filter_fn=None)
    assert torch.equal(logits(later, ids), logits(whole, ids))


def test_impossible_requests():
    with pytest.raises(ValueError, match="bits is 3, expected 8 or 4"):
        quantised_experts(3)
    with pytest.raises(ValueError, match="group_size is 48"):
        quantised_experts(4, group_size=48)
    for shape in ((2, 16, 48), (2, 10, 32), (16, 32)):
        with pytest.raises(ValueError, match="expected \\(experts, outputs, inputs\\) on a CPU"):
            Int4Experts.from_hp(torch.zeros(shape), group_size=32)
    with pytest.raises(ValueError, match="dimension 1, expected 0"):
        Int4Experts.from_hp(torch.zeros(2, 16, 32), group_size=32).select(1, 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_inference_mode_computes_the_same(ids, bits):
    model = load(quantization_config=quantised_experts(bits))
    with torch.inference_mode():
        found = model(ids).logits.float()
        text = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, logits(model, ids))
    assert torch.equal(text, model.generate(ids, max_new_tokens=4, do_sample=False))


class TestAdapters:
    TARGETS = ("gate_proj", "up_proj", "down_proj")

    def adapted(self, model, names=("default",), targets=TARGETS):
        peft = pytest.importorskip("peft")
        from transformers_emo.training import lora_config

        torch.manual_seed(0)
        config = lora_config(model, r=2, target_modules=list(targets))
        adapted = peft.get_peft_model(model, config)
        for name in names[1:]:
            adapted.add_adapter(name, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.base_model.set_adapter(list(names))
        return adapted

    def reference(self, model):
        """The same weights, not quantised any more."""
        plain = load()
        for layer, other in zip(plain.model.layers, model.model.layers, strict=True):
            for name in ("gate_up_proj", "down_proj"):
                stack = getattr(other.mlp.experts, name)
                getattr(layer.mlp.experts, name).data = stack.dequantize()
        return plain

    @pytest.mark.parametrize("names", [("default",), ("default", "other")])
    def test_experts_in_8_bits_train_an_adapter(self, ids, names):
        model = load(quantization_config=quantised_experts(8))
        expected = self.adapted(self.reference(model), names)
        found = self.adapted(model, names)
        losses = []
        for each in (expected, found):
            loss = each(ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        gradients = [
            {name: p.grad for name, p in each.named_parameters() if "lora_" in name}
            for each in (expected, found)
        ]
        for name, gradient in gradients[0].items():
            other = gradients[1][name]
            assert gradient.any()
            assert cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > 0.999
        with torch.inference_mode():
            assert torch.allclose(found(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)

    def test_a_model_that_was_saved_takes_one_too(self, ids, tmp_path):
        load(quantization_config=quantised_experts(8)).save_pretrained(tmp_path)
        code = (
            "import sys, torch; from peft import LoraConfig, get_peft_model\n"
            "from transformers_emo import EmoForCausalLM\n"
            "model = EmoForCausalLM.from_pretrained(sys.argv[1])\n"
            "targets = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']\n"
            "model = get_peft_model(model, LoraConfig(r=2, target_parameters=targets))\n"
            "print(model(torch.tensor([[5, 6]])).logits.isfinite().all().item())"
        )
        done = fresh_processes.run(code, str(tmp_path))
        assert done.returncode == 0 and "True" in done.stdout, done.stderr

    def test_experts_in_4_bits_refuse_one(self, ids):
        adapted = self.adapted(load(dtype=torch.bfloat16, quantization_config=quantised_experts(4)))
        with pytest.raises(ValueError, match="4 bits cannot have an adapter.*quantised_experts\\(8\\)"):
            adapted(ids)

    def test_beside_experts_in_4_bits_one_computes(self, ids):
        model = load(dtype=torch.bfloat16, quantization_config=quantised_experts(4))
        before = logits(model, ids)
        assert not torch.equal(logits(self.adapted(model, targets=["q_proj"]), ids), before)


def test_programs_may_import_it_from_its_former_place():
    from transformers_emo.modeling_emo import quantised_experts as former

    assert former.quantised_experts is quantised_experts
