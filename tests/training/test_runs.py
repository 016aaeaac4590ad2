"""Recipes in YAML files: what is read, what is refused, and that a run can be stopped and gone on with."""

import json
import shutil

import pytest
import yaml
from transformers_emo import EmoForCausalLM, EmoTokenizer
from transformers_emo.training import Recipe, last_checkpoint, train

TOY = "model_cards/toy-emo"


@pytest.fixture
def write(tmp_path, make_checkpoint):
    """Write a recipe for a tiny model on token ids; keyword arguments change its sections."""
    checkpoint = make_checkpoint(vocab_size=4096, document_pool_min=3, document_pool_max=11)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"ids": [5 + i, 6, 7 + i] * 4}) for i in range(40)))

    def write(**changes):
        recipe = {
            "recipe": "pretrain",
            "output_dir": str(tmp_path / "out"),
            "model": {"path": str(checkpoint), "tokenizer": TOY, "from_scratch": True},
            "data": {
                "load": {"path": "json", "data_files": str(rows), "split": "train"},
                "ids": "ids",
                "window": 16,
            },
            "training": {
                "max_steps": 4,
                "warmup_steps": 1,
                "windows_per_step": 4,
                "save_steps": 2,
                "logging_steps": 1,
                "use_cpu": True,
                "disable_tqdm": True,
            },
        }
        for name, value in changes.items():
            recipe[name] = recipe[name] | value if isinstance(value, dict) and name in recipe else value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    return write


def test_a_run_ends_in_a_model_with_its_tokenizer(write, tmp_path):
    trainer = train(Recipe.read(write()))
    assert trainer.state.global_step == 4 and "pool_size" in trainer.state.log_history[0]
    model = EmoForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.document_pool_max == 11
    tokenizer = EmoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token_id == 0
    # The recipe names another model's tokenizer, of another context.
    assert tokenizer.model_max_length == model.config.max_position_embeddings != 256


def test_a_run_continues_where_it_was_stopped(write, tmp_path):
    whole = train(Recipe.read(write()))
    for name in ("checkpoint-4", "model.safetensors"):
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # A checkpoint that was cut short while it was written has no state yet, or not all of it.
    (tmp_path / "out" / "checkpoint-3").mkdir()
    (tmp_path / "out" / "checkpoint-4").mkdir()
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 0.1, "glob')
    resumed = train(Recipe.read(write()), resume=True)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_finished_run_that_is_resumed_is_saved_as_it_was(write, tmp_path):
    train(Recipe.read(write()))
    model = tmp_path / "out" / "model.safetensors"
    expected = model.read_bytes()
    model.unlink()
    assert train(Recipe.read(write()), resume=True).state.global_step == 4
    assert model.read_bytes() == expected


def test_resuming_without_a_checkpoint_starts_a_new_run(write):
    assert train(Recipe.read(write()), resume=True).state.global_step == 4


def test_checkpoints_of_another_run_are_not_overwritten(write, tmp_path):
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="holds the checkpoints of another run: resume it"):
        train(Recipe.read(write()))


def test_the_last_checkpoint_is_the_one_with_the_largest_number(tmp_path):
    for number in (5, 100, 20):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_a_standard_model_is_annealed_with_pools(write, tmp_path, make_checkpoint):
    standard = make_checkpoint(vocab_size=4096)
    pools = {"document_pool_min": 3, "document_pool_max": 11}
    file = write(recipe="anneal", model={"path": str(standard), "from_scratch": False, "config": pools})
    trainer = train(Recipe.read(file, {"training.max_steps": 1}))
    assert 3 <= trainer.state.log_history[0]["pool_size"] <= 11
    assert EmoForCausalLM.from_pretrained(tmp_path / "out").config.document_pool_min == 3


def test_annealing_without_pools_is_refused(write, make_checkpoint):
    file = write(recipe="anneal", model={"path": str(make_checkpoint()), "from_scratch": False})
    with pytest.raises(ValueError, match="no document pools to anneal with"):
        train(Recipe.read(file))


def test_fine_tuning_a_subset_is_without_pools(write, tmp_path):
    subset = [[0, 2, 5, 11]] * 3
    model = {"from_scratch": False, "expert_subset": subset, "train": "routed"}
    trainer = train(Recipe.read(write(recipe="fine-tune", model=model)))
    assert "pool_size" not in trainer.state.log_history[0]
    saved = EmoForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.retained_experts == subset and saved.config.num_experts == 4


def test_evaluation_reads_data_of_its_own(write, tmp_path):
    rows = {"load": {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "split": "train[:20]"}}
    section = rows | {"ids": "ids", "window": 16}
    file = write(evaluation=section, training={"eval_strategy": "steps", "eval_steps": 2})
    trainer = train(Recipe.read(file))
    assert sum("eval_loss" in log for log in trainer.state.log_history) == 2


def test_evaluation_windows_may_be_longer(write, tmp_path):
    rows = {"load": {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "split": "train[:20]"}}
    file = write(evaluation=rows | {"ids": "ids", "window": 32}, training={"eval_strategy": "epoch"})
    assert any("eval_loss" in log for log in train(Recipe.read(file)).state.log_history)


def test_numbers_are_those_of_yaml_1_2(write):
    file = write()
    file.write_text(file.read_text() + "lora: {a: 4e-3, b: 1E5, c: -.5e+2, d: 4.0e3, e: e5, f: '4e-3'}\n")
    read = Recipe.read(file).lora
    assert read == {"a": 0.004, "b": 100000.0, "c": -50.0, "d": 4000.0, "e": "e5", "f": "4e-3"}


def test_a_section_that_is_empty_takes_settings_of_the_command(write):
    recipe = Recipe.read(write(training=None), {"training.max_steps": 7})
    assert recipe.training == {"max_steps": 7}


def test_settings_of_the_command_win(write):
    recipe = Recipe.read(write(), {"training.max_steps": 7, "lora.r": 2, "model.config.lm_z_loss_coef": 0.0})
    assert recipe.training["max_steps"] == 7 and recipe.lora == {"r": 2}
    assert recipe.model.config == {"lm_z_loss_coef": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {}}, r"The recipe has no settings \['modle'\]: use only \['recipe'"),
        ({"model": {"pools": 3}}, r"section `model` has no settings \['pools'\]"),
        ({"model": {"path": None}}, r"section `model` lacks \['path'\]: add them"),
        ({"data": 3}, "section `data` holds 3, expected settings by name"),
        ({"data": {"messages": "chat"}}, r"names the columns \['ids', 'messages'\]"),
        ({"data": {"ids": None, "prompt": "q"}}, r"names the columns \['prompt'\]"),
        ({"recipe": "cook"}, "expected one of .*'anneal'.*, got cook"),
        ({"training": {"max_stepz": 3}}, "section `training` is not right: .*max_stepz"),
        ({"training": {"learning_rate": "fast"}}, "`learning_rate` is 'fast', expected float"),
        ({"training": [1]}, "Field 'training' expected a dict, got list"),
        ({"model": {"from_scratch": "no"}}, "section `model` is not right: .*'from_scratch' expected bool"),
        ({"model": {"train": "routd"}}, "expected one of .*'routed'.*, got routd"),
        ({"model": {"expert_subset": [[0]]}}, "no use for `expert_subset`"),
        ({"model": {"options": {"dtypee": 1}}}, "`model.options` are not right: .*dtypee"),
        ({"model": {"from_scratch": False, "options": {"dtypee": 1}}}, "`model.options` are not .*dtypee"),
        ({"model": {"config": {"pool_min": 3}}}, r"`EmoConfig` does not know: \['pool_min'\]"),
        ({"model": {"config": {"document_pool_min": "3"}}}, "`model.config` is not right: .*expected int"),
        ({"model": {"config": {"document_pool_min": 1}}}, "`document_pool_min` is 1, fewer than the 3"),
        (
            {"model": {"config": {"vocab_size": 100}}, "data": {"ids": None}},
            "The tokenizer has ids up to 4095",
        ),
        ({"model": {"train": "routed"}, "lora": {"r": 2}}, "only the adapter trains: leave one of them out"),
        ({"lora": {"rr": 2}}, "section `lora` is not right: .*rr"),
        ({"data": {"window": "16"}}, "section `data` is not right: Field 'window' expected int"),
        ({"data": {"window": 1}}, "`window` is 1, expected at least 2 tokens"),
        ({"evaluation": {"load": {}, "window": 1}}, "`window` is 1, expected at least 2 tokens"),
        ({"data": {"window": -4}}, "`window` is -4, expected at least 2 tokens"),
        ({"data": {"pack": True}}, "documents are always packed"),
        (
            {"evaluation": {"load": {}, "prompt": "q", "answer": "a", "pack": True}},
            "Packed examples would see each other in `evaluation`",
        ),
        ({"data": {"load": {"path": "json", "data_files": "no-such.jsonl", "split": "train"}}}, "no-such"),
    ],
)
def test_mistakes_are_named(write, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(Recipe.read(write(**changes)))


@pytest.mark.parametrize(
    ("text", "streaming", "message"),
    [
        ("", False, "`data.load` names files without a row"),
        ('{"ids": [5, 6]}\n{"ids": [5,', False, "names files that cannot be read: JSON parse error"),
        ('{"ids": [5, 6]}', False, "do not fill one window"),
        ('{"ids": [5, 6]}', True, "`data` streams nothing that fills a window of 16"),
        ("\n".join(['{"ids": [5, 9000]}'] * 40), False, "ids from 0 to 9000, and the model has those from 0"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(write, tmp_path, text, streaming, message):
    (tmp_path / "bad.jsonl").write_text(text)
    load = {"path": "json", "data_files": str(tmp_path / "bad.jsonl"), "split": "train"}
    with pytest.raises(ValueError, match=message):
        train(Recipe.read(write(data={"load": load | {"streaming": streaming}})))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_data_without_a_split_is_refused(write, tmp_path):
    file = write(data={"load": {"path": "json", "data_files": str(tmp_path / "rows.jsonl")}})
    with pytest.raises(ValueError, match=r"gives the splits \['train'\]: name one as `split`"):
        train(Recipe.read(file))


@pytest.mark.parametrize(("text", "message"), [("- 1", "holds no sections"), ("a: [", "is no YAML file")])
def test_files_that_are_no_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.read(tmp_path / "recipe.yaml")


def test_a_setting_inside_a_value_is_refused(write):
    with pytest.raises(ValueError, match="Cannot set `output_dir.x`: `output_dir` holds"):
        Recipe.read(write(), {"output_dir.x": 1})


def test_a_correct_run_gives_no_warning(write, recwarn):
    pytest.importorskip("peft")
    section = {"r": 2, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    train(Recipe.read(write(recipe="fine-tune", model={"from_scratch": False}, lora=section)))
    said = [str(warning.message) for warning in recwarn]
    assert not [text for text in said if "_pattern keys" in text or "pin_memory" in text]
