"""Every text of others that the repository holds has its source and licence written beside it."""

import re

import pytest
from conftest import TOY

ROW = re.compile(r"\| `(\w+)\.jsonl` \| (\d+)(?:-(\d+))? \| [^|]* \| ([^|]+) \| ([^|]+) \|")


@pytest.mark.parametrize("file", sorted((TOY / "documents").glob("*.jsonl")), ids=lambda file: file.stem)
def test_each_document_of_toy_emo_has_one_row_with_source_and_licence(file):
    rows = ROW.findall((TOY / "documents" / "SOURCES.md").read_text(encoding="utf-8"))
    named = [
        line
        for name, first, last, source, licence in rows
        if name == file.stem and source.strip() and licence.strip()
        for line in range(int(first), int(last or first) + 1)
    ]
    assert named == list(range(1, len(file.read_text(encoding="utf-8").splitlines()) + 1))
