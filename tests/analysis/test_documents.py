"""Reading domains, and what is refused."""

import json

import pytest
from conftest import TOY
from transformers import AutoTokenizer
from transformers_emo.analysis import draw, encode_documents, read_domains


def write(path, *documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def test_splits_in_folders(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / "calibration" / f"{name}.jsonl", {"text": f"{name}0"}, {"text": ""})
        write(tmp_path / "test" / f"{name}.jsonl", {"text": f"{name}1"}, {"text": f"{name}2"})
    domains = read_domains(tmp_path)
    assert [(d.name, d.calibration, d.test) for d in domains] == [
        ("a", ("a0",), ("a1", "a2")),
        ("b", ("b0",), ("b1", "b2")),
    ]
    assert [d.name for d in read_domains(tmp_path, ["b", "a"])] == ["b", "a"]
    assert read_domains(tmp_path, max_test=1)[0].test == ("a1",)


def test_splits_in_lines(tmp_path):
    splits = ("test", "train", "calibration", "test")
    write(tmp_path / "a.jsonl", *({"text": str(n), "split": split} for n, split in enumerate(splits)))
    (domain,) = read_domains(tmp_path)
    assert (domain.calibration, domain.test) == (("2",), ("0", "3"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is no JSON"),
        (['{"text": "a", "split": "test"}', "[]"], "line 2: expected an object with a `text`"),
        (['{"text": 3}'], "expected an object with a `text`"),
        (['{"text": "a", "split": "test"}'], "has no calibration document"),
    ],
)
def test_files_that_hold_no_documents_are_refused(tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_domains(tmp_path)


def test_unknown_domains_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Found no documents"):
        read_domains(tmp_path)
    with pytest.raises(ValueError, match="no domain 'perl'.*'python'"):
        read_domains(TOY / "documents", ["perl"])
    with pytest.raises(ValueError, match="at least 1 test document"):
        read_domains(TOY / "documents", max_test=0)


def test_documents_are_cut_to_the_window():
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    long, short = encode_documents(tokenizer, ["import os\n" * 50, "import"], 16)
    assert len(long) == 16 and 0 < len(short) < 16
    assert long.tolist() == tokenizer("import os\n" * 50)["input_ids"][:16]


def test_draws_repeat_and_differ_by_seed_and_domain():
    documents = [f"text {n}" for n in range(40)]
    first = draw(documents, 8, seed=0, domain="a")
    assert first == draw(documents, 8, seed=0, domain="a") and len(set(first)) == 8
    assert first != draw(documents, 8, seed=1, domain="a") and first != draw(documents, 8, seed=0, domain="b")
    assert draw(documents[:3], 8, seed=0, domain="a") == documents[:3]
