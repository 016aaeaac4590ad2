"""`emo routing`: words of the command, and what it writes."""

import json

import pytest
from conftest import TOY
from transformers_emo import cli
from transformers_emo.analysis.routing import RoutingStatistics

TEXTS = ["--texts", f"{TOY}/documents", "--window", "16"]


def test_processes_share_the_parts_of_a_folder(tmp_path, capsys):
    for process in ("2/2", "1/2"):
        words = ["routing", str(TOY), *TEXTS, "--max-texts", "5", "--part", "2", "--process", process]
        assert cli.main([*words, "--out", str(tmp_path), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
    assert told == {"out": str(tmp_path), "documents": 5, "parts": 3}
    assert RoutingStatistics(tmp_path).parts() == [0, 1, 2]


def test_parts_of_speech_are_written_for_named_domains(tmp_path):
    words = ["routing", str(TOY), *TEXTS, "--languages", "python=en", "coq=de"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    found = RoutingStatistics(tmp_path)
    assert found.settings["languages"] == {"python": "en", "coq": "de"}
    documents, tokens = found.documents(), found.tokens(0, ["document", "part_of_speech"])
    domains = documents["domain"][tokens["document"]]
    told = {domain: set(tokens["part_of_speech"][domains == domain]) for domain in set(domains)}
    assert {domain for domain, classes in told.items() if None not in classes} == {"python", "coq"}
    assert "noun" in told["python"]


def test_a_dataset_is_streamed(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, **settings):
        asked.append((name, settings))
        return iter([{"body": "import os", "topic": "python"}, {"body": "Qed.", "topic": "coq"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = [
        "--texts",
        "me/texts",
        "--dataset-split",
        "train",
        "--column",
        "body",
        "--domain-column",
        "topic",
    ]
    assert cli.main(["routing", str(TOY), *words, "--out", str(tmp_path)]) == 0
    assert asked == [("me/texts", {"split": "train", "streaming": True})]
    assert RoutingStatistics(tmp_path).documents()["domain"].tolist() == ["python", "coq"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--process", "3/2"], "'3/2' is no share: write 1/4 to 4/4 for four processes"),
        (["--languages", "english"], "'english' is not DOMAIN=LANGUAGE"),
        (["--languages", "french=fr"], "no tagger for the language 'fr'"),
    ],
)
def test_words_that_say_nothing_are_refused(words, message, tmp_path, capsys):
    assert cli.main(["routing", str(TOY), *TEXTS, "--out", str(tmp_path / "out"), *words]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
