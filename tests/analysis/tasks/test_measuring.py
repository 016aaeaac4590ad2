"""Scores on tasks by experts kept: those of the subsets themselves, made once, and kept."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TOY
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM, select_experts
from transformers_emo.analysis.tasks import TaskScores, harness, measure_tasks, measuring

TASKS = Path(__file__).parents[3] / "examples" / "data" / "tasks"
TINY, STANDARD = TOY.parent / "emo-tiny", TOY.parent / "std-tiny"
PLAN = {"include_path": TASKS, "num_prompts": 2, "progress": False, "dtype": torch.float32, "batch_size": 4}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def with_only_test(tmp_path):
    """The tasks, and one that has nothing but what is scored."""
    folder = tmp_path / "tasks"
    shutil.copytree(TASKS, folder)
    text = (folder / "emo_code.yaml").read_text()
    kept = [line for line in text.splitlines() if "train" not in line and "shown" not in line]
    kept = [line for line in kept if line != "fewshot_config:"]
    text = "\n".join(kept).replace("emo_code", "emo_only_test").replace("num_fewshot: 1", "num_fewshot: 0")
    (folder / "emo_only_test.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("path", [TINY, STANDARD], ids=["emo", "standard"])
def test_a_mask_of_k_experts_scores_as_the_subset_of_k_does(tmp_path, path):
    names = ["emo_code", "emo_rest", "emo_continued", "emo_bits"]
    found = measure_tasks({"tiny": path}, names, tmp_path, experts=[4], limit=6, **PLAN)
    by_key = {(score.task, score.num_experts): score for score in found.scores}
    assert set(by_key) == {(name, k) for name in names for k in (64, 4)}
    tokenizer = AutoTokenizer.from_pretrained(path)
    for name, task in harness.load_tasks(names, include_path=TASKS).tasks.items():
        prompts = harness.calibration_prompts(task, 2)
        model = EmoForCausalLM.from_pretrained(path, dtype=torch.float32)
        subset = select_experts(model, prompts, 4, tokenizer=tokenizer, progress=False)
        small = EmoForCausalLM.from_pretrained(path, dtype=torch.float32, expert_subset=subset)
        assert small.config.num_experts == 4
        alone = harness.Scorer(small, tokenizer, 4).score(task, 6)
        kept = by_key[name, 4]
        assert (kept.documents, kept.method, kept.seed) == (6, "layerwise", 0)
        assert kept.metrics == pytest.approx(alone.metrics, rel=1e-4)
    bits = [by_key["emo_bits", k].metrics["bits_per_byte,none"] for k in (64, 4)]
    assert bits[1] > 1.1 * bits[0]  # so many experts fewer are felt, so that the above says something


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    plan = {"experts": [32, 8], "limit": 4, **PLAN}
    names = ["emo_code", "emo_rest"]
    whole = measure_tasks({"tiny": TINY}, names, tmp_path / "whole", **plan)
    real, calls = measuring.Scorer.score, []

    def counted(*args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(measuring.Scorer, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_tasks({"tiny": TINY}, names, tmp_path / "cut", **plan)
    assert len(TaskScores.read(tmp_path / "cut").scores) == 3
    resumed = measure_tasks({"tiny": TINY}, names, tmp_path / "cut", **plan)
    assert resumed.scores == whole.scores and len(calls) == 4 + 3
    more = measure_tasks({"tiny": TINY}, ["emo_code"], tmp_path / "cut", **plan | {"experts": [16]})
    assert len(calls) == 8 and len(more.scores) == 7


def test_scores_of_other_prompts_weights_or_documents_are_never_mixed(tmp_path):
    plan = {"experts": [8], "limit": 2, **PLAN}
    measure_tasks({"tiny": TINY}, ["emo_languages"], tmp_path, **plan)
    for other, said in [({"limit": 3}, "requests of"), ({"num_prompts": 1}, "calibration prompts of")]:
        with pytest.raises(ValueError, match=f"measured with {said} emo_languages"):
            measure_tasks({"tiny": TINY}, ["emo_languages"], tmp_path, **plan | other)
    with pytest.raises(ValueError, match="measured with weights of tiny"):
        measure_tasks({"tiny": STANDARD}, ["emo_languages"], tmp_path, **plan)


def test_a_group_has_the_score_that_the_harness_gives_it(tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = measure_tasks({"tiny": TINY}, ["emo_both"], tmp_path, experts=[64], **PLAN)
    assert found.tasks == ["emo_both"] and len(found.scores) == 2
    assert len({score.documents for score in found.scores}) == 2  # else no weight would show
    model = EmoForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(TINY), batch_size=4),
        tasks=["emo_both"],
        task_manager=TaskManager(include_path=str(TASKS)),
    )
    values = theirs["groups"]["emo_both"]
    assert found.value("tiny", "emo_both", "full", 64) == pytest.approx(values["acc,none"])
    assert found.error("tiny", "emo_both", "full", 64) == pytest.approx(values["acc_stderr,none"], rel=0.05)
    assert TaskScores.read(tmp_path).groups == found.groups


def test_random_experts_need_no_prompts_and_differ_by_seed(tmp_path, with_only_test):
    plan = {"experts": [4], "methods": ["random"], "limit": 6, **PLAN}
    found = measure_tasks({"tiny": TINY}, ["emo_rest"], tmp_path, seeds=[0, 1], **plan)
    full, one, two = (score.metrics["perplexity,none"] for score in found.scores)
    assert one != two and min(one, two) > full
    assert found.value("tiny", "emo_rest", "random", 4) == pytest.approx((one + two) / 2)
    only = measure_tasks(
        {"tiny": TINY}, ["emo_only_test"], tmp_path / "b", **plan | {"include_path": with_only_test}
    )
    assert [score.num_experts for score in only.scores] == [64, 4]


def test_prompts_hold_the_answers_of_documents_that_are_not_scored():
    task = harness.load_tasks(["emo_code"], include_path=TASKS).tasks["emo_code"]
    prompts = harness.calibration_prompts(task, 3)
    shown = [f"{row['beginning']}{row['end']}" for row in task.fewshot_docs()]
    # One demonstration, and one more question with its answer; not only from the beginning of the file.
    found = [[number for number, text in enumerate(shown) if text.rstrip() in prompt] for prompt in prompts]
    assert [len(numbers) for numbers in found] == [2, 2, 2]
    assert all(
        prompt in ("\n\n".join((shown[a], shown[b])).rstrip(), "\n\n".join((shown[b], shown[a])).rstrip())
        for (a, b), prompt in zip(found, prompts, strict=True)
    )
    used = {number for numbers in found for number in numbers}
    assert len(used) == 6 and max(used) >= 8 > min(used)  # of both files of eight
    assert harness.calibration_prompts(task, 3) == prompts
    assert not any(row["beginning"] in prompt for row in task.eval_docs for prompt in prompts)


def test_prompts_begin_with_the_description_of_the_task(with_only_test):
    file = with_only_test / "emo_code.yaml"
    file.write_text(file.read_text() + 'description: "Texts of {{answer}}.\\n\\n"\n')
    task = harness.load_tasks(["emo_code"], include_path=with_only_test).tasks["emo_code"]
    assert task.config.description
    prompts = harness.calibration_prompts(task, 3)
    assert all(re.match(r"Texts of \d\.\n\n", prompt) for prompt in prompts)
    # As the prompts that are scored begin.
    task.build_all_requests(limit=1)
    assert re.match(r"Texts of \d\.\n\n", task.instances[0].args[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ["emo_cod"]}, "no task 'emo_cod'. Near to it are 'emo_code'"),
        ({"tasks": ["emo_only_test"]}, "has only the split 'test', which is scored"),
        ({"tasks": []}, "no tasks"),
        ({"tasks": ["emo_code", "emo_code"]}, "name each once"),
        ({"experts": [65]}, "65 experts cannot be kept of 'tiny': expected 2 to 64"),
        ({"experts": [1]}, "1 experts cannot be kept"),
        ({"limit": 0}, "`limit` is 0, expected at least 1"),
        ({"num_fewshot": -1}, "`num_fewshot` is -1"),
        ({"include_path": "nowhere"}, "no such folder"),
        ({"methods": ["best"]}, "best"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_score(tmp_path, with_only_test, change, said):
    plan = {
        "tasks": ["emo_code"],
        "experts": [8],
        "limit": 2,
        **PLAN,
        "include_path": with_only_test,
    } | change
    with pytest.raises(ValueError, match=said.replace("'", ".")):
        measure_tasks({"tiny": TINY}, plan.pop("tasks"), tmp_path, **plan)
    assert not (tmp_path / "tasks.jsonl").exists()
