"""Examples are scripts and no package: their folders are put where they stand when they are run."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "emo_tiny"))


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """A working directory with `examples` and a `corpus` of two domains, laid out as `corpus.py` does."""
    toy, corpus = ROOT / "model_cards" / "toy-emo", tmp_path / "corpus"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (corpus / "tokenizer-4096").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (corpus / "tokenizer-4096" / name).write_text((toy / name).read_text())
    for split in ("train", "calibration", "test"):
        (corpus / split).mkdir()
        for domain in ("coq", "man_fr"):
            lines = (toy / "documents" / f"{domain}.jsonl").read_text().splitlines()
            wanted = "test" if split == "test" else "calibration"
            kept = [line for line in lines if json.loads(line)["split"] == wanted]
            (corpus / split / f"{domain}.jsonl").write_text("\n".join(kept))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return corpus
