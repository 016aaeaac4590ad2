"""The cards of the released models: what `examples/released_cards.py` writes, with code that runs."""

import ast
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers_emo import EmoConfig, EmoForCausalLM, EmoTokenizer, cli

ROOT = Path(__file__).parents[2]
TOY = ROOT / "model_cards" / "toy-emo"
SCRIPT = runpy.run_path(str(ROOT / "examples" / "released_cards.py"))
MODELS = {model.name: model for model in SCRIPT["MODELS"]}
DENSE = "Dense_1b_130B"
MIXTURES = [name for name in MODELS if name != DENSE]


def text(name: str) -> str:
    return (ROOT / "model_cards" / name / "README.md").read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(name), re.M | re.S)


def as_on_the_hub(folder: Path) -> Path:
    """A narrow model with the config of the authors' dense one: another type, and no word about experts."""
    config = EmoConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=8192,
        num_attention_heads=2,
        num_experts=0,
        num_experts_per_tok=0,
        num_shared_experts=0,
        num_experts_per_layer=[0] * 16,
        dense_intermediate_size=8192,
        eos_token_id=0,
        pad_token_id=1,
    )
    EmoForCausalLM(config).save_pretrained(folder)
    EmoTokenizer.from_pretrained(TOY).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    released = {key: value for key, value in written.items() if "expert" not in key and "router" not in key}
    released |= {"model_type": "olmo2_noqknorm_prenorm", "architectures": ["Olmo2NoQKNormPrenormForCausalLM"]}
    del released["dense_intermediate_size"]
    (folder / "config.json").write_text(json.dumps(released))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_card_is_what_the_script_writes(name):
    assert text(name) == SCRIPT["card"](MODELS[name]), "run `python examples/released_cards.py`"


@pytest.mark.parametrize("name", MODELS)
def test_front_matter_is_read_by_the_hub(name):
    data = ModelCard.load(ROOT / "model_cards" / name / "README.md").data
    assert data.base_model == f"allenai/{name}" and data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation" and ("expert-subset" in data.tags) == (name != DENSE)
    assert data.license is None  # the authors' page says it


def test_sizes_are_those_of_the_paper():
    counted = {name: (SCRIPT["parameters"](m), SCRIPT["active_parameters"](m)) for name, m in MODELS.items()}
    assert counted.pop(DENSE) == (1_484_851_200,) * 2
    assert counted.pop("StdMoE_1b4b_130B") == (3_901_818_880, 1_485_899_776)
    assert set(counted.values()) == {(13_568_641_024, 1_489_045_504)}


@pytest.mark.parametrize("name", MODELS)
def test_commands_are_those_of_emo(name):
    commands = [shlex.split(line) for block in blocks(name, "bash") for line in block.splitlines()]
    assert len(commands) == (1 if name == DENSE else 2)
    for program, *words in commands:
        assert program == "emo"
        command = typer.main.get_command(cli.app)
        while hasattr(command, "resolve_command"):
            context = command.make_context("emo", [], resilient_parsing=True)
            _, command, words = command.resolve_command(context, words)
        assert command.make_context("emo", words).params  # it takes these words; nothing is run


@pytest.mark.parametrize("name", MIXTURES)
def test_cards_of_mixtures_differ_in_no_line_of_code_but_names(name):
    def code(one: str) -> list[str]:
        return [ast.dump(ast.parse(block.replace(one, "NAME"))) for block in blocks(one, "python")]

    assert code(name) == code(MIXTURES[0]) and len(code(name)) == 2


@pytest.mark.parametrize("index", [0, 1])
def test_code_loads_a_mixture(index, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = MIXTURES[0]
    exec(compile(blocks(name, "python")[index].replace(f"allenai/{name}", str(TOY)), name, "exec"), {})
    if index == 0:
        assert capsys.readouterr().out.startswith("Language modeling is")
    else:
        assert EmoForCausalLM.from_pretrained(f"{name}-math").config.num_experts == 16


def test_code_loads_the_dense_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "olmo2_noqknorm_prenorm" not in CONFIG_MAPPING
    released = as_on_the_hub(tmp_path / "released")
    (block,) = blocks(DENSE, "python")
    exec(compile(block.replace(f"allenai/{DENSE}", str(released)), DENSE, "exec"), {})
    assert capsys.readouterr().out.startswith("Language modeling is")
    original = load_file(released / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(f"{DENSE}-emo").state_dict()
    assert loaded.keys() == original.keys()
    assert all(value.equal(original[name].bfloat16()) for name, value in loaded.items())
