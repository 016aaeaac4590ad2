"""LoRA on EMO: what can be adapted, and that an adapter stays with the experts it was trained on."""

import ast
import json
import re
import sys
import warnings

import peft
import pytest
import torch
from hub_server import HubServer
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tolerances import assert_other_numbers, assert_same_numbers
from transformers import AutoModelForCausalLM
from transformers_emo import EmoForCausalLM, SubsetError
from transformers_emo.modeling_emo import transformers_differences
from transformers_emo.training import (
    EmoTrainer,
    adapters,
    expand_adapter,
    load_adapter,
    lora_config,
    save_adapter,
    training_arguments,
)
from version_needs import waits_for_peft

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")

TARGETS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "stacked": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "names_on_disk": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "router": {"target_parameters": ["mlp.gate.weight"]},
    "all_at_once": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    },
}
SUBSET = [[0, 3, 5, 8, 11], [1, 2, 9, 10, 11], [0, 4, 6, 7, 11]]
OTHER = [[0, 3, 5, 8, 11], [1, 2, 3, 10, 11], [0, 4, 6, 7, 11]]
UNEVEN = [[0, 3, 5, 8, 11], [1, 2, 11], [0, 4, 6, 7, 9, 10, 11]]
TOKENS = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def load(make_checkpoint):
    """Load a small model, whole or in part; always the same weights."""
    folder = make_checkpoint(output_router_logits=False)

    def load(subset=None, **kwargs):
        return EmoForCausalLM.from_pretrained(folder, expert_subset=subset, **kwargs)

    return load


def fill(model, seed=7):
    """Give every factor of an adapter values: as PEFT starts, one of each pair is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("subset", [None, SUBSET], ids=["full", "subset"])
@pytest.mark.parametrize("target", TARGETS)
def test_trains_saves_loads_and_merges(load, tmp_path, target, subset, implementation):
    base = load(subset, experts_implementation=implementation)
    model = get_peft_model(base, lora_config(base, r=2, lora_alpha=4, **TARGETS[target])).train()
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    expected = logits(model.eval())
    plain = logits(load(subset))
    assert_other_numbers(expected, plain)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(load(subset, experts_implementation=implementation), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert_same_numbers(logits(loaded.merge_and_unload()), expected)


def test_names_on_disk_adapt_every_matrix_of_the_experts(load):
    model = get_peft_model(load(), LoraConfig(r=2, lora_alpha=2, **TARGETS["names_on_disk"]))
    factors = {name: tuple(p.shape) for name, p in model.named_parameters() if ".layers.0." in name}
    # gate and up have a rank each in the one parameter they are in
    assert factors["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.default.weight"] == (48, 32)
    assert factors["base_model.model.model.layers.0.mlp.experts.lora_A.default.weight"] == (24, 24)


def test_half_of_a_stacked_parameter_is_refused(load):
    with pytest.raises(ValueError, match="gate_proj without also targeting up_proj"):
        get_peft_model(load(), LoraConfig(target_modules=["q_proj", "gate_proj"]))


def test_an_adapter_with_a_factor_for_each_expert_loads(load, tmp_path):
    """As PEFT trains where experts are modules of their own, as in the code released with EMO."""
    config = LoraConfig(r=2, lora_alpha=2, **TARGETS["names_on_disk"])
    config.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    weights, expected = {}, load()
    for index, layer in enumerate(expected.model.layers):
        for expert in range(12):
            delta = {}
            for part, (into, out) in {"gate": (32, 24), "up": (32, 24), "down": (24, 32)}.items():
                a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in ((2, into), (out, 2)))
                name = f"base_model.model.model.layers.{index}.mlp.experts.{expert}.{part}_proj"
                weights |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
                delta[part] = b @ a
            layer.mlp.experts.gate_up_proj.data[expert] += torch.cat([delta["gate"], delta["up"]])
            layer.mlp.experts.down_proj.data[expert] += delta["down"]
    save_file(weights, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(load(), tmp_path)
    assert_same_numbers(logits(loaded), logits(expected))


def test_router_logits_are_those_of_the_adapted_router(load):
    model = fill(get_peft_model(load(), LoraConfig(r=2, **TARGETS["router"])))
    adapted = model(TOKENS, output_router_logits=True).router_logits
    merged = model.merge_and_unload()(TOKENS, output_router_logits=True).router_logits
    assert len(adapted) == 3
    for one, other in zip(adapted, merged, strict=True):
        assert_same_numbers(one, other)


def test_every_way_of_saving_records_the_experts(load, tmp_path):
    model = load(SUBSET)
    adapted = get_peft_model(model, lora_config(model, r=2, **TARGETS["router"]))
    adapted.save_pretrained(tmp_path / "peft")
    plain = get_peft_model(load(SUBSET), LoraConfig(r=2, **TARGETS["router"]))
    save_adapter(plain, tmp_path / "ours")
    if not waits_for_peft():
        with_adapter = load(SUBSET)
        with_adapter.add_adapter(lora_config(with_adapter, r=2, **TARGETS["router"]))
        with_adapter.save_pretrained(tmp_path / "transformers")
    for folder in tmp_path.iterdir():
        record = json.loads((folder / "expert_subset.json").read_text())
        assert record["experts"] == SUBSET and record["root_experts_per_layer"] == [12, 12, 12]
        assert "expert_subset" not in json.loads((folder / "adapter_config.json").read_text())


def test_adapters_of_other_names_have_records_of_their_own(load, tmp_path):
    model = get_peft_model(load(SUBSET), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="math")
    save_adapter(model, tmp_path)
    assert load_adapter(load(SUBSET), tmp_path / "math").peft_config["default"].r == 2


def test_plain_peft_reads_our_adapters_without_a_warning(load, tmp_path):
    model = load(SUBSET)
    saved = fill(get_peft_model(model, lora_config(model, r=2, **TARGETS["stacked"])))
    saved.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(load(SUBSET), tmp_path)
    assert_same_numbers(logits(loaded), logits(saved))


@pytest.mark.parametrize("target", ["attention", "stacked"])
def test_other_experts_are_refused_before_anything_is_loaded(load, tmp_path, target):
    model = load(SUBSET)
    get_peft_model(model, lora_config(model, r=2, **TARGETS[target])).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    other = load(OTHER)
    with pytest.raises(SubsetError, match=r"\[1, 2, 9, 10, 11\] in layer 1, .* holds \[1, 2, 3, 10, 11\]"):
        load_adapter(other, tmp_path)
    assert not hasattr(other, "peft_config")


class TestLoadedByTransformers:
    """`model.load_adapter` and `from_pretrained` of an adapter's folder."""

    REFUSAL = r"\[1, 2, 9, 10, 11\] in layer 1, .* holds \[1, 2, 3, 10, 11\]"

    @pytest.fixture
    def save(self, load, tmp_path):
        """Save an adapter of a subset; return the model it was made of."""

        def save(target, make_config=lora_config):
            model = load(SUBSET)
            config = make_config(model, r=2, **TARGETS[target])
            adapted = fill(get_peft_model(model, config))
            adapted.save_pretrained(tmp_path)
            return adapted

        return save

    @pytest.mark.parametrize("target", ["attention", "stacked", "router"])
    def test_other_experts_are_refused_before_anything_is_loaded(self, load, save, tmp_path, target):
        save(target)
        other = load(OTHER)
        with pytest.raises(SubsetError, match=self.REFUSAL):
            other.load_adapter(tmp_path)
        with pytest.raises(SubsetError, match=self.REFUSAL):
            other.load_adapter(
                peft_model_id=str(tmp_path.parent), adapter_kwargs={"subfolder": tmp_path.name}
            )
        assert not hasattr(other, "peft_config")
        with pytest.raises(SubsetError, match=self.REFUSAL):
            AutoModelForCausalLM.from_pretrained(tmp_path, expert_subset=OTHER)

    @pytest.mark.parametrize("target", TARGETS)
    def test_its_own_experts_are_taken(self, load, save, tmp_path, target):
        adapted, model = save(target), load(SUBSET)
        model.load_adapter(tmp_path)
        assert_same_numbers(logits(model), logits(adapted))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, expert_subset=SUBSET)
        assert_same_numbers(logits(loaded), logits(adapted))

    @pytest.mark.parametrize("target", ["stacked", "names_on_disk", "router"])
    def test_more_experts_need_our_own_loading(self, load, save, tmp_path, target):
        save(target)
        full = load()
        with pytest.raises(SubsetError, match=r"transformers_emo\.training\.load_adapter"):
            full.load_adapter(tmp_path)
        assert not hasattr(full, "peft_config")
        with pytest.raises(SubsetError, match=r"transformers_emo\.training\.load_adapter"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_attention_is_adapted_on_more_experts_too(self, load, save, tmp_path):
        save("attention")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_same_numbers(logits(loaded), logits(load_adapter(load(), tmp_path)))

    def test_an_adapter_without_a_record_is_loaded_as_ever(self, load, save, tmp_path):
        adapted, model = save("stacked", lambda model, **kwargs: LoraConfig(**kwargs)), load(SUBSET)
        model.load_adapter(tmp_path)
        assert_same_numbers(logits(model), logits(adapted))

    def test_from_the_hub(self, save, tmp_path):
        save("stacked")
        code = f"""
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM
from transformers_emo import SubsetError

def attempt(name, subset):
    try:
        AutoModelForCausalLM.from_pretrained(name, expert_subset=subset)
        return "loaded"
    except SubsetError as error:
        return str(error)

snapshot_download("user/unseen", allow_patterns="adapter_*")  # as without this package
print([attempt("user/adapter", {SUBSET}), attempt("user/adapter", {OTHER}), attempt("user/plain", {OTHER})])
"""
        with HubServer() as hub:
            hub.commit("user/adapter", tmp_path)
            for repo in ("plain", "unseen"):
                hub.commit(f"user/{repo}", {f.name: f for f in tmp_path.glob("adapter_*")})
            own, other, plain = ast.literal_eval(hub.run(code).splitlines()[-1])
            assert own == plain == "loaded"
            assert re.search(self.REFUSAL, other)
            code = code.replace("snapshot_download(", "#").replace("user/plain", "user/unseen")
            own, other, unseen = ast.literal_eval(hub.run(code, HF_HUB_OFFLINE="1").splitlines()[-1])
            assert own == unseen == "loaded"
            assert re.search(self.REFUSAL, other)


def test_an_adapter_of_the_full_model_is_refused_by_a_subset(load, tmp_path):
    model = load()
    get_peft_model(model, lora_config(model, r=2, **TARGETS["attention"])).save_pretrained(tmp_path)
    with pytest.raises(SubsetError, match="layer 0"):
        load_adapter(load(SUBSET), tmp_path)


def test_an_adapter_of_another_model_is_refused(load, make_model, tmp_path):
    model = load(SUBSET)
    get_peft_model(model, lora_config(model, r=2, **TARGETS["attention"])).save_pretrained(tmp_path)
    with pytest.raises(SubsetError, match=r"another model: one with \[12, 12, 12\].* this one has \[16"):
        load_adapter(make_model(num_experts=16), tmp_path)


def test_an_adapter_without_a_record_must_be_told_its_experts(load, tmp_path):
    saved = fill(get_peft_model(load(SUBSET), LoraConfig(r=2, **TARGETS["stacked"])))
    saved.save_pretrained(tmp_path)
    with pytest.raises(SubsetError, match="trained_on"):
        load_adapter(load(SUBSET), tmp_path)
    loaded = load_adapter(load(SUBSET), tmp_path, trained_on=SUBSET)
    assert_same_numbers(logits(loaded), logits(saved))


@pytest.mark.parametrize("subset", [SUBSET, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_of_a_subset_does_the_same_on_the_masked_full_model(load, tmp_path, target, subset):
    model = load(subset)
    adapted = fill(get_peft_model(model, lora_config(model, r=2, lora_alpha=4, **TARGETS[target])))
    adapted.save_pretrained(tmp_path)
    full = load_adapter(load(), tmp_path)
    with full.get_base_model().use_experts(tmp_path / "expert_subset.json"):
        masked = logits(full)
    assert_same_numbers(masked, logits(adapted))


def test_experts_outside_the_subset_keep_their_weights(load, tmp_path):
    model = load(SUBSET)
    adapted = fill(get_peft_model(model, lora_config(model, r=2, **TARGETS["all_at_once"])))
    adapted.save_pretrained(tmp_path)
    merged, before = load_adapter(load(), tmp_path).merge_and_unload(), load()
    for layer, (after, old) in enumerate(zip(merged.model.layers, before.model.layers, strict=True)):
        for name, parameter in old.mlp.named_parameters():
            changed = (after.mlp.get_parameter(name) != parameter).flatten(1).any(1).nonzero().flatten()
            assert changed.tolist() == SUBSET[layer]


def test_arguments_for_the_hub_reach_everything_that_an_expansion_reads(load, tmp_path, monkeypatch):
    model = load(SUBSET)
    get_peft_model(model, lora_config(model, r=2, **TARGETS["router"])).save_pretrained(tmp_path)
    given = {}

    def note(module, name):
        real = getattr(module, name)

        def noting(*args, **kwargs):
            given[name] = kwargs.get("local_files_only")
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, noting)

    note(adapters, "read_record")
    note(peft, "load_peft_weights")
    load_adapter(load(), tmp_path, local_files_only=True)
    assert given == {"read_record": True, "load_peft_weights": True}


def test_an_adapter_goes_from_a_subset_to_a_larger_subset(load, tmp_path):
    larger = [sorted({*ids, 4, 9}) for ids in SUBSET]
    model = load(SUBSET)
    adapted = fill(get_peft_model(model, lora_config(model, r=2, **TARGETS["all_at_once"])))
    adapted.save_pretrained(tmp_path / "small")
    expand_adapter(tmp_path / "small", load(larger).config, tmp_path / "larger")
    grown = load_adapter(load(larger), tmp_path / "larger")
    with grown.get_base_model().use_experts(SUBSET):
        assert_same_numbers(logits(grown), logits(adapted))


def test_adapters_without_a_place_for_each_expert_are_not_expanded(load, tmp_path):
    model = load(SUBSET)
    config = lora_config(model, r=2, **TARGETS["router"])
    get_peft_model(model, config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.layers.0.mlp.gate.weight": torch.ones(5, 32)}, file)
    with pytest.raises(SubsetError, match="cannot be expanded"):
        load_adapter(load(), tmp_path)


def test_without_peft_the_error_says_what_to_install(make_model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (lora_config, lambda model: load_adapter(model, tmp_path)):
        with pytest.raises(ImportError, match="`pip install 'peft"):
            call(make_model())


def test_a_model_without_adapter_is_not_saved_as_one(make_model, tmp_path):
    with pytest.raises(TypeError, match="get_peft_model"):
        save_adapter(make_model(), tmp_path)


@pytest.mark.parametrize("made_for", [OTHER, UNEVEN, None], ids=["other", "uneven", "full"])
def test_a_config_made_for_other_experts_is_refused(load, tmp_path, made_for):
    config = lora_config(load(made_for), r=2, **TARGETS["attention"])
    with pytest.raises(SubsetError, match="was made for the experts .* this model holds .* make it anew"):
        load(SUBSET).add_adapter(config)
    with pytest.raises(SubsetError, match="make it anew"):
        load(SUBSET).load_adapter(adapter_state_dict={}, peft_config=config)
    adapted = get_peft_model(load(SUBSET), config)
    with pytest.raises(SubsetError, match="make it anew"):
        EmoTrainer(adapted, training_arguments("fine-tune", tmp_path / "run", use_cpu=True))
    save_adapter(adapted, tmp_path / "saved")  # what it really is
    load_adapter(load(SUBSET), tmp_path / "saved")
    assert EmoTrainer(
        get_peft_model(load(made_for), config),
        training_arguments("fine-tune", tmp_path / "run", use_cpu=True),
    )


def test_a_config_made_before_experts_were_swapped_is_refused(load):
    model = load(SUBSET)
    config = lora_config(model, r=2, **TARGETS["router"])
    model.swap_experts(OTHER, progress=False)
    with pytest.raises(SubsetError, match=r"experts \[1, 2, 9, 10, 11\] in layer 1"):
        model.add_adapter(config)
    model.swap_experts(SUBSET, progress=False)
    if not waits_for_peft():
        model.add_adapter(config)


def test_the_error_for_an_old_peft_names_what_works_instead(load, monkeypatch):
    monkeypatch.setattr(transformers_differences, "MIN_PEFT_VERSION", "99.1.0")
    model = load(SUBSET)
    config = lora_config(model, r=2, **TARGETS["router"])
    with pytest.raises(ImportError, match=r"wants PEFT 99\.1\.0, and this is .*get_peft_model"):
        model.add_adapter(config)
    assert get_peft_model(model, config).peft_config


class TestLoadedByPeftAlone:
    """`PeftModel.from_pretrained` and `AutoPeftModelForCausalLM`, which show no folder to the model."""

    @pytest.fixture
    def save(self, load, tmp_path):
        def save(subset, make_config, **kwargs):
            model = load(subset)
            config = make_config(model, r=2, task_type="CAUSAL_LM", **TARGETS["attention"], **kwargs)
            adapted = fill(get_peft_model(model, config))
            adapted.save_pretrained(tmp_path)
            return adapted

        return save

    CONFIGS = pytest.mark.parametrize(
        "make_config",
        [lora_config, lambda model, **kwargs: LoraConfig(**kwargs)],
        ids=["lora_config", "LoraConfig"],
    )

    @CONFIGS
    def test_other_and_more_experts_are_refused(self, load, save, tmp_path, make_config):
        save(SUBSET, make_config)
        for subset, held in ((None, r"\[0, 1, 2, 3, "), (OTHER, r"\[1, 2, 3, 10, 11\]")):
            with pytest.raises(SubsetError, match=rf"trained on the experts .* this model holds {held}"):
                PeftModel.from_pretrained(load(subset), tmp_path)
        with pytest.raises(SubsetError, match="trained on the experts"):
            AutoPeftModelForCausalLM.from_pretrained(tmp_path)

    @CONFIGS
    def test_its_own_experts_are_taken(self, load, save, tmp_path, make_config):
        expected = logits(save(SUBSET, make_config))
        assert_same_numbers(logits(PeftModel.from_pretrained(load(SUBSET), tmp_path)), expected)
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, expert_subset=SUBSET)
        assert_same_numbers(logits(loaded), expected)

    def test_a_subset_refuses_an_adapter_of_the_full_model(self, load, save, tmp_path):
        expected = logits(save(None, lora_config))
        assert_same_numbers(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)
        with pytest.raises(SubsetError, match="trained on the experts"):
            AutoPeftModelForCausalLM.from_pretrained(tmp_path, expert_subset=SUBSET)

    def test_a_subset_that_was_saved_is_the_base(self, load, tmp_path):
        load(SUBSET).save_pretrained(tmp_path / "part")
        part = EmoForCausalLM.from_pretrained(tmp_path / "part")
        config = lora_config(part, r=2, task_type="CAUSAL_LM", **TARGETS["attention"])
        adapted = fill(get_peft_model(part, config))
        adapted.save_pretrained(tmp_path / "adapter")
        assert_same_numbers(
            logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(adapted)
        )

    @CONFIGS
    def test_our_own_loading_puts_it_on_more_experts(self, load, save, tmp_path, make_config):
        expected = logits(save(SUBSET, make_config))
        full = load_adapter(load(), tmp_path, trained_on=SUBSET)
        with full.get_base_model().use_experts(SUBSET):
            assert_same_numbers(logits(full), expected)

    def test_a_config_may_be_used_for_several_models(self, load, tmp_path):
        config = LoraConfig(r=2, task_type="CAUSAL_LM", **TARGETS["attention"])
        for number, subset in enumerate((SUBSET, OTHER, None, SUBSET)):
            get_peft_model(load(subset), config).save_pretrained(tmp_path / str(number))
        PeftModel.from_pretrained(load(SUBSET), tmp_path / "3")
        with pytest.raises(SubsetError, match="trained on the experts"):
            PeftModel.from_pretrained(load(), tmp_path / "3")
        PeftModel.from_pretrained(load(), tmp_path / "2")

    def test_a_second_adapter_trains_on(self, load, save, tmp_path):
        save(SUBSET, lora_config)
        again = PeftModel.from_pretrained(load(SUBSET), tmp_path, is_trainable=True)
        again.save_pretrained(tmp_path / "again")
        with pytest.raises(SubsetError, match="trained on the experts"):
            PeftModel.from_pretrained(load(OTHER), tmp_path / "again", is_trainable=True)
