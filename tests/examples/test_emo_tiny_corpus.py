"""`examples/emo_tiny/corpus.py`: cleaning, duplicates, and splits that share nothing."""

import json
import random
import sys
from pathlib import Path

import corpus
import numpy as np
import pytest
from corpus_parts import clean, duplicates
from corpus_parts.build import SPLITS, Corpus, Document, Settings, domains_of, read_lines, verify
from corpus_parts.tokenizer import count_tokens, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

SMALL = Settings(domain_mb=1.0, held_back=4)


def make_text(seed, words: int = 400, vocabulary: int = 2000) -> str:
    """Paragraphs of made-up words, long enough for a document, as good as disjoint from another seed's."""
    generator = random.Random(f"text {seed}")
    names = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(vocabulary)]
    chosen = generator.choices(names, k=words)
    return "\n\n".join(" ".join(chosen[start : start + 40]) for start in range(0, words, 40))


def make_documents(domain: str, count: int = 30) -> list[Document]:
    return [Document(make_text((domain, n)), f"{domain}-1.0/{n}.txt", "CC0-1.0") for n in range(count)]


def build(out: Path, domains: dict[str, list[Document]], settings: Settings = SMALL) -> Corpus:
    made = Corpus(out, settings)
    for name, documents in domains.items():
        made.add(name, name.title(), documents)
    made.finish()
    (out / "manifest.json").write_text(json.dumps({"domains": dict.fromkeys(domains)}))
    return made


def rows(out: Path, split: str, name: str) -> list[dict]:
    return list(read_lines(out / split / f"{name}.jsonl"))


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.jsonl")}


# Splits


def test_every_document_is_in_one_split(tmp_path):
    build(tmp_path, {"a": make_documents("a"), "b": make_documents("b")})
    for name in "ab":
        found = {split: rows(tmp_path, split, name) for split in SPLITS}
        assert [len(found[split]) for split in SPLITS] == [22, 4, 4]
        texts = [row["text"] for split in SPLITS for row in found[split]]
        assert sorted(texts) == sorted(document.text for document in make_documents(name))
    assert rows(tmp_path, "test", "a")[0].keys() == {"text", "domain", "source", "licence"}
    assert verify(tmp_path) == 16


def test_the_same_documents_give_the_same_files_in_any_order(tmp_path):
    documents = make_documents("a")
    build(tmp_path / "one", {"a": documents})
    build(tmp_path / "two", {"a": documents[::-1]})
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_another_domain_moves_nothing(tmp_path):
    build(tmp_path / "one", {"a": make_documents("a")})
    build(tmp_path / "two", {"a": make_documents("a"), "b": make_documents("b")})
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one == {name: data for name, data in two.items() if name in one} and len(two) == 6


def test_pieces_of_a_long_file_stay_in_one_split(tmp_path):
    long = [Document(make_text(("long", n), 5000, 9000), f"long/{n}", "CC0-1.0") for n in range(9)]
    build(tmp_path, {"a": long + make_documents("a")})
    split_of = {split: {row["source"] for row in rows(tmp_path, split, "a")} for split in SPLITS}
    assert not (split_of["test"] | split_of["calibration"]) & split_of["train"]
    assert not split_of["test"] & split_of["calibration"]
    assert sum(row["source"] == "long/0" for split in SPLITS for row in rows(tmp_path, split, "a")) > 2


def test_a_domain_is_no_larger_than_asked(tmp_path):
    size = len(make_text(0).encode())
    made = build(tmp_path, {"a": make_documents("a", 40)}, Settings(domain_mb=20 * size / 1e6, held_back=4))
    assert 19 * size <= sum(made.reports["a"].bytes.values()) <= 22 * size


def test_too_little_text_is_an_error_that_counts(tmp_path):
    with pytest.raises(ValueError, match="'a' has only 5 documents left of 6 .1 too short"):
        build(tmp_path, {"a": [*make_documents("a", 5), Document("short", "s", "CC0-1.0")]})


def test_a_document_in_two_splits_is_found(tmp_path):
    build(tmp_path, {"a": make_documents("a"), "b": make_documents("b")})
    with (tmp_path / "train" / "b.jsonl").open("a") as file:
        copy = rows(tmp_path, "test", "a")[0]["text"]
        file.write(json.dumps({"text": copy, "domain": "b", "source": "b/new", "licence": ""}) + "\n")
    with pytest.raises(ValueError, match="b/new in train and a-1.0/.* in test have 100% of their text"):
        verify(tmp_path)


def test_an_unfinished_corpus_is_no_corpus(tmp_path):
    with pytest.raises(ValueError, match="no manifest.json"):
        domains_of(tmp_path)


# Duplicates


def change(text: str, share: float) -> str:
    generator = random.Random(1)
    return " ".join(f"x{n}" if generator.random() < share else word for n, word in enumerate(text.split(" ")))


@pytest.mark.parametrize("changed, new", [(0.0, False), (0.03, False), (0.5, True)])
def test_a_document_much_like_another_is_not_new(changed, new):
    index, text = duplicates.NearDuplicates(), make_text(0)
    assert index.add(text) and index.add(make_text(1))
    assert index.add(change(text, changed)) == new


def test_chinese_without_spaces_is_compared_by_character():
    generator = random.Random(0)
    text = "".join(chr(generator.randrange(0x4E00, 0x9000)) for _ in range(1000))
    index = duplicates.NearDuplicates()
    assert index.add(text) and not index.add(text[:500] + "新" + text[500:])


@given(st.text(alphabet="ab \n", max_size=60), st.text(alphabet="ab \n", max_size=60))
def test_estimated_similarity_is_near_the_exact_one(first, second):
    one, two = duplicates.shingles(first), duplicates.shingles(second)
    exact = len(np.intersect1d(one, two)) / max(len(np.union1d(one, two)), 1)
    index = duplicates.NearDuplicates()
    if len(one) and len(two):
        estimate = (index.signature(first) == index.signature(second)).mean()
        # Five standard deviations of the mean of as many trials.
        assert abs(estimate - exact) <= 5 * (0.25 / (duplicates.BANDS * duplicates.ROWS)) ** 0.5


def test_near_duplicates_leave_one_and_are_counted(tmp_path):
    twins = [Document(change(make_text(("a", n)), 0.03), f"twin/{n}", "CC0-1.0") for n in range(10)]
    made = build(tmp_path, {"a": make_documents("a") + twins})
    assert made.reports["a"].near == 10 and sum(made.reports["a"].documents.values()) == 30


def test_near_duplicates_across_domains_leave_the_earlier(tmp_path):
    twins = [Document(change(make_text(("a", n)), 0.03), f"twin/{n}", "CC0-1.0") for n in range(10)]
    made = build(tmp_path, {"a": make_documents("a"), "b": make_documents("b") + twins})
    assert made.reports["b"].near == 10 and made.reports["a"].near == 0


@pytest.mark.parametrize("where", ["a", "b"])
def test_a_held_back_document_inside_a_longer_one_takes_that_out_of_training(tmp_path, where):
    parts = [make_text(("a", n)) for n in range(30)]
    # Words are wrapped anew, so that no paragraph is alike; each is a tenth of its document.
    texts = [make_text(("around", n), 2000) + "\n\n" + " ".join(part.split()) for n, part in enumerate(parts)]
    long = [Document(text, f"long/{n}", "CC0-1.0") for n, text in enumerate(texts)]
    domains = {"a": make_documents("a"), "b": make_documents("b")}
    made = build(tmp_path, domains | {where: domains[where] + long})
    assert made.reports[where].overlapping + made.reports["a"].overlapping > 0
    assert verify(tmp_path) >= 16


def test_a_paragraph_of_many_documents_goes_from_all():
    boilerplate = "This page is part of a project whose home is far away and whose licence is long. " * 2
    texts = [f"{make_text(n, 80)}\n\n{boilerplate}" for n in range(6)]
    kept, removed = duplicates.RepeatedParagraphs().filter(texts)
    assert removed == 6 and kept == [make_text(n, 80) for n in range(6)]


def test_a_paragraph_of_two_documents_stays_in_the_first_even_of_another_domain():
    index, shared = duplicates.RepeatedParagraphs(), make_text("shared", 40)
    assert index.filter([f"{shared}\n\nA"]) == ([f"{shared}\n\nA"], 0)
    assert index.filter([f"B\n\n{shared.upper()}", "C"]) == (["B", "C"], 1)


def test_short_paragraphs_may_repeat():
    texts = [f"SEE ALSO\n\n{n}" for n in range(10)]
    assert duplicates.RepeatedParagraphs().filter(texts) == (texts, 0)


def test_overlap_is_of_the_smaller_document():
    part, other = make_text(0), make_text(1)
    overlap = duplicates.Overlap([part, other])
    assert overlap.share(f"{part}\n\n{make_text(2, 4000)}") == pytest.approx([1, 0], abs=0.02)
    assert overlap.share(part[: len(part) // 3]) == pytest.approx([1, 0], abs=0.02)


# Cleaning

LICENCE = (
    "Copyright (C) 2020 A. Writer\n{0} This is free software: redistribute it under the terms of its licence."
)


@pytest.mark.parametrize(
    "source",
    [
        "/*\n * " + LICENCE.format(" *") + "\n */\nint main;",
        "// " + LICENCE.format("//") + "\n\nint main;",
        "#!/bin/sh\n# " + LICENCE.format("#") + "\nint main;",
        ";; " + LICENCE.format(";;") + "\nint main;",
        "(* " + LICENCE.format("") + " *)\nint main;",
        "// SPDX-License-Identifier: GPL-2.0\nint main;",
    ],
)
def test_licence_headers_go(source):
    stripped = clean.strip_licence(source)
    assert stripped.endswith("int main;") and "opyright" not in stripped and "icence" not in stripped


def test_what_a_header_says_besides_the_licence_stays():
    source = (
        ";;; sort.el --- sorts lines of text\n\n;; "
        + LICENCE.format(";;")
        + "\n\n;; Sorts by any field.\n(sort)"
    )
    stripped = clean.strip_licence(source)
    assert stripped.startswith(";;; sort.el --- sorts lines of text\n")
    assert stripped.endswith("\n;; Sorts by any field.\n(sort)") and "Copyright" not in stripped


def test_a_licence_line_takes_nothing_else_with_it():
    source = "f() {\n}\n\n// Copyright 2020 A. Writer\n}\ng();\n"
    assert clean.strip_licence(source) == "f() {\n}\n\n}\ng();\n"


def test_generated_files_and_tables_go():
    body = "def function(argument):\n    return argument\n\n" * 100
    assert clean.clean(body, licence_headers=True)
    assert clean.clean("# Code generated by a tool. DO NOT EDIT.\n" + body, licence_headers=True) is None
    assert clean.clean("\n".join(f"0x{n:04x}, 0x{3 * n:04x}," for n in range(1000))) is None


def test_addresses_of_people_are_masked():
    text = clean.clean(make_text(0) + "\n\nWritten by someone@some.where.net today.")
    assert text.endswith("Written by name@example.org today.")


def test_english_left_in_a_translation_goes():
    french = "Le programme est dans la liste des commandes que l'utilisateur peut lancer par le menu. " * 5
    english = "The program is in the list of commands that the user can start from the menu of the desktop."
    text = "\n\n".join([f"{french} {n}" for n in range(5)] + [english])
    assert clean.clean(text, language="french") == text.removesuffix("\n\n" + english)
    assert clean.clean("\n\n".join(f"{n}: {english}" for n in range(50)), language="french") is None
    assert clean.clean(make_text(0), language="russian") is None


def test_long_documents_are_cut_at_blank_lines():
    text = make_text(0, 4000)
    parts = clean.pieces(text)
    assert len(parts) > 2 and "\n\n".join(parts) == text
    assert all(len(part) <= 1.5 * clean.PIECE for part in parts)


# Tokenizer


def test_the_tokenizer_brings_any_text_back(tmp_path):
    build(tmp_path, {"a": make_documents("a")})
    for folder in (
        "tokenizer",
        "tokenizer.partial",
    ):  # an earlier one, and a part of one
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "old").write_text("")
    train_tokenizer(tmp_path, 400, tmp_path / "tokenizer")
    assert sorted(path.name for path in tmp_path.glob("tokenizer*")) == ["tokenizer"]
    assert not (tmp_path / "tokenizer" / "old").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 400
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 1)
    for text in (" two  spaces\n\tand a tab", "日本語 и кириллица", "".join(map(chr, range(256)))):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokens, size = count_tokens(tmp_path, tmp_path / "tokenizer", "train")["a"]
    texts = [row["text"] for row in rows(tmp_path, "train", "a")]
    assert tokens == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert size == sum(map(len, texts))


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 100.*at least 258"):
        train_tokenizer(tmp_path, 100, tmp_path / "tokenizer")


# The command, with a data set


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["corpus.py", *map(str, arguments)])
    corpus.main()


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        for name, count in (("web pages", 30), ("math", 30), ("rare", 2)):
            for document in make_documents(name, count):
                file.write(json.dumps({"body": document.text, "metadata": {"source": name}}) + "\n")
    return [
        "--dataset",
        "json",
        "--data-files",
        str(path),
        "--domain-column",
        "metadata.source",
        "--held-back",
        4,
    ]


def test_a_dataset_becomes_the_same_layout(tmp_path, monkeypatch, dataset, capsys):
    out = tmp_path / "out"
    run(monkeypatch, "build", out, *dataset, "--text-column", "body", "--vocab-size", 300)
    said = capsys.readouterr()
    assert "left out: Domain 'rare' has only 2 documents" in said.err
    assert domains_of(out) == ["math", "web_pages"]
    assert [len(rows(out, split, "math")) for split in SPLITS] == [22, 4, 4]
    assert "| math | math | 22 | 4 | 4 |" in (out / "README.md").read_text()
    run(monkeypatch, "verify", out)
    run(monkeypatch, "tokenizer", out, "--vocab-size", 290)
    assert "math" in capsys.readouterr().out and (out / "tokenizer-290" / "tokenizer.json").is_file()


def test_the_files_of_a_dataset_name_its_domains(tmp_path, monkeypatch):
    for name in ("one", "two"):
        lines = [json.dumps({"text": document.text}) for document in make_documents(name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    parts = [f"{name}s={tmp_path}/{name}.jsonl" for name in ("one", "two")]
    arguments = ["--dataset", "json", "--data-files", *parts, "--held-back", 4, "--vocab-size", 300]
    run(monkeypatch, "build", tmp_path / "out", *arguments)
    assert domains_of(tmp_path / "out") == ["ones", "twos"]
    assert rows(tmp_path / "out", "test", "ones")[0]["source"].startswith("json/ones/")
    limited = [*arguments, "--limit-mb", 0.05]
    run(monkeypatch, "build", tmp_path / "limited", *limited)
    assert [
        sum(len(rows(tmp_path / "limited", split, name)) for split in SPLITS) for name in ("ones", "twos")
    ] == [
        18,
        18,
    ]


def test_a_missing_column_is_named_and_nothing_is_lost(tmp_path, monkeypatch, dataset):
    build(tmp_path / "out", {"a": make_documents("a")})
    with pytest.raises(SystemExit, match="no column 'text'.*'body', 'metadata'"):
        run(monkeypatch, "build", tmp_path / "out", *dataset)
    assert verify(tmp_path / "out") == 8


def test_reading_a_dataset_stops_at_its_limit(tmp_path, monkeypatch, dataset):
    with pytest.raises(SystemExit, match="No domain has enough text"):
        run(monkeypatch, "build", tmp_path / "out", *dataset, "--text-column", "body", "--limit-mb", 0.01)
