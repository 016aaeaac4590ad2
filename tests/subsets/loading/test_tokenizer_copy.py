"""What is saved of a model that was loaded in part has the tokenizer of that model."""

import copy
import json
import logging
import pickle
import shutil

import pytest
from conftest import TOY
from transformers import AutoTokenizer, GenerationConfig, pipeline
from transformers_emo import EmoForCausalLM, EmoForSequenceClassification
from transformers_emo.subsets.loading.tokenizer_copy import Origin
from transformers_emo.training import lora_config
from version_needs import waits_for_peft

KEPT, OTHER = [[0, 1, 2, 31]] * 4, [[3, 4, 5, 31]] * 4
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def source(tmp_path):
    """toy-emo as a folder of one's own, with chat templates."""
    folder = tmp_path / "source"
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("documents"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "tools"}
    tokenizer.save_pretrained(folder)
    GenerationConfig(max_new_tokens=3, eos_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture
def warnings(monkeypatch):
    """What the library warns of."""
    logger = logging.getLogger("transformers_emo.subsets.loading.tokenizer_copy")
    said = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    return said


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_part_takes_tokenizer_templates_and_generation_config_along(source, tmp_path, warnings):
    out = tmp_path / "out"
    EmoForCausalLM.from_pretrained(source, expert_subset=KEPT).save_pretrained(out)
    templates = {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert names(out) == TOKENIZER | templates | {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    for name in TOKENIZER | templates:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 3
    written = pipeline("text-generation", str(out))("import", do_sample=False)[0]["generated_text"]
    assert written.startswith("import") and len(written) > len("import")
    assert warnings == []


@pytest.mark.parametrize("load", [{"exclude_experts": {0: [3]}}, {"expert_subset": KEPT}])
def test_any_class_and_any_choice_take_it_along(load, source, tmp_path):
    EmoForSequenceClassification.from_pretrained(source, **load).save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") >= TOKENIZER


def test_a_whole_model_is_saved_as_by_transformers(source, tmp_path):
    EmoForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_whole_model_that_became_a_part_takes_it_along(source, tmp_path):
    model = EmoForCausalLM.from_pretrained(source)
    twin = model.share_backbone(OTHER)
    model.save_pretrained(tmp_path / "whole")
    model.swap_experts(KEPT)
    for name, part in (("twin", twin), ("swapped", model), ("copied", copy.deepcopy(model))):
        part.save_pretrained(tmp_path / name)
        assert names(tmp_path / name) >= TOKENIZER
    assert not names(tmp_path / "whole") & TOKENIZER


def test_a_tokenizer_that_is_there_stays(source, tmp_path):
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(out)
    (out / "additional_chat_templates" / "tool_use.jinja").unlink()
    before = {name: (out / name).read_bytes() for name in names(out)}
    EmoForCausalLM.from_pretrained(source, expert_subset=KEPT).save_pretrained(out)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert "additional_chat_templates/tool_use.jinja" not in names(out)


def test_the_source_is_found_from_another_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = EmoForCausalLM.from_pretrained("source", expert_subset=KEPT)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.save_pretrained("out")
    assert names(tmp_path / "elsewhere" / "out") >= TOKENIZER


@pytest.mark.parametrize("load", ["part", "swapped"])
def test_a_source_that_is_gone_is_warned_of_and_the_model_saved(
    load, source, tmp_path, warnings, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # `source` is a name that the Hub could have, too: nobody else's is taken
    model = EmoForCausalLM.from_pretrained("source", expert_subset=None if load == "swapped" else KEPT)
    if load == "swapped":
        model.swap_experts(KEPT)
    source.rename(tmp_path / "moved")
    model.save_pretrained("out")
    (message,) = warnings
    assert str(source) in message and "tokenizer.save_pretrained" in message
    assert EmoForCausalLM.from_pretrained("out").config.num_experts == 4


def test_a_source_without_a_tokenizer_is_not_warned_of(make_checkpoint, tmp_path, warnings):
    kept = [[0, 1, 2, 11]] * 3
    EmoForCausalLM.from_pretrained(make_checkpoint(), expert_subset=kept).save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") == {"config.json", "generation_config.json", "model.safetensors"}
    assert warnings == []


def test_only_the_main_process_writes_it(source, tmp_path):
    model = EmoForCausalLM.from_pretrained(source, expert_subset=KEPT)
    model.save_pretrained(tmp_path / "by name", is_main_process=False)
    model.save_pretrained(tmp_path / "by place", False)
    assert not (names(tmp_path / "by name") | names(tmp_path / "by place")) & TOKENIZER


def test_an_adapter_alone_has_no_tokenizer(source, tmp_path):
    # `make test-oldest` runs it: Transformers 5.24 takes no `add_adapter` from the PEFT that there is.
    if reason := waits_for_peft():
        pytest.skip(reason)
    model = EmoForCausalLM.from_pretrained(source, expert_subset=KEPT)
    model.add_adapter(lora_config(model, r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "out")
    assert "adapter_config.json" in names(tmp_path / "out")
    assert not names(tmp_path / "out") & TOKENIZER


def test_a_token_is_neither_shown_nor_pickled():
    origin = Origin.of("user/model", {"token": "hf_secret", "revision": "1" * 40, "force_download": True})
    assert origin.hub_kwargs == {"token": "hf_secret", "revision": "1" * 40}
    assert "hf_secret" not in repr(origin) and b"hf_secret" not in pickle.dumps(origin)
    assert pickle.loads(pickle.dumps(origin)).place == "user/model"
