"""Scores on tasks in tables beside the paper's, in pictures and in cards."""

import csv

import pytest
from huggingface_hub import ModelCard
from transformers_emo.analysis.tasks import (
    PAPER_SCORES,
    TaskGroup,
    TaskScore,
    TaskScores,
    add_to_card,
    task_markdown,
    write_task_report,
)


def score(task, k, value, *, model="mine", method="layerwise", error=0.01, documents=10, seed=0):
    full = k == 128
    return TaskScore(
        *(model, task, "full" if full else method, k, None if full else seed),
        {"exact_match,strict": value, "exact_match,loose": 1.0},
        {} if error is None else {"exact_match,strict": error},
        *("exact_match,strict", documents, 5),
    )


@pytest.fixture
def scores():
    return TaskScores(
        [
            score(task, k, k / 1000 + number / 100)
            for number, task in enumerate(["gsm8k", "arc"])
            for k in (128, 16)
        ]
    )


def test_the_papers_figures_stand_beside_the_tasks_that_it_has(scores):
    lines = [line.split(" | ") for line in task_markdown(scores).splitlines() if line.startswith("| ")]
    assert lines[0][2:] == ["mine, layerwise", "paper: Emo_1b14b_1T", "paper: StdMoE_1b14b_1T |"]
    assert lines[1] == ["| gsm8k (exact_match,strict)", "128", "12.8 (1.0)", "12.0", "13.9 |"]
    assert lines[2] == ["| gsm8k (exact_match,strict)", "16", "1.6 (1.0)", "12.2", "2.4 |"]
    assert lines[3][1:] == ["128", "13.8 (1.0)", "–", "– |"]
    without = task_markdown(TaskScores([s for s in scores.scores if s.task == "arc"]))
    assert "paper" not in without


def test_the_papers_figures_have_every_size_of_both_models():
    for models in PAPER_SCORES.values():
        for values in models.values():
            assert list(values) == [128, 64, 32, 16, 8]


def test_every_metric_is_in_the_csv(scores, tmp_path):
    write_task_report(scores, tmp_path)
    rows = list(csv.DictReader((tmp_path / "tasks.csv").open()))
    assert len(rows) == 2 * len(scores.scores)
    assert {row["metric"] for row in rows} == {"exact_match,strict", "exact_match,loose"}
    assert (tmp_path / "tasks.png").read_bytes()[:4] == b"\x89PNG"


def test_a_group_without_all_its_tasks_has_no_score():
    half = TaskScores([score("a", 16, 0.5)], [TaskGroup("both", ["a", "b"])])
    assert half.value("mine", "both", "layerwise", 16) is None
    both = TaskScores(
        [score("a", 16, 0.5, documents=30), score("b", 16, 0.1, error=None)], [TaskGroup("both", ["a", "b"])]
    )
    assert both.value("mine", "both", "layerwise", 16) == pytest.approx(0.4)
    assert both.error("mine", "both", "layerwise", 16) is None
    alike = TaskScores(both.scores, [TaskGroup("both", ["a", "b"], by_size=False)])
    assert alike.value("mine", "both", "layerwise", 16) == pytest.approx(0.3)


def test_a_card_keeps_what_it_had_and_takes_new_scores_for_old(scores, tmp_path):
    card = tmp_path / "README.md"
    card.write_text(
        "---\nlicense: apache-2.0\ntags:\n- emo\n---\n\n# mine\n\nText: 100 %.\n", encoding="utf-8"
    )
    add_to_card(scores, "mine", card)
    first = card.read_text(encoding="utf-8")
    add_to_card(scores, "mine", card)
    assert card.read_text(encoding="utf-8") == first and "# mine\n\nText: 100 %.\n" in first
    add_to_card(
        TaskScores([score("gsm8k", 128, 0.5), score("gsm8k", 16, 0.25), score("new", 128, 1.0)]), "mine", card
    )
    loaded = ModelCard.load(card)
    assert loaded.data.license == "apache-2.0" and loaded.data.tags == ["emo"]
    values = {(r.dataset_type, r.metric_name): r.metric_value for r in loaded.data.eval_results}
    assert values == {
        ("gsm8k", "exact_match,strict, all 128 experts"): 50.0,
        ("gsm8k", "exact_match,strict, 16 of 128 experts, layerwise"): 25.0,
        ("arc", "exact_match,strict, all 128 experts"): 13.8,
        ("arc", "exact_match,strict, 16 of 128 experts, layerwise"): 2.6,
        ("new", "exact_match,strict, all 128 experts"): 100.0,
    }


def test_a_card_that_is_not_there_and_a_model_that_was_not_measured_are_told(scores, tmp_path):
    with pytest.raises(FileNotFoundError, match="no card"):
        add_to_card(scores, "mine", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("# x\n")
    with pytest.raises(ValueError, match="no scores of 'other': name one of \\['mine'\\]"):
        add_to_card(scores, "other", tmp_path / "README.md")
