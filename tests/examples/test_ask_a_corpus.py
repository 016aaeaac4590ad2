"""The example that searches a folder and lets what it finds choose the experts."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TOY
from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM, select_experts
from transformers_emo.analysis import document_losses, encode_documents, read_domains

FOLDER = Path(__file__).parents[2] / "examples" / "ask_a_corpus"
TINY, STANDARD = TOY.parent / "emo-tiny", TOY.parent / "std-tiny"


@pytest.fixture(scope="module")
def example():
    """The example's modules, which import each other as scripts do."""
    sys.path.insert(0, str(FOLDER))
    try:
        import ask
        import measure
        import search

        yield {"ask": ask, "measure": measure, "search": search}
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("ask", "measure", "search"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def domains():
    return read_domains(TINY / "documents", ["python", "german"], max_test=2)


@pytest.fixture(scope="module")
def model():
    return EmoForCausalLM.from_pretrained(TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def corpus(example, domains, tmp_path):
    example["measure"].write_corpus(domains, tmp_path / "corpus")
    return tmp_path / "corpus"


class TestSearch:
    def test_rare_words_count_more(self, example, tmp_path):
        (tmp_path / "below").mkdir()
        (tmp_path / "a.txt").write_text("the cat\n\n" + "the dog\n\n" * 3)
        (tmp_path / "below" / "b.txt").write_text("the axolotl")
        found = example["search"].find_passages(tmp_path, "The AXOLOTL?", length=12)
        assert [one.text for one in found][:2] == ["the axolotl", "the cat"]
        assert found[0].score > found[1].score

    def test_files_that_are_no_text_are_skipped(self, example, tmp_path):
        (tmp_path / "a.bin").write_bytes(b"word\0word")
        (tmp_path / "b.txt").write_bytes(b"word \xff\xfe")
        (tmp_path / "c.txt").write_text("word here")
        assert [one.file.name for one in example["search"].find_passages(tmp_path, "word")] == ["c.txt"]

    def test_nothing_found_and_no_folder(self, example, tmp_path):
        assert example["search"].find_passages(tmp_path, "nothing") == []
        assert example["search"].find_passages(tmp_path, "?") == []
        with pytest.raises(NotADirectoryError, match="no folder"):
            example["search"].find_passages(tmp_path / "no", "word")

    @pytest.mark.skipif(shutil.which("rg") is None, reason="ripgrep is not installed")
    def test_ripgrep_finds_what_reading_every_file_finds(self, example, corpus, domains, monkeypatch):
        for domain in domains:
            with_it = example["search"].find_passages(corpus, domain.test[0][:200])
            with monkeypatch.context() as context:
                context.setattr(shutil, "which", lambda name: None)
                assert example["search"].find_passages(corpus, domain.test[0][:200]) == with_it != []

    def test_ripgrep_is_asked_for_every_word_where_it_is_there(self, example, tmp_path, monkeypatch):
        (tmp_path / "texts").mkdir()
        for name in ("a", "b"):
            (tmp_path / "texts" / name).write_text("word")
        tool = tmp_path / "rg"  # it finds one of the two files, and writes down what it was asked
        tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nprintf "{tmp_path}/texts/b\\0"\n')
        tool.chmod(0o755)
        monkeypatch.setattr(shutil, "which", lambda name: str(tool))
        found = example["search"].find_passages(tmp_path / "texts", "word other")
        assert [one.file.name for one in found] == ["b"]
        asked = (tmp_path / "asked").read_text()
        assert "-e word" in asked and "-e other" in asked and "--no-ignore" in asked


class TestChoice:
    def test_passages_and_question_choose(self, example, model, tokenizer, corpus, domains):
        question = domains[0].test[0][:150]
        passages = example["search"].find_passages(corpus, question)
        assert {one.file.parent.name for one in passages} == {"python"}
        library = example["ask"].read_library(TINY, 16)
        assert {"python", "german"} <= set(library)
        choice = example["ask"].choose(model, tokenizer, question, passages, 16, library=library)
        texts = [*(one.text for one in passages), question]
        alone = select_experts(model, texts, 16, tokenizer=tokenizer, progress=False)
        assert choice.subset.experts == alone.experts
        assert choice.nearest == "python" and choice.note is None
        near = example["ask"].choose(model, tokenizer, question, passages, 16, by="library", library=library)
        assert near.subset.experts == library["python"].experts

    def test_passages_of_another_subject_are_told(self, example, model, tokenizer, domains):
        wrong = [example["search"].Passage(Path("x"), domains[1].calibration[0][:500], 1.0)]
        library = example["ask"].read_library(TINY, 16)
        question = domains[0].test[0][:300]
        choice = example["ask"].choose(model, tokenizer, question, wrong, 16, library=library)
        assert "nearest to 'german' and the question to 'python'" in choice.note

    def test_what_cannot_be_chosen_is_refused(self, example, model, tokenizer):
        with pytest.raises(ValueError, match="`by` is 'x'"):
            example["ask"].choose(model, tokenizer, "word", [], 16, by="x")
        with pytest.raises(ValueError, match="no library"):
            example["ask"].choose(model, tokenizer, "word", [], 16, by="library")


@pytest.mark.parametrize("by", ["passages", "library"])
def test_the_answer_is_written_with_the_chosen_experts_only(corpus, monkeypatch, capsys, by):
    taken: dict[int, set[int]] = {}
    generate = EmoForCausalLM.generate

    def watched(self, *args, **kwargs):
        kept[0] = kwargs["expert_subset"].experts
        for number, layer in enumerate(self.model.layers):
            layer.mlp.gate.register_forward_hook(
                lambda gate, inputs, output, number=number: taken.setdefault(number, set()).update(
                    output[2].unique().tolist()
                )
            )
        return generate(self, *args, **kwargs)

    kept: list = [None]
    monkeypatch.setattr(EmoForCausalLM, "generate", watched)
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    words = ["ask.py", str(corpus), "import class function return", "--tokens", "6", "--by", by]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(FOLDER / "ask.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "16 of 64 experts a layer, nearest subset: python" in said and "python/" in said
    assert len(taken) == 4
    for number, experts in taken.items():
        assert experts <= set(kept[0][number]) and len(experts) > 4


def test_the_table_has_true_numbers(example, domains, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ["measure.py", str(TINY), str(STANDARD), "--domains", "python", "german", "--test", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(out)])
    example["measure"].main()
    text = (out / "README.md").read_text()
    assert text in capsys.readouterr().out
    rows = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert set(example["measure"].WAYS) <= set(rows)
    for column, path in enumerate((TINY, STANDARD), 1):
        model = EmoForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = [one for domain in domains for one in encode_documents(tokenizer, domain.test, 160)]
        found = document_losses(model, [one for one in ids if len(one) == 160], after=32)
        mean = (found.loss_N / found.tokens_N).mean().item()
        assert float(re.findall(r"\d\.\d{3}", rows["all experts"])[column - 1]) == pytest.approx(
            mean, abs=2e-3
        )
