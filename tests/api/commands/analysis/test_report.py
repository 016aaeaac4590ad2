"""`emo report`: one page, made again from what was measured."""

import json

import pytest
from conftest import TOY
from transformers_emo import cli
from transformers_emo.analysis.routing import statistics

SHORT = ["--texts", f"{TOY}/documents", "--window", "32", "--clusters", "4"]


def content_of(page):
    return json.loads(page.read_text().partition('id="content">')[2].partition("</script>")[0])


def test_a_page_of_two_models_with_pictures(tmp_path, capsys, monkeypatch):
    page, pictures = tmp_path / "report.html", tmp_path / "pictures"
    words = ["report", f"one={TOY}", f"two={TOY}", *SHORT, "--no-retention", "-o", str(page)]
    assert cli.main([*words, "--pictures", str(pictures), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == len(page.read_bytes()) and set(told["numbers"]) == {"one", "two"}
    assert len(told["pictures"]) == len(list(pictures.iterdir())) == 10
    content = content_of(page)
    assert [model["name"] for model in content["models"]] == ["one", "two"]
    assert content["retention"] is None

    monkeypatch.setattr(statistics, "pass_full_model", lambda *_: pytest.fail("measured again"))
    assert cli.main([*words, "--title", "Again"]) == 0
    assert "<title>Again</title>" in page.read_text()
    assert content_of(page) == content


def test_the_curve_is_measured_or_read(tmp_path, capsys):
    page = tmp_path / "report.html"
    texts = tmp_path / "texts"
    for split in ("calibration", "test"):
        (texts / split).mkdir(parents=True)
        for domain, text in (("python", "import os\n" * 9), ("coq", "Qed. Lemma x : y.\n" * 9)):
            line = json.dumps({"text": f"{split} {text}"}) + "\n"
            (texts / split / f"{domain}.jsonl").write_text(line * 2)
    words = [
        "report",
        f"toy={TOY}",
        "--texts",
        str(texts),
        "--window",
        "32",
        "--clusters",
        "4",
        "-o",
        str(page),
    ]
    assert cli.main(words) == 0
    curves = content_of(page)["retention"]["curves"]
    assert {curve["method"] for curve in curves} == {"layerwise", "random"}
    measured = tmp_path / "report.html.data" / "retention"
    assert cli.main([*words, "--retention", str(measured)]) == 0
    assert content_of(page)["retention"]["curves"] == curves
    capsys.readouterr()
    assert cli.main([*words[:1], f"other={TOY}", *words[2:], "--retention", str(measured)]) == 1
    assert "'other' was not measured in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(TOY), str(TOY)], "give each a name of its own, NAME=FOLDER"),
        ([str(TOY), "--retention", "r", "--no-retention"], "Give --retention or --no-retention, not both."),
        ([str(TOY), "--languages", "coq=fr"], "There is no tagger for the language 'fr' of 'coq'"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(words, message, tmp_path, capsys):
    assert cli.main(["report", *words, *SHORT, "-o", str(tmp_path / "page.html")]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
